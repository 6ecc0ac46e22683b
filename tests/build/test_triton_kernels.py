"""The machine code of every Triton kernel, compiled ahead of time for sm_80 to sm_120: no spill, in
the shared memory of the device, tensor cores where there is a matrix product, 16-byte accesses
where memory is the limit."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from cubin import find_cuobjdump, find_failures, format_table  # noqa: E402

if find_cuobjdump() is None:
    pytest.skip("this Triton wheel has no cuobjdump", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton_gate import (  # noqa: E402
    SHARED_BYTES,
    compile_ahead,
    find_oversized,
    launch_signature,
)

from aapt_kernels.block_causal_attention import triton_backward as training_backward  # noqa: E402
from aapt_kernels.block_causal_attention import triton_kernels as training  # noqa: E402
from aapt_kernels.cached_attention import triton_kernels as attention  # noqa: E402
from aapt_kernels.causal_conv3d import triton_kernels as convolution  # noqa: E402
from aapt_kernels.kv_append import triton_kernels as append  # noqa: E402
from aapt_kernels.qk_norm_rope import triton_kernels as norm_rope  # noqa: E402

SLOW = pytest.mark.slow
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
FLOAT32 = ("q_weight", "k_weight", "cos", "sin", "cos_sink", "sin_sink", "dq_weight", "dk_weight")
FLOAT32 += ("weight_scale", "k_scale", "v_scale", "lse", "parts", "part_lses", "dlse", "stats")
POINTERS = ("q", "k", "v", "k_cache", "v_cache", "q_sink", "q_out", "k_out", "q_sink_out", "out")
POINTERS += ("x", "past", "weight", "norm_weight", "bias", "residual", "next_norm_weight", "active")
POINTERS += ("dq", "dk", "dq_sink", "dq_out", "dk_out", "dv", "dout")


def build(kernel, dtype, constants, capability, num_warps=4, num_stages=3, divisible=(), others=()):
    """others: types of pointers, by name, beside those of `dtype` and float32."""
    types = dict.fromkeys(POINTERS, TYPES[dtype]) | dict.fromkeys(FLOAT32, "*fp32")
    types |= dict(others)
    types |= {"step": "*i64", "text_lens": "*i64", "scale": "fp32"}
    signature = launch_signature(kernel, types, constants)
    compiled = compile_ahead(
        kernel,
        signature,
        constants,
        capability=capability,
        num_warps=num_warps,
        num_stages=num_stages,
        divisible=[n for n in signature if n in divisible or n.endswith("_stride")],
    )
    print(f"sm_{capability}, {dtype}, {num_warps} warps, {constants}\n{format_table(compiled)}")
    assert find_oversized(compiled, capability) == []
    return compiled


# Of these capabilities the fast tests compile every kernel, of the others the slow ones
USUAL = (80, 90)


def product_of(capability: int, rows: int) -> str:
    """The opcode of a product: a warpgroup, or on sm_100 a block, multiplies 64 rows or more."""
    return {90: "HGMMA", 100: "UTCHMMA"}.get(capability, "HMMA") if rows >= 64 else "HMMA"


def copies_16_bytes(kernels) -> bool:
    """True if tiles come in asynchronously, 16 bytes at a time, past the L1 cache."""
    copies = {x.opcode for x in kernels[0].sass if x.opcode.startswith("LDGSTS.E.BYPASS")}
    return any(opcode.endswith(".128") for opcode in copies)


# Bytes of a stack frame that are allowed: two registers for sm_86 and sm_89; eight for sm_100,
# where ptxas caps kernels at 80 or 128 registers, and for float32 attention on sm_120
FRAMES_LEFT = {86: 8, 89: 8, 100: 32, 120: 32}


def forgive(kernels, capability: int):
    for kernel in kernels:
        if kernel.stack <= FRAMES_LEFT.get(capability, 0):
            kernel.stack = 0
    return kernels


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("heads", "across", "sink"),
    [
        (24, False, True),
        (40, True, False),
        pytest.param(24, False, False, marks=SLOW),
        pytest.param(12, True, False, marks=SLOW),
        pytest.param(24, True, True, marks=SLOW),
    ],
)
@pytest.mark.parametrize(
    "kernel",
    [
        norm_rope.qk_norm_rope_kernel,
        norm_rope.qk_norm_rope_backward_kernel,
        append.kv_append_kernel,
    ],
    ids=lambda kernel: kernel.__name__,
)
def test_memory_bound_kernels_move_16_bytes_per_access(kernel, heads, across, sink, capability):
    q = torch.empty(1, 1196, heads, 128, dtype=torch.bfloat16)
    weight = torch.empty(*[heads] * across, 128)
    _, constants = norm_rope.tiling(q, weight, 1e-6)
    num_warps = constants.pop("num_warps")
    if not sink:
        optional = {"cos_sink", "sin_sink", "dq_sink"}
        constants |= dict.fromkeys(optional & set(kernel.arg_names))
    if kernel is append.kv_append_kernel:
        constants |= dict(k_scale=None, v_scale=None, KEYS=append.KEYS, HADAMARD=False)
    (compiled,) = build(kernel, q.dtype, constants, capability, num_warps)
    assert find_failures([compiled], {}) == []
    counters = "step" in kernel.arg_names
    assert compiled.count("LDG") == compiled.count("LDG.E.128") + counters
    assert compiled.count("STG.E.128") >= 4 + 2 * sink * ("q_sink_out" in kernel.arg_names)


@pytest.mark.parametrize(
    ("heads", "across", "capability"),
    [(24, False, 90), (40, True, 90), (24, False, 89), (12, True, 89)],  # 40 heads spill on sm_89
)
def test_appending_to_float8_multiplies_by_the_hadamard_matrix(heads, across, capability):
    """The matrix on tensor cores, conversions by the instruction; no spills."""
    kernel = append.kv_append_kernel
    q = torch.empty(1, 1196, heads, 128, dtype=torch.bfloat16)
    _, constants = norm_rope.tiling(q, torch.empty(*[heads] * across, 128), 1e-6)
    num_warps = constants.pop("num_warps")
    constants |= dict(KEYS=append.KEYS, HADAMARD=True)
    (compiled,) = build(
        kernel,
        q.dtype,
        constants,
        capability,
        num_warps,
        others=dict.fromkeys(("k_cache", "v_cache"), "*fp8e4nv"),
    )
    assert find_failures([compiled], {}) == []
    assert compiled.count("HMMA") + compiled.count("HGMMA") > 0
    assert compiled.count("F2FP") > 0
    assert compiled.count("STG.E.128") >= 4


def attention_cases():
    """Every configuration with q_sink; BF16 with long queries without as well."""
    cases = {}
    for capability, shared in SHARED_BYTES.items():
        for element_size, width in attention.CONFIGS:
            if element_size == 1:  # float8, below
                continue
            dtype = {2: torch.bfloat16, 4: torch.float32}[element_size]
            for queries in (1000, 64, 16):
                config = attention.choose_config(element_size, width, queries, shared)
                usual = element_size == 2 and width >= 64 and queries == 1000
                marks = [] if usual and capability in USUAL else SLOW
                for sink in (True, False)[: 1 + usual]:
                    case = dtype, width, config, sink, capability
                    cases[case] = pytest.param(*case, marks=marks)
    return list(cases.values())


def test_a_small_device_gets_fewer_rows_and_stages():
    """128 rows would spill registers there."""
    several, few, _ = attention.CONFIGS[2, 128]
    assert attention.choose_config(2, 128, 1000, SHARED_BYTES[90]) == several
    small = attention.choose_config(2, 128, 1000, SHARED_BYTES[86])
    assert small == few._replace(stages=2) and small.rows < several.rows


@pytest.mark.parametrize(("dtype", "width", "config", "sink", "capability"), attention_cases())
def test_attention_uses_tensor_cores(dtype, width, config, sink, capability):
    constants = {"HEAD_DIM": width, "WIDTH": width, "ROWS": config.rows, "KEYS": config.keys}
    constants |= {"k_scale": None, "v_scale": None}
    if not sink:
        constants["q_sink"] = None
    compiled = build(
        attention.cached_attention_kernel, dtype, constants, capability, config.warps, config.stages
    )
    product = product_of(capability, config.rows)
    failures = find_failures(forgive(compiled, capability), {"cached_attention": (product,)})
    assert failures == [] and copies_16_bytes(compiled)


@pytest.mark.parametrize(
    ("width", "queries", "capability"),
    [
        (128, 1000, 89),  # sm_90 has a kernel of its own
        (64, 1000, 90),
        pytest.param(32, 1000, 90, marks=SLOW),
        pytest.param(64, 1000, 89, marks=SLOW),
        pytest.param(128, 64, 89, marks=SLOW),
        pytest.param(128, 16, 89, marks=SLOW),
        pytest.param(128, 1000, 120, marks=SLOW),
    ],
)
def test_attention_to_float8_multiplies_float8(width, queries, capability):
    config = attention.choose_config(1, width, queries, SHARED_BYTES[capability])
    compiled = build(
        attention.cached_attention_kernel,
        torch.bfloat16,
        {"HEAD_DIM": width, "WIDTH": width, "ROWS": config.rows, "KEYS": config.keys},
        capability,
        config.warps,
        config.stages,
        others=dict.fromkeys(("k_cache", "v_cache"), "*u8"),
    )
    product = "QGMMA" if capability == 90 else "QMMA"
    failures = find_failures(forgive(compiled, capability), {"cached_attention": (product, "F2FP")})
    assert failures == [] and copies_16_bytes(compiled)


@pytest.mark.parametrize("capability", [80, 90])
def test_merging_the_splits(capability):
    constants = {"HEAD_DIM": 128, "WIDTH": 128, "ROWS": attention.MERGE_ROWS, "SPLITS": 8}
    compiled = build(attention.merge_kernel, torch.bfloat16, constants, capability)
    assert find_failures(compiled, {"merge_kernel": ("LDG.E.128", "STG.E.128")}) == []


def convolution_cases():
    """Every size of blocks, with the next norm where it fits; one upsampled."""
    sizes = [((64, 64), 1), ((512, 256), 2), ((16, 3), 1), ((128, 128), 1), ((96, 32), 1)]
    for capability in SHARED_BYTES:
        for dtype in TYPES:
            for i, (channels, copies) in enumerate(sizes):
                usual = capability in USUAL and dtype == torch.bfloat16 and i < 2
                # The largest blocks in float32, where there is least shared memory
                usual = usual or (capability, dtype, i) == (86, torch.float32, 3)
                case = channels, copies, dtype, capability
                yield pytest.param(*case, marks=[] if usual else SLOW)


@pytest.mark.parametrize(("channels", "copies", "dtype", "capability"), list(convolution_cases()))
def test_convolution_uses_tensor_cores(channels, copies, dtype, capability):
    constants, compiled = build_convolution(channels, copies, dtype, capability)
    product = product_of(capability, constants["BLOCK_PIXELS"])
    assert find_failures(forgive(compiled, capability), {"causal_conv3d": (product,)}) == []
    assert copies_16_bytes(compiled)


@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize(("channels", "copies"), [((64, 64), 1), ((512, 256), 2)])
def test_convolution_in_8_bits_multiplies_e4m3(channels, copies, capability):
    """QGMMA on sm_90, and on sm_89 the products of 32 e4m3 numbers; no spills."""
    float8 = ("x", "past", "weight")
    _, compiled = build_convolution(channels, copies, torch.bfloat16, capability, float8)
    product = {89: "QMMA", 90: "QGMMA"}[capability]
    assert find_failures(forgive(compiled, capability), {"causal_conv3d": (product,)}) == []
    assert copies_16_bytes(compiled)


def build_convolution(channels, copies, dtype, capability, float8=()):
    inner, outer = channels
    multiplied = torch.float8_e4m3fn if float8 else dtype
    constants = convolution.blocks_of(outer, inner, multiplied)
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    kernel = {name: 3 for name in ("KT", "KH", "KW")}
    strides = {name: 1 for name in ("TIME_STRIDE", "ROW_STRIDE", "COLUMN_STRIDE")}
    last = {name: 1 for name in ("x_channel_stride", "past_channel_stride", "out_channel_stride")}
    options = {
        "REPEATS": copies,
        "COPIES": copies,
        "REPLICATE": False,
        "PIXELS": False,
        "EPS": 1e-6,
        "LARGEST": convolution.LARGEST if float8 else None,
    }
    if not float8:
        options["weight_scale"] = None
    if outer > constants["BLOCK_OUT"]:  # else the next norm is in it
        options |= {"next_norm_weight": None, "active": None}
    compiled = build(
        convolution.causal_conv3d_kernel,
        dtype,
        constants | kernel | strides | last | options,
        capability,
        warps,
        stages,
        divisible=("in_channels", "out_channels", "row_stride", "column_stride"),
        others=dict.fromkeys(float8, "*fp8e4nv") | ({"active": "*u8"} if float8 else {}),
    )
    return constants, compiled


@pytest.mark.parametrize("capability", [80, 90])
def test_activation_moves_16_bytes_per_access(capability):
    constants = {"CHANNELS": 128, "WIDTH": 128, "ROWS": convolution.ROWS, "EPS": 1e-6}
    constants |= {"SILU": True, "channel_stride": 1, "LARGEST": None}
    compiled = build(
        convolution.activate_kernel,
        torch.bfloat16,
        constants,
        capability,
        divisible=("row_stride", "column_stride"),
    )
    assert find_failures(compiled, {"activate_kernel": ("LDG.E.128", "STG.E.128")}) == []


def training_cases():
    """Forward, gradient of queries, gradients of keys: for sm_80 and 90 BF16 with 128 per head, for
    sm_80 the largest; others are slow."""
    kernels = (
        training.block_causal_attention_kernel,
        training_backward.queries_backward_kernel,
        training_backward.keys_backward_kernel,
    )
    for capability in SHARED_BYTES:
        wide = capability // 10 in training.WIDE_CAPABILITIES
        table = training.WIDE_CONFIGS if wide else training.CONFIGS
        for (element_size, width), configs in table.items():
            dtype = {2: torch.bfloat16, 4: torch.float32}[element_size]
            for kernel, config in zip(kernels, configs, strict=True):
                usual = (element_size, width) == (2, 128) and capability in USUAL
                usual = usual and (capability == 90 or kernel is kernels[-1])
                case = (kernel, capability, dtype, width, config)
                yield pytest.param(*case, marks=[] if usual else SLOW, id=kernel.__name__)


@pytest.mark.parametrize(
    ("kernel", "capability", "dtype", "width", "config"), list(training_cases())
)
def test_training_attention_uses_tensor_cores(kernel, capability, dtype, width, config):
    constants = {"HEAD_DIM": width, "WIDTH": width, "ROWS": config.rows, "KEYS": config.keys}
    if "PREFIX_GRAD" in kernel.arg_names:
        constants["PREFIX_GRAD"] = False
    compiled = build(kernel, dtype, constants, capability, config.warps, config.stages)
    product = product_of(capability, max(config.rows, config.keys))
    assert find_failures(forgive(compiled, capability), {kernel.__name__: (product,)}) == []


@pytest.mark.parametrize("capability", [80, 90])
def test_statistics_of_the_training_backward(capability):
    constants = {"HEAD_DIM": 128, "WIDTH": 128, "ROWS": training.STATS_ROWS}
    compiled = build(training_backward.stats_kernel, torch.bfloat16, constants, capability)
    assert find_failures(compiled, {"stats_kernel": ("LDG.E.128",)}) == []


def test_every_kernel_of_the_package_is_here():
    folder = Path(attention.__file__).parents[1]
    found = {path.parent.name for path in folder.glob("*/triton_kernels.py")}
    ops = ("block_causal_attention", "cached_attention", "causal_conv3d")
    fused = ("modulated_norm", "bias_gelu", "quantise_rows")  # in test_triton_fused.py
    assert found == {*ops, *fused, "kv_append", "qk_norm_rope"}
