"""Any strides means any strides: tensors that vector loads cannot reach are in a kernel's limit, so
that `auto` takes the next backend and a forced `cuda` says why."""

import re

import pytest
import torch

from aapt_kernels import (
    FrameLayout,
    KVCache,
    block_causal_attention,
    cached_attention,
    causal_conv3d,
    kv_append,
    use_backend,
)
from aapt_kernels.backend import BackendError, choose, no_sim
from aapt_kernels.causal_conv3d.cases import ACTIVE, CASES, Case, make_inputs

LAYOUT = FrameLayout(5, 3, 4, 2)
LENGTH, TOKENS, HEADS, DIM = LAYOUT.query_length, 3, 2, 64
WITH_SIMULATOR = pytest.mark.skipif(bool(no_sim()), reason=str(no_sim()))


def projected(gate: int):
    """Return q, k and v of one projection, which also makes `gate` columns per head."""
    fused = torch.randn(1, LENGTH, 3 * HEADS * DIM + gate * HEADS, dtype=torch.bfloat16)
    return fused[..., : 3 * HEADS * DIM].unflatten(-1, (3, HEADS, DIM)).unbind(2)


def make_cache():
    sizes = dict(text_tokens=0, tokens_per_frame=TOKENS, window_frames=1, dtype=torch.bfloat16)
    return KVCache(1, 1, HEADS, DIM, **sizes)


def append_arguments(q, k, v, weights=(None, None), tables=(None,) * 4):
    cache = make_cache()
    frames = (x[:, :TOKENS] for x in (q, k, v))
    cached = (cache.k[0], cache.v[0], cache.step)
    return (*frames, *cached, *weights, *tables, 1e-6, *cache.integers)


def look_back_arguments(q, scale=0.1):
    cache = make_cache()
    cached = (cache.k[0], cache.v[0], cache.step, cache.text_lens)
    return (q[:, :TOKENS], *cached, None, *cache.integers, scale)


@pytest.fixture
def device_has_sm90(monkeypatch):
    """`auto` on a CPU tensor chooses as it does on a CUDA tensor of a Hopper device."""
    monkeypatch.setattr("aapt_kernels.backend.obstacle", lambda op, name, device: None)
    monkeypatch.setattr("aapt_kernels.backend.PREFERENCE", {"cpu": ("cuda", "triton")})


def test_rows_off_their_boundary_are_for_the_next_backend(device_has_sm90):
    """A gate per head beside q, k and v is enough."""
    for gate, expected in ((8, "cuda"), (1, "triton")):
        q, k, v = projected(gate)
        training = (q, k, v, None, None, *LAYOUT.integers, 0.1, True)
        assert choose("block_causal_attention", *training) == expected
        assert choose("kv_append", *append_arguments(q, k, v)) == expected
        assert choose("cached_attention", *look_back_arguments(q)) == expected


def test_a_view_that_begins_off_a_boundary_is_for_the_next_backend(device_has_sm90):
    q = torch.randn(LENGTH * HEADS * DIM + 1, dtype=torch.bfloat16)
    for start, expected in ((0, "cuda"), (1, "triton")):
        x = q[start : start + LENGTH * HEADS * DIM].view(1, LENGTH, HEADS, DIM)
        out, lse = torch.randn_like(x), torch.randn(1, HEADS, LENGTH)
        rest = (x, x, x, out, lse, None, None, *LAYOUT.integers, 0.1, True, False)
        assert choose("block_causal_attention_backward", x, None, *rest) == expected


def test_a_gradient_that_is_copied_anyway_may_have_any_strides(device_has_sm90):
    q = torch.randn(1, LENGTH, HEADS, DIM, dtype=torch.bfloat16)
    lse = torch.randn(1, HEADS, LENGTH)
    rest = (q, q, q, q, lse, None, None, *LAYOUT.integers, 0.1, True, False)
    for dout in (q.new_ones(()).expand_as(q), q.mT.contiguous().mT):
        assert choose("block_causal_attention_backward", dout, None, *rest) == "cuda"


@pytest.mark.parametrize(
    ("weights", "tables"),
    [
        ((torch.float16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float32, torch.float32), torch.float64),
    ],
    ids=str,
)
def test_dtypes_that_the_kernel_does_not_take(device_has_sm90, weights, tables):
    q = torch.randn(1, TOKENS, HEADS, DIM, dtype=torch.bfloat16)
    weights = [torch.ones(DIM, dtype=dtype) for dtype in weights]
    angles = torch.rand(2, TOKENS, DIM // 2, dtype=tables).unbind()
    good = append_arguments(q, q, q, [w.float() for w in weights], [*angles, None, None])
    good = [x.float() if torch.is_tensor(x) and x.dtype == torch.float64 else x for x in good]
    assert choose("kv_append", *good) == "cuda"
    arguments = append_arguments(q, q, q, weights, [*angles, None, None])
    assert choose("kv_append", *arguments) == "triton"


@pytest.mark.parametrize("scale", [0.0, -0.1])
def test_scales_that_the_kernels_do_not_take(device_has_sm90, scale):
    q = torch.randn(1, LENGTH, HEADS, DIM, dtype=torch.bfloat16)
    assert choose("cached_attention", *look_back_arguments(q, scale)) == "triton"
    arguments = (q, q, q, None, None, *LAYOUT.integers, scale, True)
    assert choose("block_causal_attention", *arguments) == "triton"


def test_a_forced_backend_says_why(monkeypatch):
    monkeypatch.setattr("aapt_kernels.backend.obstacle", lambda op, name, device: None)
    monkeypatch.setattr("aapt_kernels.backend._forced", "cuda")
    q, k, v = projected(gate=1)
    words = (
        "backend 'cuda' cannot run block_causal_attention on a cpu tensor: q: expected rows "
        "on 16-byte boundaries, got strides (6562, 386, 64, 1) at byte 0"
    )
    with pytest.raises(BackendError, match=f"^{re.escape(words)}$"):
        block_causal_attention(q, k, v, LAYOUT)


def test_the_device_of_the_tensor_decides_and_not_the_current_one(monkeypatch):
    from aapt_kernels.backend import obstacle

    capabilities = {None: (9, 0), 1: (8, 0)}

    def capability(device=None):
        return capabilities[None if device is None else device.index]

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", capability)
    words = "the device is not sm_90 but (8, 0)"
    assert obstacle("kv_append", "cuda", torch.device("cuda", 1)) == words
    assert obstacle("kv_append", "cuda", "cuda") != words


@WITH_SIMULATOR
@pytest.mark.parametrize("start", [0, 1])
def test_the_simulated_kernels_take_any_rows(start):
    """A copy costs a simulation nothing."""
    fused = torch.randn(1, LENGTH, 3 * HEADS * DIM + HEADS + start, dtype=torch.bfloat16)
    views = fused[..., start : start + 3 * HEADS * DIM].unflatten(-1, (3, HEADS, DIM)).unbind(2)
    dense = [x.contiguous() for x in views]
    results = []
    with use_backend("sim"):
        for tensors in (views, dense):
            leaves = [x.detach().requires_grad_() for x in tensors]
            out = block_causal_attention(*leaves, LAYOUT)
            gradients = torch.autograd.grad(out.float().square().sum(), leaves)
            cache = make_cache()
            tables = torch.rand(2, TOKENS, DIM, generator=torch.Generator().manual_seed(0))
            cos, sin = tables[..., ::2]
            frames = [x[:, :TOKENS] for x in tensors]
            q = kv_append(*frames, cache, 0, None, None, cos, sin)
            looked = cached_attention(q, cache, 0)
            results.append((out, *gradients, q, cache.k, cache.v, looked))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_text_lengths_may_be_strided(backend):
    q = torch.randn(2, LENGTH, HEADS, 8)
    lens = torch.tensor([[1, 9], [4, 9]])[:, 0]
    expected = block_causal_attention(q, q, q, LAYOUT, text_lens=lens.clone())
    assert torch.equal(block_causal_attention(q, q, q, LAYOUT, text_lens=lens), expected)


CONVOLUTIONS = {
    "chunk": (CASES["chunk"], torch.float32),
    "next norm": (CASES["next-norm"], torch.float32),
    "kernel": (Case((2, 5, 4), (16, 8), state=True, residual=True, **ACTIVE), torch.bfloat16),
    "kernel, next norm": (Case((2, 5, 4), (16, 8), next_norm=True), torch.bfloat16),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("backend", ["cpu", "reference", "sim"])
def test_a_convolution_takes_any_strides(name, backend):
    """State and residual are stored unlike x, vectors have gaps, and all is off its boundary."""
    case, dtype = CONVOLUTIONS[name]
    if backend == "sim" and (dtype != torch.bfloat16 or no_sim()):
        pytest.skip("takes bfloat16, in development builds")
    (x, weight, bias), options = make_inputs(case, dtype)
    x = x.to(memory_format=torch.channels_last_3d)

    def spread(value):
        if not torch.is_tensor(value) or value.dim() > 1:
            return shifted(value)
        return torch.stack([value, value], dim=1)[:, 0]

    def shifted(value):
        if not torch.is_tensor(value):
            return value
        buffer = torch.empty(value.numel() + 1, dtype=value.dtype)
        return buffer[1:].view(value.shape).copy_(value)

    with use_backend(backend), torch.no_grad():
        expected = causal_conv3d(x, weight, bias, **options)
        strided = {key: spread(value) for key, value in options.items()}
        moved = shifted(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        ours = causal_conv3d(moved, weight, spread(bias), **strided)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
