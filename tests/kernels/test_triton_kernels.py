"""The Triton kernels against float64: on a CUDA device, else under Triton's interpreter
(test_triton_interpreter.py starts that)."""

import pytest
import torch
from torch.library import opcheck

from aapt_kernels import (
    FrameLayout,
    KVCache,
    block_causal_attention,
    cached_attention,
    kv_append,
    qk_norm_rope,
    use_backend,
)
from aapt_kernels.backend import BackendError, interpreted
from aapt_kernels.block_causal_attention import ref as training
from aapt_kernels.cached_attention import ref as attention
from aapt_kernels.cached_attention import self_check
from aapt_kernels.qk_norm_rope import ref as norm_rope
from aapt_kernels.testing import assert_error_ratio

from .oracles import attend
from .past import Stream, relative

pytest.importorskip("triton")
if not (interpreted() or torch.cuda.is_available()):
    pytest.skip("test_triton_interpreter.py runs these", allow_module_level=True)

from aapt_kernels.cached_attention import triton_kernels as attention_kernels  # noqa: E402

pytestmark = pytest.mark.patience(45)  # Triton compiles
DEVICE = "cpu" if interpreted() else "cuda"
EPS = 1e-5
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def make_weights(heads, head_dim, norm, dtype=torch.float32):
    if norm is None:
        return None, None
    shape = (heads, head_dim) if norm == "across" else (head_dim,)
    return tuple(1 + 0.3 * normal(2, *shape, dtype=dtype))


def make_tables(tokens, head_dim, rotations):
    """cos, sin, cos_sink, sin_sink, of which the first 2 * rotations are given."""
    angles = 6.3 * torch.rand(2, tokens, head_dim // 2, device=DEVICE)
    tables = [f(angle) for angle in angles for f in (torch.cos, torch.sin)]
    return tables[: 2 * rotations] + [None] * (4 - 2 * rotations)


def cast(dtype, *tensors):
    return [None if x is None else x.to(dtype) for x in tensors]


@pytest.mark.parametrize(
    ("dtype", "norm", "rotations", "shape"),
    [
        (torch.bfloat16, "per head", 2, (2, 7, 3, 128)),
        (torch.bfloat16, "across", 1, (1, 3, 3, 128)),
        (torch.float32, "per head", 1, (1, 9, 6, 64)),
        (torch.float32, "across", 2, (2, 2, 5, 12)),
        (torch.float32, None, 2, (1, 5, 2, 32)),
        (torch.float16, "per head", 0, (1, 60, 1, 32)),
        (torch.float16, "across", 0, (1, 2, 1, 7)),
        (torch.bfloat16, None, 0, (1, 1, 4, 7)),
        pytest.param(torch.bfloat16, "per head", 1, (2, 129, 6, 128), marks=SLOW),
        pytest.param(torch.bfloat16, "across", 1, (1, 127, 5, 64), marks=SLOW),
    ],
)
def test_norm_and_rotation(dtype, norm, rotations, shape):
    batch, length, heads, head_dim = shape
    q, k, _ = normal(batch, length, 3, heads, head_dim, dtype=dtype).unbind(2)
    weights = make_weights(heads, head_dim, norm)
    tables = make_tables(length, head_dim, rotations)
    leaves = [x.detach().requires_grad_() for x in (q, k, *weights) if x is not None]
    q_leaf, k_leaf, *weight_leaves = leaves
    sink = {"cos_sink": tables[2], "sin_sink": tables[3]}
    outputs = qk_norm_rope(
        q_leaf, k_leaf, *(weight_leaves or weights), *tables[:2], eps=EPS, **sink
    )
    # Gradients arrive in any layout
    outgoing = [
        normal(batch, heads, head_dim, length, dtype=dtype).permute(0, 3, 1, 2) for _ in outputs
    ]
    gradients = torch.autograd.grad(outputs, leaves, outgoing)

    def plain(dtype):
        arguments = cast(dtype, q, k, *weights, *tables)
        incoming = cast(dtype, *outgoing) + [None] * (3 - len(outgoing))
        forward = norm_rope.forward(*arguments, EPS)[: len(outputs)]
        return *forward, *norm_rope.backward(*incoming, *arguments, EPS)[: len(leaves)]

    assert all(x.is_contiguous() for x in outputs)
    for ours, exact, baseline in zip(
        (*outputs, *gradients), plain(torch.float64), plain(dtype), strict=True
    ):
        assert_error_ratio(ours, exact, baseline)


def test_weight_gradients_are_deterministic():
    q, k = normal(2, 1, 90, 4, 64, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in make_weights(4, 64, "per head")]
    tables = make_tables(90, 64, 1)[:2]
    outgoing = normal(2, *q.shape, dtype=torch.bfloat16).unbind()
    first, second = (
        torch.autograd.grad(qk_norm_rope(q, k, *leaves, *tables), leaves, outgoing)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("norm", ["per head", "across"])
def test_norm_and_rotation_is_a_torch_op(norm):
    q, k = normal(2, 1, 2, 2, 8).requires_grad_().unbind()
    arguments = (q, k, *make_weights(2, 8, norm), *make_tables(2, 8, 2), EPS)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(torch.ops.aapt.qk_norm_rope.default, arguments, test_utils=checks)


def make_cache(batch, tokens, heads, head_dim, dtype, text=0, window=2, sink=1, lens=None):
    cache = KVCache(
        batch,
        2,
        heads,
        head_dim,
        text_tokens=text,
        tokens_per_frame=tokens,
        window_frames=window,
        sink_frames=sink,
        dtype=dtype,
        device=DEVICE,
    )
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    if text:
        cache.text_lens.copy_(torch.tensor(lens or [text] * batch))
    return cache


@pytest.mark.parametrize(
    ("dtype", "norm", "rotations", "shape"),
    [
        (torch.bfloat16, "per head", 2, (2, 7, 3, 128)),
        (torch.float16, "across", 1, (1, 3, 3, 64)),
        (torch.float32, None, 0, (1, 1, 1, 7)),
        pytest.param(torch.bfloat16, "per head", 1, (1, 129, 6, 64), marks=SLOW),
    ],
)
def test_append_writes_the_frame_and_nothing_else(dtype, norm, rotations, shape):
    batch, tokens, heads, head_dim = shape
    cache = make_cache(batch, tokens, heads, head_dim, dtype, text=5)
    weights = make_weights(heads, head_dim, norm, dtype)
    for slot in (0, 1, 2, 3, 1, 2):
        q, k, v = normal(batch, tokens, 3, heads, head_dim, dtype=dtype).unbind(2)
        v[0, 0, 0, :2] = torch.tensor([float("nan"), -0.0])
        tables = make_tables(tokens, head_dim, rotations)
        sink = {"cos_sink": tables[2], "sin_sink": tables[3]}
        before_k, before_v = cache.k.clone(), cache.v.clone()
        appended = kv_append(q, k, v, cache, 1, *weights, *tables[:2], eps=EPS, **sink)
        queries = appended if rotations == 2 else (appended,)

        rows = slice(5 + slot * tokens, 5 + (slot + 1) * tokens)
        k_row, v_row = cache.k[1, :, rows].clone(), cache.v[1, :, rows].clone()
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(v_row.view(bits), v.contiguous().view(bits))
        exact, plain = (
            norm_rope.forward(*cast(t, q, k, *weights, *tables), EPS)
            for t in (torch.float64, dtype)
        )
        for ours, index in zip((k_row, *queries), (1, 0, 2), strict=False):
            assert_error_ratio(ours, exact[index], plain[index])
        cache.k[1, :, rows], cache.v[1, :, rows] = before_k[1, :, rows], before_v[1, :, rows]
        for after, before in ((cache.k, before_k), (cache.v, before_v)):
            assert torch.equal(after.view(bits), before.view(bits))
        cache.advance()


@pytest.mark.parametrize("use_hadamard", [False, True])
@pytest.mark.parametrize(
    ("dtype", "norm", "shape"),
    [
        (torch.bfloat16, "per head", (1, 70, 2, 64)),
        (torch.float16, "across", (2, 2, 2, 32)),
        (torch.float32, None, (1, 3, 1, 32)),
    ],
)
def test_append_to_a_cache_of_float8(dtype, norm, shape, use_hadamard):
    """The bytes of the reference, but for keys that it has rounded more often; nothing else."""
    batch, tokens, heads, head_dim = shape
    options = dict(text_tokens=5, tokens_per_frame=tokens, window_frames=2, device=DEVICE)
    options |= dict(dtype=torch.float8_e4m3fn, compute_dtype=dtype, use_hadamard=use_hadamard)
    ours, theirs = (KVCache(batch, 2, heads, head_dim, **options) for _ in range(2))
    scales = 0.02 + torch.rand(2, heads, device=DEVICE)
    for cache in (ours, theirs):
        cache.k_scale[1], cache.v_scale[1] = scales
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
    weights = make_weights(heads, head_dim, norm, dtype)
    for frames in (1, 2, 3):
        length = frames * tokens
        q, k, v = normal(batch, length, 3, heads, head_dim, dtype=dtype).unbind(2)
        v[0, 0, 0, :3] = torch.tensor([float("nan"), -0.0, 6e4])
        tables = make_tables(length, head_dim, 2)
        sink = {"cos_sink": tables[2], "sin_sink": tables[3]}

        queries = []
        for cache, name in ((ours, "triton"), (theirs, "reference")):
            with use_backend(name):
                queries.append(kv_append(q, k, v, cache, 1, *weights, *tables[:2], eps=EPS, **sink))
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        for one, other in zip(*queries, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=2 * tolerance)
        k, expected = (cache.k.double() for cache in (ours, theirs))
        assert torch.equal(k.isnan(), expected.isnan())
        error, expected = (k - expected).nan_to_num().abs(), expected.nan_to_num().abs()
        # One step of E4M3, and what a sum of rounded terms may differ by
        allowed = 0.13 * expected + 2**-9 + tolerance * expected.amax(-1, keepdim=True)
        assert (error <= allowed).all()
        assert (error > 0).sum() < 0.2 * (~k.isnan()).sum()
        v, expected = (cache.v.contiguous().view(torch.uint8) for cache in (ours, theirs))
        assert torch.equal(v & 0x7F, expected & 0x7F)
        for cache in (ours, theirs):
            cache.advance(frames)


def test_limits_of_a_cache_of_float8():
    options = dict(text_tokens=0, tokens_per_frame=1, window_frames=1)
    options |= dict(dtype=torch.float8_e4m3fn, device=DEVICE)
    for head_dim, extra, words in (
        (16, dict(use_hadamard=True), "q: expected a head_dim of 32 to 512 with use_hadamard, got"),
        (32, dict(compute_dtype=torch.float64), "q: expected at most float32 with a cache of"),
    ):
        cache = KVCache(1, 1, 1, head_dim, **options, **extra)
        x = normal(1, 1, 1, head_dim, dtype=cache.compute_dtype)
        with pytest.raises(BackendError, match=words):
            kv_append(x, x, x, cache, 0, None, None, None, None)


def check_attention(cache, q, q_sink, scale, attend):
    """`attend` against the specification; what the frame does not see is NaN in the cache."""
    frames = q.shape[1] // cache.tokens_per_frame
    seen = attention.visible(cache.step, frames, cache.text_lens, cache.capacity, cache.integers)
    k, v = normal(2, *cache.k[1].shape, dtype=q.dtype).unbind()
    hidden = ~seen[:, :, None, None]
    cache.k[1].copy_(k.masked_fill(hidden, float("nan")))
    cache.v[1].copy_(v.masked_fill(hidden, float("nan")))

    def plain(dtype):
        tensors = cast(dtype, q, k, v)
        (sink,) = cast(dtype, q_sink)
        rest = (cache.step, cache.text_lens, sink, *cache.integers, scale, None, None, None)
        return attention.forward(*tensors, *rest)

    out, lse = attend()
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32) and out.is_contiguous()
    for ours, exact, baseline in zip((out, lse), plain(torch.float64), plain(q.dtype), strict=True):
        assert_error_ratio(ours, exact, baseline)


# heads, head_dim, tokens, text, lens, sink frames, clamped, steps; the ring holds 3 frames
CASES = [
    (1, 64, 1, 0, None, 1, False, [0, 2, 9]),
    (2, 32, 60, 4, (4, 4), 1, False, [0, 3, 5]),
    (3, 8, 5, 4, (0, 3), 1, True, [0, 1, 6]),
    (1, 128, 23, 70, (70, 1), 2, True, [0, 1, 7]),
    (1, 64, 64, 64, (0, 64), 0, False, [0, 4]),
    (1, 40, 127, 9, (2, 9), 0, True, [5]),
    (6, 64, 129, 1, (1, 0), 1, False, [1]),
]


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(x, marks=SLOW) for x in (torch.float32, torch.float16))],
)
def test_attention(dtype, case, splits):
    heads, head_dim, tokens, text, lens, sink, clamped, steps = case
    cache = make_cache(2, tokens, heads, head_dim, dtype, text, sink=sink, lens=lens)
    for step in steps:
        cache.step.fill_(step)
        q, q_sink, _ = normal(2, tokens, 3, heads, head_dim, dtype=dtype).unbind(2)
        q_sink = q_sink if clamped else None

        def attend(step=step, q=q, q_sink=q_sink):
            if splits is None:
                return cached_attention(q, cache, 1, q_sink=q_sink, scale=0.2, return_lse=True)
            tensors = (q, cache.k[1], cache.v[1], cache.step, cache.text_lens, q_sink)
            return attention_kernels.forward(
                *tensors, *cache.integers, 0.2, None, None, None, splits=splits
            )

        check_attention(cache, q, q_sink, 0.2, attend)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=SLOW)])
@pytest.mark.parametrize("case", CASES[1:5], ids=str)
def test_attention_to_a_cache_of_float8(dtype, case, splits):
    """The loss is that of q and the weights rounded in float64."""
    heads, head_dim, tokens, text, lens, sink, clamped, steps = case
    options = dict(text_tokens=text, tokens_per_frame=tokens, window_frames=2, sink_frames=sink)
    options |= dict(dtype=torch.float8_e4m3fn, compute_dtype=dtype, device=DEVICE)
    cache = KVCache(2, 2, heads, head_dim, **options)
    cache.text_lens.copy_(torch.tensor(lens))
    cache.k_scale[:], cache.v_scale[:] = 0.02 + 0.03 * torch.rand(2, 2, heads, device=DEVICE)
    for step in steps:
        cache.step.fill_(step)
        seen = attention.visible(cache.step, 1, cache.text_lens, cache.capacity, cache.integers)
        stored = []
        for x, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            numbers = normal(*x.shape) / scale[:, None, None, :, None]
            x.copy_(numbers.masked_fill(~seen[..., None, None], float("nan")).to(x.dtype))
            stored.append(x[1].double() * scale[1, :, None].double())
        q, q_sink, _ = normal(2, tokens, 3, heads, head_dim, dtype=dtype).unbind(2)
        q_sink = q_sink if clamped else None
        out, lse = attention_kernels.forward(
            *(q, cache.k[1], cache.v[1], cache.step, cache.text_lens, q_sink),
            *(*cache.integers, 0.2, *cache.scales(1), None),
            splits=splits,
        )
        pinned = slice(text, text + sink * tokens)
        (exact, _), (emulated, emulated_lse) = (
            attend(q, *stored, seen, 0.2, q_sink=q_sink, sink=pinned, e4m3=rounds)
            for rounds in (False, True)
        )
        error, least = ((x.double() - exact).norm() / exact.norm() for x in (out, emulated))
        assert error <= 1.2 * least + 2**-8
        torch.testing.assert_close(lse.double(), emulated_lse, rtol=0, atol=1e-3)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("use_hadamard", [False, True])
def test_attention_to_a_past_of_float8(use_hadamard, pinned):
    sizes = dict(tokens=9, heads=2, head_dim=32, dtype=torch.float32)
    stream = Stream(DEVICE, use_hadamard=use_hadamard, **sizes)
    for _ in range(4):
        (out, lse), (exact, _), (emulated, emulated_lse) = stream.step(pinned)
        assert relative(out, exact) <= 1.1 * relative(emulated, exact) + 1e-3
        torch.testing.assert_close(lse.double(), emulated_lse, rtol=0, atol=1e-3)


def test_attention_to_a_cache_of_float8_is_checked(monkeypatch):
    options = dict(text_tokens=0, tokens_per_frame=9, window_frames=1, dtype=torch.float8_e4m3fn)
    cache = KVCache(1, 1, 2, 32, device=DEVICE, **options)
    x = normal(1, 9, 2, 32, dtype=torch.bfloat16)
    q = kv_append(x, x, x, cache, 0, None, None, None, None)
    cached_attention(q, cache, 0)
    assert cache.checked == {("kv_append", 0, 9), ("cached_attention", 0, 9)}
    monkeypatch.setattr(self_check, "LEAST_COSINE", 0.999999)  # more than E4M3 can give
    cached_attention(q, cache, 0)
    cache.recheck()
    with pytest.raises(RuntimeError, match="expected a cosine of at least 0.999999 with attention"):
        cached_attention(q, cache, 0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_attention_with_any_scale(dtype, scale):
    cache = make_cache(1, 5, 1, 16, dtype, text=2)
    q, q_sink = normal(2, 1, 5, 1, 16, dtype=dtype).unbind()
    check_attention(
        cache,
        q,
        q_sink,
        scale,
        lambda: cached_attention(q, cache, 1, q_sink=q_sink, scale=scale, return_lse=True),
    )


@pytest.mark.parametrize("frames", [1, 3])
def test_parts_are_kept_in_the_workspace_of_the_cache(frames):
    cache = make_cache(1, 7, 1, 20, torch.float32, text=300, lens=(300,))
    cache.step.fill_(9)
    cache.k.copy_(normal(*cache.k.shape))
    cache.v.copy_(normal(*cache.v.shape))
    q = normal(1, 7 * frames, 1, 20)
    assert attention_kernels.plan_of(7 * frames, cache.k[1]).splits > 1
    workspace = cache.workspace.fill_(float("nan"))
    out = cached_attention(q, cache, 1)
    written = ~workspace.isnan()
    assert written.any() == (frames == 1)  # a longer step allocates its own
    too_small, of_another_kernel = workspace[: max(0, written.sum() - 1)], workspace.int()
    for cache.workspace in (None, too_small, of_another_kernel):
        assert torch.equal(cached_attention(q, cache, 1), out)


def test_a_cache_whose_keys_are_never_split_needs_no_workspace():
    cache = make_cache(1, 1, 1, 16, torch.float32)
    assert attention_kernels.plan_of(1, cache.k[1]).splits == 1
    assert cache.workspace.numel() == 0
    assert cache.ready_workspace() is cache.workspace  # asked once, not in every call


# text, tokens, frames, window, sinks, past; head_dim, lens, clamped, prefix_grad
TRAINING = [
    pytest.param((FrameLayout(5, 40, 3, 1), 32, (5, 2), False, True), marks=SLOW),
    (FrameLayout(5, 40, 3, 1), 40, (0, 5), True, True),
    (FrameLayout(0, 7, 12, 3, 2), 64, None, True, True),
    pytest.param((FrameLayout(3, 23, 3, 1, 1, 2), 64, (3, 1), False, False), marks=SLOW),
    (FrameLayout(3, 23, 2, 0, 1, 3), 16, (0, 2), True, False),
    pytest.param((FrameLayout(70, 65, 3, None), 128, (66, 3), True, True), marks=SLOW),
    pytest.param((FrameLayout(9, 129, 2, 1, 0), 64, (9, 9), False, True), marks=SLOW),
]


@pytest.mark.parametrize("case", TRAINING, ids=str)
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(x, marks=SLOW) for x in (torch.float32, torch.float16))],
)
def test_training_attention(dtype, case):
    layout, head_dim, lens, clamped, prefix_grad = case
    if dtype == torch.float32 and head_dim > 64:
        pytest.skip("float32 is taken up to 64")
    frame_rows = layout.query_length - layout.text_tokens
    q, dout = normal(2, 2, layout.query_length, 2, head_dim, dtype=dtype).unbind()
    k, v = normal(2, layout.key_length, 2, 2, head_dim, dtype=dtype).unbind(2)
    q_sink = normal(2, frame_rows, 2, head_dim, dtype=dtype) if clamped else None
    lens = None if lens is None else torch.tensor(lens, device=DEVICE)
    dlse = normal(2, 2, layout.query_length)
    names = ("q", "k", "v", "q_sink") if clamped else ("q", "k", "v")
    leaves = dict(zip(names, (q, k, v, q_sink), strict=False))
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    out, lse = block_causal_attention(
        **leaves,
        layout=layout,
        text_lens=lens,
        scale=0.2,
        prefix_grad=prefix_grad,
        return_lse=True,
    )
    dlse = torch.where(lse.isfinite(), dlse, 0)
    gradients = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))

    def plain(dtype):
        arguments = (lens, *cast(dtype, q_sink), *layout.integers, 0.2, prefix_grad)
        tensors = cast(dtype, q, k, v)
        forward = training.forward(*tensors, *arguments)
        incoming = (*cast(dtype, dout), dlse.to(forward[1].dtype))
        backward = training.backward(*incoming, *tensors, *forward, *arguments, False)
        return *forward, *backward[: len(names)]

    for name, ours, exact, baseline in zip(
        ("out", "lse", *names),
        (out, lse, *gradients),
        plain(torch.float64),
        plain(dtype),
        strict=True,
    ):
        assert_error_ratio(ours, exact, baseline, name)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_training_attention_with_any_scale(scale):
    layout = FrameLayout(2, 5, 2, 1)
    q, k, v = normal(3, 1, layout.query_length, 1, 16).unbind()
    q_sink = normal(1, 10, 1, 16)
    leaves = [x.requires_grad_() for x in (q, k, v, q_sink)]
    results = []
    for name in ("triton", "reference"):
        with use_backend(name):
            out = block_causal_attention(*leaves[:3], layout, q_sink=leaves[3], scale=scale)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact)


def test_training_attention_is_a_torch_op():
    layout = FrameLayout(2, 5, 2, 1)
    q = normal(1, layout.query_length, 1, 8).requires_grad_()
    arguments = (q, q, q, None, None, *layout.integers, 0.3, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(torch.ops.aapt.block_causal_attention.default, arguments, test_utils=checks)


def test_the_limit_of_training_attention_names_itself():
    x = normal(1, 1, 1, 128)
    words = "float16 or bfloat16 with a head_dim up to 128, float32 up to 64, got torch.float32"
    with pytest.raises(BackendError, match=words):
        block_causal_attention(x, x, x, FrameLayout(0, 1, 1, 0))


def test_a_limit_names_itself():
    cache = make_cache(1, 1, 1, 256, torch.float32)
    words = "it takes float16, bfloat16 or float32 with a head_dim up to 128, got torch.float32"
    with pytest.raises(BackendError, match=words):
        cached_attention(normal(1, 1, 1, 256), cache, 0)


@pytest.mark.parametrize("heads", [1, 3, 24])
@pytest.mark.parametrize(("tokens", "frames"), [(1196, 32), (3600, 17)])
def test_splits_fill_the_device(tokens, frames, heads):
    """Efficiency is counted in whole key tiles, against 132 multiprocessors that never wait."""
    config = attention_kernels.CONFIGS[2, 128][0]
    tiles = -(-tokens // config.rows) * heads
    key_tiles = -(-tokens * frames // config.keys)
    slots = 132 * config.programs
    splits = attention_kernels.choose_splits(tiles, key_tiles, slots)
    waves = -(-tiles * splits // slots)
    efficiency = tiles * key_tiles / slots / (waves * -(-key_tiles // splits))
    assert 1 <= splits <= attention_kernels.MAX_SPLITS
    assert efficiency > 0.9


@pytest.mark.skipif(interpreted(), reason="CUDA graphs need a device")
def test_a_captured_step_follows_the_counter():
    cache = make_cache(1, 130, 3, 64, torch.bfloat16, text=9)
    cache.k[1].normal_()
    cache.v[1].normal_()
    weights, tables = make_weights(3, 64, "per head"), make_tables(130, 64, 1)[:2]
    frames = normal(6, 3, 1, 130, 3, 64, dtype=torch.bfloat16)
    frame = frames[0].clone()

    def step(cache):
        q = kv_append(*frame, cache, 1, *weights, *tables)
        out = cached_attention(q, cache, 1)
        cache.advance()
        return out

    twin = cache.clone()
    step(cache.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(cache)
    for new in frames:
        frame.copy_(new)
        graph.replay()
        assert torch.equal(captured, step(twin))
    assert torch.equal(cache.k[1], twin.k[1]) and int(cache.step) == 6
