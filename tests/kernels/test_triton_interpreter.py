"""The tests of the Triton kernels run under Triton's interpreter if there is no CUDA device. Triton
asks for the interpreter when it is imported, so each file runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the device")
@pytest.mark.parametrize(
    "name",
    [
        "test_triton_kernels.py",
        "test_triton_fused.py",
        "test_causal_conv3d_triton.py",
        "test_derivatives.py",
        "test_hidden.py",
        "test_frames.py",
    ],
)
def test_kernels_agree_with_float64(request, name):
    tests = Path(__file__).with_name(name)
    chosen = ["-m", request.config.getoption("-m")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
