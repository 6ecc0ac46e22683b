"""The meaning of descriptors, swizzles and fragments on the chip; in a dry run, in the simulator.

The kernels are the simulator's own (tests/sim/kernels), built as shared libraries of C functions
with nvcc for a chip and with g++ for the simulator. Small integers make every product and every sum
exact, so a difference from float64 is a difference of meaning (swizzle, descriptor, fragment
layout) and never of rounding. The rounding of FP8 sums has cases of its own, against
`tensor_core_model`. Chip and simulator therefore need not run on one machine.
"""

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from .tensor_core_model import ADDITIONS, promoted

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
def library(source: str, device: torch.device) -> ctypes.CDLL:
    """Compile tests/sim/kernels/<source>.cu for the device, with the simulator for a CPU.

    An existing library newer than every source is kept: a process that replaces one that hung must
    not compile again. RuntimeError, with the compiler's words, if it does not compile.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / f"lib{source}_{device.type}.so"
    folders = (KERNELS, SIMULATOR, SIMULATOR.parent / "hopper")
    newest = max(file.stat().st_mtime for folder in folders for file in folder.iterdir())
    if path.exists() and path.stat().st_mtime > newest:
        return ctypes.CDLL(str(path))
    kernels = str(KERNELS / f"{source}.cu")
    if device.type == "cuda":
        target = "-gencode=arch=compute_90a,code=sm_90a"
        compile_(["nvcc", target, "-Xcompiler=-fPIC", "-shared", kernels], path)
        return ctypes.CDLL(str(path))
    flags = ["-fPIC", "-fvisibility=hidden", "-g"]
    instrumented = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
    compiled = BUILD / f"{source}.o"
    compile_(["g++", *flags, *instrumented, "-c", "-x", "c++", kernels], compiled)
    # libtsan is not linked: the simulator defines what the instrumented code calls.
    rest = [p for p in sorted(SIMULATOR.glob("*.cpp")) if p.name != "module.cpp"]
    rest += [*sorted(KERNELS.glob("*.cpp")), compiled]
    # -Bsymbolic: each library has a simulator of its own
    compile_(["g++", *flags, "-shared", "-Wl,-Bsymbolic", *map(str, rest)], path)
    return ctypes.CDLL(str(path))


def compile_(command: list[str], output: Path) -> None:
    part = output.with_suffix(".part" + output.suffix)
    command = [*command, "-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-1500:]}")
    os.replace(part, output)


def run(device: torch.device, source: str, name: str, *arguments) -> None:
    """Call one C function. Tensors go as pointers on the device and come back changed in place."""
    kernels = library(source, device)
    tensors = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
    simulated = device.type == "cpu"
    if simulated:
        kernels.set_options(0, 2, 2, 1)  # completions as late as may be, races reported
        for x in tensors:
            if isinstance(x, torch.Tensor):
                kernels.allow(ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(x.nbytes))
    function = getattr(kernels, name)
    function.restype = ctypes.c_char_p
    error = function(*map(as_c, tensors), ctypes.c_void_p(None))  # on the default stream
    if simulated:
        kernels.forget()
    assert not error, error.decode()
    for given, used in zip(arguments, tensors):
        if isinstance(given, torch.Tensor):
            given.copy_(used)  # waits for the device


def as_c(x):
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int(x)


def integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-4, 5, shape).to(dtype)


@pytest.fixture
def check_bits(device, record_property):
    """check_bits(name, arguments, expected, *rest): every sum of the function's output is exact."""

    def check(name: str, arguments: tuple, expected: torch.Tensor, *rest) -> None:
        out = torch.full(expected.shape, torch.nan)
        run(device, "matrix", name, *arguments, out, *rest)
        wrong = int((out != expected.float()).sum())
        words = f"{wrong} of {expected.numel()} sums are wrong"
        record_property("result", {"wrong": wrong, "of": expected.numel(), "summary": words})
        assert not wrong, words

    return check


@pytest.mark.patience(90)
@pytest.mark.parametrize("source", ["matrix", "attention"])
def test_the_kernels_compile(device, source):
    """First, so that a case that hangs is not taken for one that compiles."""
    assert library(source, device)


# n, rows, width, first pixel: width 10 and n = 256 are a slab of causal_conv3d, whose nine taps
# begin at pixels 0 to 22 of it, wherever in a swizzle pattern of 8 rows that is.
HALO = [(64, 16, 8, 0), (64, 13, 10, 1), (64, 13, 10, 12), (64, 9, 13, 7), (64, 15, 9, 57)]
HALO += [(256, 34, 10, first) for first in range(23)]


@pytest.mark.parametrize(("n", "rows", "width", "first"), HALO)
def test_descriptors_of_a_halo_tile(check_bits, n, rows, width, first):
    """Descriptors start inside a swizzle pattern, groups of 8 rows lie any distance apart."""
    a, b = (integers(size, 128, dtype=torch.bfloat16) for size in (64, rows * width))
    pixels = first + width * torch.arange(n // 8)[:, None] + torch.arange(8)
    expected = a.double() @ b.double()[pixels.flatten()].t()
    check_bits("run_multiply_halo", (n, rows, width, first, a, b), expected)


@pytest.mark.parametrize(("ta", "tb"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize(("n", "swizzle"), [(64, 0), (64, 1), (64, 2), (64, 3), (80, 1), (192, 3)])
def test_descriptors(check_bits, n, swizzle, ta, tb):
    """Every swizzle (0: none; 1, 2, 3: 32, 64, 128 bytes), operands K-major or MN-major."""
    a, b = integers(64, 64, dtype=torch.bfloat16), integers(n, 64, dtype=torch.bfloat16)
    stored = (a.t().contiguous() if ta else a, b.t().contiguous() if tb else b)
    check_bits("run_multiply", (n, swizzle, ta, tb, *stored), a.double() @ b.double().t())


@pytest.mark.parametrize("e4m3", [0, 1])
@pytest.mark.parametrize("n", [8, 16, 32, 64, 80, 96, 128, 160, 176, 192, 224, 256])
def test_fragments(check_bits, n, e4m3):
    """Operand A from registers, every width of B."""
    depth, dtype = (32, torch.float8_e4m3fn) if e4m3 else (16, torch.bfloat16)
    a, b = integers(64, depth, dtype=dtype), integers(n, depth, dtype=dtype)
    check_bits("run_multiply_registers", (n, e4m3, a, b), a.double() @ b.double().t())


def test_fp8_pipeline(check_bits):
    """Four stages, two roles, scales along K that are powers of two."""
    m, n, k = 100, 200, 512
    a, b = (integers(rows, k, dtype=torch.float8_e4m3fn) for rows in (m, n))
    a_scale = 2.0 ** torch.randint(-2, 3, (m, k // 128))
    b_scale = 2.0 ** torch.randint(-2, 3, (k // 128,))
    scaled = a.double().unflatten(1, (-1, 128)) * (a_scale * b_scale)[:, :, None]
    expected = scaled.flatten(1) @ b.double().t()
    check_bits("run_gemm_e4m3", (a, b, a_scale, b_scale), expected, m, n, k, 1)


@pytest.mark.parametrize(("first", "other", "total"), ADDITIONS)
def test_fp8_adder(check_bits, first, other, total):
    """`tensor_core_model` says what 31 products 13 or 14 bits smaller than the first add to it."""
    a, b = torch.full((64, 32), 2.0**-6), torch.full((8, 32), other)
    a[:, 5] = b[:, 5] = first
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    check_bits("run_multiply_registers", (8, 1, a, b), torch.full((64, 8), total))


@pytest.mark.parametrize("interval", [1, 8])
def test_fp8_promotion(check_bits, interval):
    """Positive values, promoted to float32 every `interval` blocks of 128 along K."""
    m, n, k = 64, 128, 1024
    a, b = (torch.rand(rows, k).add(0.5).to(torch.float8_e4m3fn) for rows in (m, n))
    scales = torch.ones(m, k // 128), torch.ones(k // 128)
    expected = promoted(a.double().numpy(), b.double().numpy(), 128 * interval)
    sizes = (m, n, k, interval)
    check_bits("run_gemm_e4m3", (a, b, *scales), torch.from_numpy(expected), *sizes)


@pytest.mark.parametrize("first", [0, 16, 48])
def test_fp8_chain(check_bits, first):
    """Two products without a shuffle: a tensor map of five dimensions, with strides that do not
    grow, permutes the keys."""
    q, k, v = (
        torch.eye(128)[:64],
        torch.randint(-7, 8, (192, 128)),
        torch.randint(-4, 5, (128, 192)),
    )
    seen = slice(first, first + 128)
    expected = q.double() @ k[seen].double().t() @ v[:, seen].double().t()
    stored = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
    check_bits("run_chain_e4m3", tuple(stored), expected, 192, first)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_pipeline(device, record_property, head_dim):
    """The whole producer and consumer pipeline, on real numbers: close, not equal."""
    heads, queries, keys = 2, 200, 300
    q, k, v = (torch.randn(heads, length, head_dim).bfloat16() for length in (queries, keys, keys))
    scale = head_dim**-0.5
    expected = torch.softmax(scale * q.double() @ k.double().mT, -1) @ v.double()
    out, lse = torch.full_like(q, torch.nan), torch.full((heads, queries), torch.nan)
    sizes = (heads, queries, keys, scale, 0)
    run(device, "attention", "run_attention", head_dim, q, k, v, out, lse, *sizes)
    difference = float((out.double() - expected).norm() / expected.norm())
    words = f"relative difference {difference:.2g}"
    record_property("result", {"difference": difference, "summary": words})
    assert difference <= ATTENTION_TOLERANCE, words
