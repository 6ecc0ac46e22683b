"""The operator library keeps to the LibTorch stable ABI, with no Python in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "aapt_kernels" / "lib" / "libaapt_ops.so"


def run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_library_uses_no_python():
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", LIBRARY))
    assert "libtorch.so" in needed
    assert [name for name in needed if "python" in name] == []
    symbols = run("nm", "-D", "--undefined-only", LIBRARY).split()
    assert [name for name in symbols if re.match(r"_?Py[A-Z_]", name)] == []


def test_library_takes_only_the_stable_functions_of_torch():
    symbols = run("nm", "-D", "-C", "--undefined-only", LIBRARY)
    assert re.findall(r"\b(?:c10|at|torch)::\S+", symbols) == []


def test_library_needs_no_cuda_library():
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", LIBRARY))
    assert [name for name in needed if name.startswith(("libcuda", "libcudart"))] == []


@pytest.mark.parametrize(
    ("setting", "succeeds", "message"),
    [
        ("on", False, "AAPT_CUDA=on needs nvcc, and none was found"),
        ("auto", True, "nvcc not found: sm_90a kernels skipped"),
        ("off", True, "AAPT_CUDA=off: sm_90a kernels skipped"),
        ("maybe", False, "AAPT_CUDA: expected on, off or auto, got 'maybe'"),
    ],
)
def test_build_without_nvcc(setting, succeeds, message, tmp_path):
    cmake = pytest.importorskip("cmake")
    environment = {"AAPT_CUDA": setting, "PATH": "/usr/bin:/bin"}
    # /usr/local/bin is on CMake's own list of places, and may hold an nvcc.
    options = ["-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    done = subprocess.run(
        [program, "-S", ROOT, "-B", tmp_path, *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == succeeds, done.stderr
    assert (done.stdout + done.stderr).count(message) == 1


def test_sm90_kernels_are_registered_for_cuda_only():
    torch.ops.load_library(LIBRARY)
    if not hasattr(torch.ops.aapt_sm90, "kv_append"):
        pytest.skip("this build has no sm_90a kernels")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel("aapt_sm90::kv_append", "CUDA")
    assert not has_kernel("aapt_sm90::kv_append", "CPU")
