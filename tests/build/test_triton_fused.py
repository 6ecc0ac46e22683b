"""The machine code of the kernels between a block's products, for every kind of GPU that Triton
serves: no spill, shared memory that fits, 16-byte accesses."""

import os

import pytest
import torch

pytest.importorskip("triton")

from cubin import find_cuobjdump, find_failures, format_table  # noqa: E402

if find_cuobjdump() is None:
    pytest.skip("this Triton wheel has no cuobjdump", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton_gate import compile_ahead, launch_signature  # noqa: E402

from aapt_kernels.bias_gelu import triton_kernels as gelu  # noqa: E402
from aapt_kernels.modulated_norm import triton_kernels as norm  # noqa: E402
from aapt_kernels.quantise_rows import triton_kernels as quantise  # noqa: E402

# Shared memory that one block can have, in bytes, by compute capability
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
CAPABILITIES = [pytest.param(c, marks=[] if c == 90 else pytest.mark.slow) for c in SHARED]
COUNTS = ("rows", "length", "group_length", "splits")
MODULATION = ("shift", "scale", "shift_sums", "scale_sums")
AFFINE = ("weight", "bias", "weight_sums", "bias_sums")
UPDATE = ("update", "gate", "dresidual", "dupdate", "gate_sums")


def build(kernel, types, constants, capability):
    constants = dict(constants)
    num_warps = constants.pop("num_warps")
    signature = launch_signature(kernel, types, constants)
    (compiled,) = compile_ahead(
        kernel,
        signature,
        constants,
        capability=capability,
        num_warps=num_warps,
        divisible=[name for name in signature if name.endswith("_stride")],
    )
    print(f"sm_{capability}, {num_warps} warps, {constants}\n{format_table([compiled])}")
    assert find_failures([compiled], {}) == []
    assert compiled.shared <= SHARED[capability]
    return compiled


def pointers(kernel, dtype):
    """Rows in `dtype`, sums and an affine norm in float32."""
    wide = {"weight", "bias"} if kernel.__name__.startswith("modulated") else set()
    return {
        name: "*fp32" if name.endswith("sums") or name in wide else dtype
        for name in kernel.arg_names
        if name not in COUNTS and not name.endswith("_stride")
    }


ROUNDED = ("scales", "NORMED", "GROUP", "LARGEST", "SMALLEST")  # None where nothing is rounded
# What a call leaves out: a gated update with the next norm, an affine norm after one, a first norm
CALLS = {"gated update": AFFINE, "affine norm": MODULATION, "first norm": (*AFFINE, *UPDATE)}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("width", "call"),
    [
        *((width, "gated update") for width in (192, 1536, 3072, 5120)),
        (1536, "affine norm"),
        (3072, "first norm"),
    ],
)
@pytest.mark.parametrize(
    "kernel",
    [norm.modulated_norm_kernel, norm.modulated_norm_backward_kernel],
    ids=lambda kernel: kernel.__name__,
)
def test_modulated_norm(kernel, width, call, capability):
    constants = norm.tiling(width, torch.bfloat16, 1e-6)
    constants |= dict.fromkeys({*CALLS[call], *ROUNDED} & set(kernel.arg_names))
    compiled = build(kernel, pointers(kernel, "*bf16"), constants, capability)
    rows = [x for x in ("dnormed", "dresidual", "x", "update") if x in kernel.arg_names]
    assert compiled.count("LDG.E.128") >= len(rows) - len(set(rows) & set(CALLS[call]))
    # A row of modulation of a narrow model is less than 16 bytes per thread
    assert width < 1536 or compiled.count("LDG") == compiled.count("LDG.E.128")
    assert compiled.count("STG.E.128") >= 1


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", [gelu.bias_gelu_kernel, gelu.bias_gelu_backward_kernel])
def test_bias_gelu(kernel, capability):
    constants = gelu.tiling(12288, torch.bfloat16)
    constants |= dict.fromkeys({*ROUNDED} & set(kernel.arg_names))
    compiled = build(kernel, pointers(kernel, "*bf16"), constants, capability)
    assert compiled.count("LDG") == compiled.count("LDG.E.128") + 1  # the bias, 8 bytes a thread
    assert compiled.count("STG.E.128") >= 1


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("width", [192, 1536, 3072, 5120])
def test_modulated_norm_that_rounds(width, capability):
    """No spill; codes are gathered, so that stores are 16 bytes wide, as reads are."""
    kernel = norm.modulated_norm_kernel
    constants = norm.tiling(width, torch.bfloat16, 1e-6)
    constants |= norm.rounding(constants["COLUMNS"], torch.bfloat16) | dict.fromkeys(AFFINE[:2])
    types = pointers(kernel, "*bf16") | {"normed": "*u8", "scales": "*fp32"}
    compiled = build(kernel, types, constants, capability)
    assert compiled.count("LDG.E.128") >= 2
    assert width < 1536 or compiled.count("LDG") == compiled.count("LDG.E.128")
    assert compiled.count("STG.E.128") >= 2  # the sum, and codes


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bias_gelu_that_rounds(capability):
    constants = gelu.tiling(12288, torch.bfloat16)
    constants |= quantise.grouping(constants["COLUMNS"])
    types = pointers(gelu.bias_gelu_kernel, "*bf16") | {"out": "*u8", "scales": "*fp32"}
    compiled = build(gelu.bias_gelu_kernel, types, constants, capability)
    assert compiled.count("LDG") == compiled.count("LDG.E.128") + 1
    assert compiled.count("STG.E.128") >= 1


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("width", [1792, 12288])
def test_quantise_rows(width, capability):
    types = {"x": "*bf16", "values": "*u8", "scales": "*fp32"}
    constants = quantise.tiling(width)
    compiled = build(quantise.quantise_rows_kernel, types, constants, capability)
    assert compiled.count("LDG") == compiled.count("LDG.E.128") > 0
    assert compiled.count("STG.E.128") > 0
