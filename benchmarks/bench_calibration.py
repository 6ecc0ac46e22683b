"""The simulator against the chip: the same kernels, the same inputs, the same bits.

The kernels are the simulator's own (tests/sim/kernels), one shared library of C functions, built
with nvcc and with g++. Small integers make every product and sum exact, so that a difference is
one of meaning (swizzle, descriptor, fragment layout), not of rounding; float64 is the judge of
both. A dry run checks the simulator's side alone.
"""

import ctypes
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "tests" / "sim" / "kernels"
SIMULATOR = ROOT / "csrc" / "sim"
BUILD = ROOT / "build" / "calibration"
ATTENTION_TOLERANCE = 1e-2  # relative L2, of BF16 probabilities

pytestmark = pytest.mark.skipif(not KERNELS.exists(), reason="no kernels of the simulator")


@pytest.fixture(autouse=True)
def not_in_make_bench(mode):
    if mode == "cpu":
        pytest.skip("it times nothing")


@cache
def library(device: str) -> ctypes.CDLL:
    """The kernels for `cuda`, or for `cpu` with the simulator. RuntimeError where they do not
    compile, with the compiler's words."""
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / f"libcalibration_{device}.so"
    sources = sorted(map(str, KERNELS.glob("*.cu")))
    if device == "cuda":
        target = "-gencode=arch=compute_90a,code=sm_90a"
        compile_(["nvcc", target, "-Xcompiler=-fPIC", "-shared", *sources], path)
        return ctypes.CDLL(str(path))
    flags = ["-fPIC", "-fvisibility=hidden", "-g"]
    instrumented = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
    objects = []
    for source in sources:
        objects.append(BUILD / f"{Path(source).stem}.o")
        compile_(["g++", *flags, *instrumented, "-c", "-x", "c++", source], objects[-1])
    # libtsan is not linked: the simulator defines what the instrumented code calls.
    rest = [p for p in sorted(SIMULATOR.glob("*.cpp")) if p.name != "module.cpp"]
    rest += [*sorted(KERNELS.glob("*.cpp")), *objects]
    compile_(["g++", *flags, "-shared", *map(str, rest)], path)
    return ctypes.CDLL(str(path))


def compile_(command: list[str], output: Path) -> None:
    command = [*command, "-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-1500:]}")


def call(device: str, name: str, *arguments) -> None:
    """Run one C function: tensors as pointers, and the default stream last."""
    kernels = library(device)
    tensors = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
    if device == "cpu":
        kernels.set_options(0, 2, 2, 1)  # completions as late as may be, races reported
        for x in tensors:
            if isinstance(x, torch.Tensor):
                kernels.allow(ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(x.nbytes))
    function = getattr(kernels, name)
    function.restype = ctypes.c_char_p
    error = function(*map(as_c, tensors), ctypes.c_void_p(None))
    if device == "cpu":
        kernels.forget()
    assert not error, f"{device}: {error.decode()}"
    for given, used in zip(arguments, tensors):
        if isinstance(given, torch.Tensor):
            given.copy_(used)  # waits for the device


def as_c(x):
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int(x)


def integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-4, 5, shape).to(dtype)


def run(mode: str, name: str, arguments: tuple, output: torch.Tensor, *rest) -> dict:
    """The output of the simulator and, on a GPU, of the chip."""
    outputs = {}
    for device in ("cpu", "cuda") if mode == "cuda" else ("cpu",):
        outputs[device] = torch.full_like(output, torch.nan)
        call(device, name, *arguments, outputs[device], *rest)
    return outputs


def check_bits(outputs: dict, expected: torch.Tensor, record_property) -> None:
    wrong = {
        {"cpu": "simulator", "cuda": "chip"}[device]: int((out != expected.float()).sum())
        for device, out in outputs.items()
    }
    words = ", ".join(f"{name}: {count} wrong" for name, count in wrong.items())
    record_property("result", {"wrong": wrong, "of": expected.numel(), "summary": words})
    assert not any(wrong.values()), f"of {expected.numel()} sums, {words}"


@pytest.mark.parametrize(("ta", "tb"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize(("n", "swizzle"), [(64, 0), (64, 1), (64, 2), (64, 3), (192, 3)])
def test_descriptors(mode, record_property, n, swizzle, ta, tb):
    """Every swizzle (0: none, 1, 2, 3: 32, 64, 128 bytes), operands K-major or MN-major."""
    a, b = integers(64, 64, dtype=torch.bfloat16), integers(n, 64, dtype=torch.bfloat16)
    stored = (a.t().contiguous() if ta else a, b.t().contiguous() if tb else b)
    arguments = (n, swizzle, ta, tb, *stored)
    outputs = run(mode, "run_multiply", arguments, torch.empty(64, n))
    check_bits(outputs, a.double() @ b.double().t(), record_property)


@pytest.mark.parametrize(("width", "first"), [(8, 0), (10, 1), (10, 12), (13, 7), (9, 57)])
def test_descriptors_of_a_halo_tile(mode, record_property, width, first):
    """Start anywhere in a swizzle pattern, groups of rows any distance apart: causal_conv3d."""
    a, b = integers(64, 64, dtype=torch.bfloat16), integers(128, 64, dtype=torch.bfloat16)
    outputs = run(mode, "run_multiply_halo", (width, first, a, b), torch.empty(64, 64))
    pixels = first + width * torch.arange(8)[:, None] + torch.arange(8)
    check_bits(outputs, a.double() @ b.double()[pixels.flatten()].t(), record_property)


@pytest.mark.parametrize("e4m3", [0, 1])
@pytest.mark.parametrize("n", [8, 16, 32, 64, 96, 128, 160, 176, 192, 224, 256])
def test_fragments(mode, record_property, n, e4m3):
    """A from registers, every width."""
    depth, dtype = (32, torch.float8_e4m3fn) if e4m3 else (16, torch.bfloat16)
    a, b = integers(64, depth, dtype=dtype), integers(n, depth, dtype=dtype)
    outputs = run(mode, "run_multiply_registers", (n, e4m3, a, b), torch.empty(64, n))
    check_bits(outputs, a.double() @ b.double().t(), record_property)


def test_fp8_pipeline(mode, record_property):
    """Four stages, two roles, scales along K that are powers of two."""
    m, n, k = 100, 200, 512
    a, b = (integers(rows, k, dtype=torch.float8_e4m3fn) for rows in (m, n))
    a_scale = 2.0 ** torch.randint(-2, 3, (m, k // 128))
    b_scale = 2.0 ** torch.randint(-2, 3, (k // 128,))
    outputs = run(mode, "run_gemm_e4m3", (a, b, a_scale, b_scale), torch.empty(m, n), m, n, k)
    scaled = a.double().unflatten(1, (-1, 128)) * (a_scale * b_scale)[:, :, None]
    check_bits(outputs, scaled.flatten(1) @ b.double().t(), record_property)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_pipeline(mode, record_property, head_dim):
    """The whole producer and consumer pipeline, on real numbers: close, not equal."""
    heads, queries, keys = 2, 200, 300
    q, k, v = (torch.randn(heads, length, head_dim).bfloat16() for length in (queries, keys, keys))
    scale = head_dim**-0.5
    expected = torch.softmax(scale * q.double() @ k.double().mT, -1) @ v.double()
    differences = {}
    for device in ("cpu", "cuda") if mode == "cuda" else ("cpu",):
        out, lse = torch.full_like(q, torch.nan), torch.full((heads, queries), torch.nan)
        sizes = (heads, queries, keys, scale, 0)
        call(device, "run_attention", head_dim, q, k, v, out, lse, *sizes)
        differences[device] = float((out.double() - expected).norm() / expected.norm())
    words = ", ".join(f"{device} {value:.2g}" for device, value in differences.items())
    record_property("result", {"differences": differences, "summary": words})
    assert all(value <= ATTENTION_TOLERANCE for value in differences.values()), words
