"""The ahead-of-time gate for Triton kernels, on fixtures whose machine code is known."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("triton")

from cubin import Kernel, find_cuobjdump, find_failures  # noqa: E402

if find_cuobjdump() is None:
    pytest.skip("this Triton wheel has no cuobjdump", allow_module_level=True)

from triton_gate import SHARED_BYTES, compile_ahead, find_oversized  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures" / "triton_kernels.py"
TILE = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}


def load_fixtures(interpret: str, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    spec = importlib.util.spec_from_file_location("triton_fixtures", FIXTURES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernels(monkeypatch):
    return load_fixtures("0", monkeypatch)


@pytest.mark.parametrize(("capability", "opcode"), [(80, "HMMA"), (90, "HGMMA")])
def test_clean_kernel_passes(kernels, capability, opcode):
    compiled = compile_ahead(kernels.matmul_tile, TILE, {"BLOCK": 64}, capability=capability)
    assert [kernel.name for kernel in compiled] == ["matmul_tile"]
    assert compiled[0].registers > 0 and compiled[0].count(opcode) > 0
    assert find_failures(compiled, {"matmul_tile": (opcode,)}) == []


def test_missing_instruction_fails(kernels):
    compiled = compile_ahead(kernels.matmul_tile, TILE, {"BLOCK": 64}, capability=80)
    assert find_failures(compiled, {"matmul_tile": ("HGMMA",)}) == [
        "matmul_tile: no HGMMA in its SASS"
    ]


def test_spilling_kernel_fails(kernels):
    signature = {"x": "*fp32", "out": "*fp32"}
    compiled = compile_ahead(
        kernels.center_row, signature, {"WIDTH": 8192}, capability=90, num_warps=1
    )
    (failure,) = find_failures(compiled, {})
    assert failure.startswith("center_row: has a stack frame of")


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_a_block_has_the_shared_memory_of_its_device(capability):
    most = SHARED_BYTES[capability]
    fits, larger = Kernel("k", shared=most), Kernel("k", shared=most + 1)
    assert find_oversized([fits], capability) == []
    (failure,) = find_oversized([fits, larger], capability)
    assert failure == (f"k: takes {most + 1} bytes of shared memory, sm_{capability} has {most}")


def test_interpreted_kernel_is_refused(monkeypatch):
    module = load_fixtures("1", monkeypatch)
    with pytest.raises(TypeError, match="kernel: expected a compiled triton.jit function"):
        compile_ahead(module.matmul_tile, TILE, {"BLOCK": 64}, capability=90)
