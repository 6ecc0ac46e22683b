"""`cached_attention` and `kv_append` on a CPU, once the ring is full and has wrapped.

Target: no slower than SDPA on a contiguous copy of the keys it sees, made outside the timing.
Run with `pytest benchmarks/bench_cached_attention.py`.
"""

import pytest
import torch
import torch.nn.functional as F

from aapt_kernels import KVCache, cached_attention, kv_append, qk_norm_rope

CASES = {  # tokens_per_frame, window_frames, heads, head_dim
    "tiny world": (40, 6, 6, 32),
    "large": (440, 8, 8, 64),
}
TEXT = 24
DTYPES = [torch.float32, torch.bfloat16]


def make_case(case, dtype):
    """A cache full of normal numbers after several turns of the ring, and one frame."""
    tokens, window, heads, head_dim = CASES[case]
    cache = KVCache(
        1,
        1,
        heads,
        head_dim,
        text_tokens=TEXT,
        tokens_per_frame=tokens,
        window_frames=window,
        dtype=dtype,
    )
    cache.k.normal_()
    cache.v.normal_()
    cache.step.fill_(3 * window + 1)
    cache.text_lens.fill_(TEXT)
    return cache, torch.randn(1, tokens, heads, head_dim, dtype=dtype)


@pytest.mark.parametrize("text_lens", [TEXT, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_cached_attention(against, case, dtype, text_lens):
    cache, q = make_case(case, dtype)
    cache.text_lens.fill_(text_lens)
    seen = torch.arange(cache.capacity)
    seen = seen[(seen < text_lens) | (seen >= TEXT)]
    k, v = (x[0][:, seen].transpose(1, 2).contiguous() for x in (cache.k, cache.v))
    head_major = q.transpose(1, 2).contiguous()
    against(
        lambda: cached_attention(q, cache, 0),
        {"contiguous SDPA": lambda: F.scaled_dot_product_attention(head_major, k, v)},
        rounds=20,
        iterations=10,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kv_append(against, case, dtype):
    cache, x = make_case(case, dtype)
    weight = torch.ones(x.shape[-1])
    cos, sin = torch.rand(2, x.shape[1], x.shape[-1] // 2)
    against(
        lambda: kv_append(x, x, x, cache, 0, weight, weight, cos, sin),
        {"qk_norm_rope alone": lambda: qk_norm_rope(x, x, weight, weight, cos, sin)},
        rounds=20,
        iterations=10,
    )
