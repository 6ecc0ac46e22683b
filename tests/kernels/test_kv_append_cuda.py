"""The sm_90a kernel of kv_append on a device: against float64, bit for bit, and under a graph."""

import pytest
import torch

from aapt_kernels import KVCache, kv_append, use_backend
from aapt_kernels.backend import no_sm90

if reason := no_sm90():
    pytest.skip(reason, allow_module_level=True)

# The plain composition in BF16 rounds at least twice; this kernel rounds once, by half a unit.
ROUNDING = 2**-8


def rotate(x, cos, sin):
    """Half-split rotation in float64; x (B, L, H, D), cos and sin (L, D / 2)."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1)


def normalize(x, weight, eps):
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


def make_angles(tokens, head_dim, generator):
    angles = torch.rand(tokens, head_dim // 2, generator=generator, device="cuda") * 6.3
    return angles.cos(), angles.sin()


def make_case(batch, tokens, heads, head_dim, weight_dtype=torch.float32, seed=0):
    """q, k, v are strided views of one projection, as a model makes them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (batch, tokens, 3, heads, head_dim)
    qkv = torch.randn(shape, generator=generator, device="cuda").bfloat16()
    weights = torch.rand(2, head_dim, generator=generator, device="cuda").add(0.5).to(weight_dtype)
    return (*qkv.unbind(2), *weights, *make_angles(tokens, head_dim, generator))


def make_cache(batch, tokens, heads, head_dim):
    cache = KVCache(
        batch,
        2,
        heads,
        head_dim,
        text_tokens=5,
        tokens_per_frame=tokens,
        window_frames=2,
        dtype=torch.bfloat16,
        device="cuda",
    )
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    return cache


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 1, 1), (2, 7, 3), (1, 1196, 24)])
def test_writes_the_frame_and_nothing_else(batch, tokens, heads, head_dim, weight_dtype):
    cache = make_cache(batch, tokens, heads, head_dim)
    generator = torch.Generator("cuda").manual_seed(1)
    cos_sink, sin_sink = make_angles(tokens, head_dim, generator)
    for frame, slot in enumerate([0, 1, 2, 3, 1, 2]):
        q, k, v, q_weight, k_weight, cos, sin = make_case(
            batch, tokens, heads, head_dim, weight_dtype, seed=frame
        )
        before_k, before_v = cache.k.clone(), cache.v.clone()
        with use_backend("cuda"):
            q_out, q_sink = kv_append(
                q,
                k,
                v,
                cache,
                1,
                q_weight,
                k_weight,
                cos,
                sin,
                eps=1e-5,
                cos_sink=cos_sink,
                sin_sink=sin_sink,
            )
        q_normed, k_normed = normalize(q, q_weight, 1e-5), normalize(k, k_weight, 1e-5)
        rows = slice(5 + slot * tokens, 5 + (slot + 1) * tokens)
        for got, want in (
            (q_out, rotate(q_normed, cos, sin)),
            (q_sink, rotate(q_normed, cos_sink, sin_sink)),
            (cache.k[1, :, rows], rotate(k_normed, cos, sin)),
        ):
            torch.testing.assert_close(got.double(), want, rtol=ROUNDING, atol=1e-5)
        assert torch.equal(cache.v[1, :, rows], v)
        cache.k[1, :, rows], cache.v[1, :, rows] = before_k[1, :, rows], before_v[1, :, rows]
        for after, before in ((cache.k, before_k), (cache.v, before_v)):
            assert torch.equal(after.view(torch.int16), before.view(torch.int16))
        cache.advance()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_without_norm_and_rotation_it_copies(head_dim):
    cache = make_cache(1, 7, 3, head_dim)
    q, k, v, *_ = make_case(1, 7, 3, head_dim)
    with use_backend("cuda"):
        q_out = kv_append(q, k, v, cache, 0, None, None, None, None)
    assert torch.equal(q_out, q)
    assert torch.equal(cache.k[0, :, 5:12], k)
    assert torch.equal(cache.v[0, :, 5:12], v)


def test_a_captured_step_follows_the_counter():
    cache = make_cache(1, 7, 3, 128)
    case = make_case(1, 7, 3, 128)
    with use_backend("cuda"):
        kv_append(*case[:3], cache, 0, *case[3:])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kv_append(*case[:3], cache, 0, *case[3:])
            cache.advance()
    cache.reset()
    cache.v.zero_()
    for _ in range(5):
        graph.replay()
    slots = cache.v[0, 0, 5:].unflatten(0, (-1, 7))
    assert int(cache.step) == 5
    assert all(torch.equal(slot, case[2][0]) for slot in slots)
    assert (cache.v[1] == 0).all()
