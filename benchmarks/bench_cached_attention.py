"""`cached_attention`, once the ring is full and has wrapped.

On a CPU: no slower than SDPA on a contiguous copy of the visible keys, made outside the timing. On
a GPU: 700 TFLOP/s with 24 heads; 640 with 3 to 9 heads, where the best of the peers reaches 440.
Run with `pytest benchmarks/bench_cached_attention.py [--device cuda]`.
"""

import pytest
import torch
import torch.nn.functional as F

from aapt_kernels import cached_attention

from .conftest import Work
from .peers import attentions, other_backends


def test_cached_attention(against, mode, device, shape, dtype):
    cache, q = shape.make_cache(dtype, device), shape.make_frame(dtype, device)
    k, v = cache.k[0], cache.v[0]  # every row is visible, so the peers need no mask either

    def ours():
        return cached_attention(q, cache, 0)

    if mode == "cpu":
        rivals = {"contiguous SDPA": contiguous_sdpa(q, k, v)}
    else:
        rivals = other_backends("cached_attention", q, ours) | attentions(q, k, v, mode)
    kv_and_q_and_out = 2 * (k.numel() + q.numel()) * q.element_size()
    work = Work(shape.attention_flops, kv_and_q_and_out)
    against(ours, rivals, rounds=20, iterations=10, work=work)


def test_cached_attention_float8(against, mode, device, shape, dtype):
    """A cache of E4M3, with products in E4M3 where a kernel has them, against one of `dtype`, and
    against one whose past alone is E4M3."""
    if mode == "cpu" or shape.head_dim != 128:
        pytest.skip("no products in E4M3")
    caches = [
        shape.make_cache(torch.float8_e4m3fn, device, compute_dtype=dtype),
        shape.make_cache(dtype, device),
        shape.make_cache(dtype, device, past_dtype=torch.float8_e4m3fn),
    ]
    q = shape.make_frame(dtype, device)

    def ours():
        return cached_attention(q, caches[0], 0)

    def other(cache):
        def run():
            cached_attention(q, cache, 0)  # to other keys: results are not compared

        return run

    moved = 2 * caches[0].k[0].numel() + 2 * q.numel() * q.element_size()
    work = Work(shape.attention_flops, moved)
    rivals = {f"a cache of {dtype}": other(caches[1]), "past alone": other(caches[2])}
    against(ours, rivals, rounds=20, iterations=10, work=work)


@pytest.mark.parametrize("text", [7])
def test_with_a_short_prompt(against, mode, device, shape, dtype, text):
    """Text lies at the end of its slot, so the first rows are hidden; peers get the others."""
    cache, q = shape.make_cache(dtype, device), shape.make_frame(dtype, device)
    cache.text_lens.fill_(text)
    seen = torch.arange(shape.text - text, cache.capacity, device=device)
    k, v = (x[0].transpose(1, 2)[:, :, seen].transpose(1, 2) for x in (cache.k, cache.v))

    def ours():
        return cached_attention(q, cache, 0)

    if mode == "cpu":
        rivals = {"contiguous SDPA": contiguous_sdpa(q, k, v)}
    else:
        rivals = {"SDPA cuDNN": attentions(q, k, v, mode)["SDPA cuDNN"]}
        rivals |= {} if mode == "cuda" else {"contiguous SDPA": contiguous_sdpa(q, k, v)}
    flops = 4 * q.numel() * len(seen)
    against(ours, rivals, rounds=20, iterations=10, work=Work(flops))


def contiguous_sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
