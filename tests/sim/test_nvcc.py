"""The test kernels compile for the GPU without warnings, so that they can run there too."""

import shutil

import pytest
from sm90_gate import compile_checked

from .gpu import NVCC
from .simulator import KERNELS


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", sorted(KERNELS.glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_for_sm90a(source, tmp_path):
    command = [*NVCC, "-Xptxas=-v", "-c", str(source), "-o", str(tmp_path / "kernel.o")]
    kernels, failures = compile_checked(command, required={})
    # They are written to be read, and make a descriptor for each product
    failures = [failure for failure in failures if "uniform instructions" not in failure]
    assert kernels and not failures
