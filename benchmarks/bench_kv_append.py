"""`kv_append`: norm, rotation and ring write of one frame.

On a GPU it is bound by memory: at least 75 % of the rate of a plain copy of the same bytes. On a
CPU it is compared with the same work without the write and with the plain composition.
Run with `pytest benchmarks/bench_kv_append.py [--device cuda]`.
"""

from dataclasses import replace
from functools import partial

import torch

from aapt_kernels import kv_append, qk_norm_rope

from .compositions import append, in_dtype, make_tables
from .conftest import Work
from .peers import Compiled, compiled, other_backends, plain_copy


def test_kv_append(against, mode, device, shape, dtype):
    cache = shape.make_cache(dtype, device)
    projected = replace(shape, heads=3 * shape.heads).make_frame(dtype, device)
    q, k, v = projected.chunk(3, dim=2)  # strided, as a model's one projection gives them
    weight, cos, sin = tables = make_tables(shape, device)
    plain = (q, k, v, cache.k[0], cache.v[0], cache.step, *in_dtype(dtype, *tables))
    plain += (shape.text, shape.frames)

    def ours():
        return kv_append(q, k, v, cache, 0, weight, weight, cos, sin)

    frame_bytes = q.numel() * q.element_size()
    moved = 6 * frame_bytes + 2 * cos.numel() * cos.element_size()  # three read, three written
    rivals = {"composition, eager": partial(append, *plain)}
    if mode == "cpu":
        rivals["qk_norm_rope alone"] = lambda: qk_norm_rope(q, k, weight, weight, cos, sin)
    else:
        rivals["composition, compiled"] = Compiled(lambda: partial(compiled(append, mode), *plain))
        rivals |= other_backends("kv_append", q, ours)
    ceilings = {"a copy of as many bytes": plain_copy(moved, device)}
    work = Work(bytes=moved)
    against(ours, rivals, rounds=20, iterations=10, work=work, ceilings=ceilings)


def test_kv_append_float8(against, mode, device, shape, dtype):
    """A cache of E4M3: keys times the Hadamard matrix, values transposed, in the same launch."""
    caches = [
        shape.make_cache(torch.float8_e4m3fn, device, compute_dtype=dtype, use_hadamard=use)
        for use in (True, False)
    ]
    projected = replace(shape, heads=3 * shape.heads).make_frame(dtype, device)
    q, k, v = projected.chunk(3, dim=2)
    weight, cos, sin = make_tables(shape, device)

    def append_to(cache):
        return kv_append(q, k, v, cache, 0, weight, weight, cos, sin)

    # Read: q, k, v; written: q, and k and v of one byte
    moved = q.numel() * (4 * q.element_size() + 2) + 2 * cos.numel() * cos.element_size()
    ours = partial(append_to, caches[0])

    def without():
        append_to(caches[1])  # returns other queries, which are not compared

    rivals = {"without the Hadamard matrix": without}
    ceilings = {}
    if mode != "cpu":
        rivals |= other_backends("kv_append", q, ours)
        ceilings["a copy of as many bytes"] = plain_copy(moved, device)
    against(ours, rivals, rounds=20, iterations=10, work=Work(bytes=moved), ceilings=ceilings)
