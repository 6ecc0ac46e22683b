"""The operator library keeps to the LibTorch stable ABI, with no Python in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "aapt_kernels" / "lib" / "libaapt_sm90.so"
SIMULATOR = LIBRARY.with_name("libaapt_sim.so")
LIBRARIES = [pytest.param(LIBRARY, id="ops")]
if SIMULATOR.exists():
    LIBRARIES.append(pytest.param(SIMULATOR, id="sim"))


def run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_uses_no_python(library):
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library))
    assert "libtorch.so" in needed
    assert [name for name in needed if "python" in name] == []
    symbols = run("nm", "-D", "--undefined-only", library).split()
    assert [name for name in symbols if re.match(r"_?Py[A-Z_]", name)] == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_takes_only_the_stable_functions_of_torch(library):
    symbols = run("nm", "-D", "-C", "--undefined-only", library)
    assert re.findall(r"\b(?:c10|at|torch)::\S+", symbols) == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_needs_no_cuda_library(library):
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library))
    assert [name for name in needed if name.startswith(("libcuda", "libcudart"))] == []


def test_the_simulator_is_loaded_on_demand_only():
    code = "import aapt_kernels; print(open('/proc/self/maps').read().count('libaapt_sim'))"
    assert run(sys.executable, "-c", code) == "0\n"


@pytest.mark.skipif(not SIMULATOR.exists(), reason="this build has no simulator")
def test_the_simulator_brings_its_own_hooks():
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", SIMULATOR))
    assert [name for name in needed if "tsan" in name] == []
    defined = run("nm", "-D", "-C", "--defined-only", SIMULATOR)
    assert "__tsan_" not in defined  # or they would serve other libraries too
    assert "aapt::sim::options()" in defined


@pytest.mark.parametrize(
    ("switches", "succeeds", "message"),
    [
        ({"AAPT_CUDA": "on"}, False, "AAPT_CUDA=on: expected nvcc on PATH"),
        ({"AAPT_CUDA": "auto"}, True, "nvcc not found: sm_90a kernels skipped"),
        ({"AAPT_CUDA": "off"}, True, "AAPT_CUDA=off: sm_90a kernels skipped"),
        ({"AAPT_CUDA": "maybe"}, False, "AAPT_CUDA: expected on, off or auto, got 'maybe'"),
        ({"AAPT_SIM": "on"}, True, "nvcc not found: sm_90a kernels skipped"),
        ({"AAPT_SIM": "auto"}, False, "AAPT_SIM: expected on or off, got 'auto'"),
    ],
)
def test_build_without_nvcc(switches, succeeds, message, tmp_path):
    cmake = pytest.importorskip("cmake")
    environment = {**switches, "PATH": "/usr/bin:/bin"}
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


@pytest.mark.parametrize(
    ("library", "namespace", "key", "other"),
    [(LIBRARY, "aapt_sm90", "CUDA", "CPU"), (SIMULATOR, "aapt_sim", "CPU", "CUDA")],
)
def test_kernels_are_registered_for_one_kind_of_device(library, namespace, key, other):
    if library.exists():
        torch.ops.load_library(library)
    if not hasattr(getattr(torch.ops, namespace), "kv_append"):
        pytest.skip(f"this build has no {namespace} kernels")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"{namespace}::kv_append", key)
    assert not has_kernel(f"{namespace}::kv_append", other)
