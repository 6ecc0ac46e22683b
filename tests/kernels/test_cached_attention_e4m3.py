"""The sm_90a kernel of cached_attention on a cache of E4M3: simulated everywhere, and on a device
if there is one.

A result is compared with exact attention to the stored keys and values in float64: it may lose 1.1
times what rounding q and the weights loses by itself, and its log-sum-exp is that of rounded q.
"""

import math
from importlib import import_module

import pytest
import torch

from aapt_kernels import KVCache, cached_attention, kv_append, use_backend
from aapt_kernels.backend import BackendError
from aapt_kernels.cached_attention.self_check import check_attention
from benchmarks import float8_accuracy

from .oracles import attend, rotate

E4M3 = torch.float8_e4m3fn
HEAD_DIM = 128
# Of a log-sum-exp, and of their mean: one key too many or too few of fewer than 1000 costs more.
# The tensor core cuts small products beside large ones.
LSE_TOLERANCE, LSE_BIAS = 5e-3, 1e-3
BF16 = 2**-8  # rounding of the result


def bits(x):
    """All bytes behind a cache, the padding of its rows included."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def relative(x, y):
    return float((x.double() - y).norm() / y.norm())


class Case:
    """The queries of new frames and a cache in the middle of a stream, both random; bytes of the
    cache that belong to nobody are NaN."""

    def __init__(
        self,
        device,
        *,
        tokens,
        frames=1,
        heads=2,
        batch=1,
        text_tokens=0,
        text_lens=None,
        window_frames=2,
        sink_frames=1,
        step=0,
        pinned=False,
        scale=HEAD_DIM**-0.5,
        seed=0,
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = cache = KVCache(
            batch,
            2,
            heads,
            HEAD_DIM,
            text_tokens=text_tokens,
            tokens_per_frame=tokens,
            window_frames=window_frames,
            sink_frames=sink_frames,
            dtype=E4M3,
            self_check=False,
            device=device,
        )
        scales = torch.rand(2, 2, heads, generator=self.generator) * 0.05 + 0.015
        cache.k_scale[:], cache.v_scale[:] = scales.to(device)
        for x, x_scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            bits(x).fill_(0x7F)
            x.copy_((self.normal(*x.shape) / x_scale[:, None, None, :, None]).to(E4M3))
        cache.step.fill_(step)
        lens = [text_tokens] * batch if text_lens is None else text_lens
        cache.text_lens.copy_(torch.tensor(lens))
        # Views of one projection, as a model makes them
        queries = self.normal(batch, frames * tokens, 2, heads, HEAD_DIM).bfloat16()
        self.q, q_sink = queries.unbind(2)
        self.q_sink = q_sink if pinned else None
        self.scale = scale

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.cache.k.device)

    def seen(self):
        """(batch, capacity) bool, from the words of docs/method.md#5."""
        cache = self.cache
        frames = self.q.shape[1] // cache.tokens_per_frame
        slots = min(int(cache.step) + frames, cache.sink_frames + cache.ring_frames)
        seen = torch.zeros(cache.k.shape[1], cache.capacity, dtype=torch.bool)
        for sample, length in zip(seen, cache.text_lens.tolist(), strict=True):
            sample[cache.text_tokens - length : cache.text_tokens] = True
            sample[cache.text_tokens :][: slots * cache.tokens_per_frame] = True
        return seen.to(cache.k.device)

    def oracle(self, **options):
        cache = self.cache
        k, v = (
            x[1].double() * scale[1, :, None].double()
            for x, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
        )
        start = cache.text_tokens
        sink = slice(start, start + cache.sink_frames * cache.tokens_per_frame)
        return attend(
            self.q, k, v, self.seen(), self.scale, q_sink=self.q_sink, sink=sink, **options
        )

    def run(self):
        return cached_attention(
            self.q, self.cache, 1, q_sink=self.q_sink, scale=self.scale, return_lse=True
        )

    def check(self):
        out, lse = self.run()
        exact, _ = self.oracle()
        emulated, emulated_lse = self.oracle(e4m3=True)
        # Weights are rounded at the running maximum: other errors, of the same size
        assert relative(out, emulated) < 0.05
        assert relative(out, exact) <= 1.1 * relative(emulated, exact) + BF16
        torch.testing.assert_close(lse.double(), emulated_lse, rtol=0, atol=LSE_TOLERANCE)
        assert float((lse - emulated_lse).mean().abs()) < LSE_BIAS


@pytest.mark.parametrize("tokens", [1, 60, 64, 65, 128, 129, 193])
def test_frame_lengths(kernel, schedule, tokens):
    """Slots begin and end anywhere in a group of 16 keys."""
    schedule(multiprocessors=3, seed=tokens)
    Case(kernel, tokens=tokens, step=3, text_tokens=17, text_lens=[9]).check()


@pytest.mark.parametrize("step", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("pinned", [False, True])
def test_ring_cold_filling_and_wrapped(kernel, schedule, step, pinned):
    schedule(multiprocessors=4, seed=step)
    Case(kernel, tokens=50, step=step, text_tokens=5, pinned=pinned, seed=step).check()


@pytest.mark.parametrize("step", [1, 9])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(("frames", "sink_frames"), [(2, 0), (3, 2), (3, 5)])
def test_several_frames(kernel, schedule, frames, sink_frames, pinned, step):
    schedule(multiprocessors=4, seed=step)
    Case(
        kernel,
        tokens=37,
        frames=frames,
        sink_frames=sink_frames,
        step=step,
        text_tokens=3,
        pinned=pinned,
        seed=step,
    ).check()


def test_every_sample_has_its_own_text(kernel, schedule):
    schedule(multiprocessors=7, seed=2)
    Case(
        kernel, tokens=40, batch=4, heads=3, step=5, text_tokens=300, text_lens=[0, 1, 257, 300]
    ).check()


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 13])
def test_any_number_of_shares(kernel, schedule, multiprocessors):
    """Query tiles are cut anywhere: between key tiles, over many CTAs, in the narrow last one."""
    schedule(multiprocessors=multiprocessors, seed=multiprocessors)
    Case(kernel, tokens=190, heads=3, step=4, window_frames=2, text_tokens=8, pinned=True).check()


@pytest.mark.parametrize("wgmma", [0, 2])
@pytest.mark.parametrize("tma", [0, 1, 2])
def test_any_order_of_completion(kernel, schedule, tma, wgmma):
    schedule(multiprocessors=5, seed=3 * tma + wgmma, tma=tma, wgmma=wgmma, shuffle_blocks=True)
    Case(kernel, tokens=150, step=4, text_tokens=20, text_lens=[7]).check()


def test_the_order_of_ctas_does_not_change_a_bit(kernel, schedule):
    schedule(multiprocessors=6)  # the cache has memory for as many
    case = Case(kernel, tokens=150, heads=3, step=5, text_tokens=20)
    results = []
    for seed in (1, 2, 3):
        schedule(seed=seed, shuffle_blocks=True)
        results.append(case.run())
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("step", [0, 1])
def test_hidden_rows_may_be_nan(kernel, schedule, step, pinned):
    """Padding of the text, and slots of the ring that a reset has left as they were."""
    schedule(multiprocessors=3, seed=step, tma=step)
    case = Case(
        kernel,
        tokens=70,
        batch=2,
        step=step,
        text_tokens=150,
        text_lens=[20, 0],
        window_frames=3,
        pinned=pinned,
    )
    hidden = ~case.seen()[..., None, None]
    results = []
    for value in (0, 0x7F, 0xFF):
        for x in (case.cache.k, case.cache.v):
            x[1].view(torch.uint8).masked_fill_(hidden, value)
        results.append(case.run())
    assert results[0][0].isfinite().all() and results[0][1].isfinite().all()
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_scores_of_any_size(kernel, schedule):
    """Scores in the hundreds, and queries of zero, which see every key alike."""
    schedule(multiprocessors=3, seed=0)
    case = Case(kernel, tokens=70, step=3, scale=20.0)
    out, lse = case.run()
    _, emulated_lse = case.oracle(e4m3=True)
    assert out.isfinite().all()
    torch.testing.assert_close(lse.double(), emulated_lse, rtol=1e-3, atol=0)
    case.q.zero_()
    out, lse = case.run()
    exact, exact_lse = case.oracle()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.double(), exact, rtol=2 * BF16, atol=1e-3)


def test_sums_over_many_keys_lose_nothing(kernel, schedule):
    """Values of 1: the sums of all tiles are promoted, because the tensor core keeps 13 bits."""
    schedule(multiprocessors=1, seed=0)
    case = Case(kernel, tokens=64, heads=1, step=40, window_frames=30)
    case.cache.v.copy_(torch.ones_like(case.cache.v, dtype=torch.float32).to(E4M3))
    case.cache.v_scale.fill_(1.0)
    out, _ = case.run()
    assert abs(float(out.double().mean()) - 1) < 2e-3


class Inputs:
    """A kind of inputs of benchmarks/float8_accuracy.py, in a cache without text."""

    def __init__(self, device, name, keys, heads=1, queries=16):
        """keys: a multiple of queries."""
        self.tensors = float8_accuracy.inputs(name, keys, queries, heads)
        q, self.k, self.v = (x.transpose(0, 1)[None].bfloat16() for x in self.tensors)
        self.tensors = [x[0].transpose(0, 1).double() for x in (q, self.k, self.v)]
        self.q, self.device = q.to(device), device
        self.sizes = dict(text_tokens=0, tokens_per_frame=queries, sink_frames=0)
        self.sizes |= dict(window_frames=keys // queries - 1, device=device, dtype=E4M3)

    def run(self, use_hadamard, self_check=False):
        _, keys, heads, head_dim = self.k.shape
        options = dict(use_hadamard=use_hadamard, self_check=self_check)
        cache = KVCache(1, 1, heads, head_dim, **options, **self.sizes)
        _, k, v = self.tensors
        k = float8_accuracy.hadamard(k) if use_hadamard else k
        for scale, x in ((cache.k_scale, k), (cache.v_scale, v)):
            scale[0] = float8_accuracy.largest(x, per_token=False).flatten()
        cache.load_prefix(
            0,
            self.k[:, : -self.q.shape[1]].to(self.device),
            self.v[:, : -self.q.shape[1]].to(self.device),
            keys // self.q.shape[1] - 1,
        )
        newest = [x[:, -self.q.shape[1] :].to(self.device) for x in (self.k, self.v)]
        q = kv_append(self.q, *newest, cache, 0, None, None, None, None)
        return cached_attention(q, cache, 0)[0].transpose(0, 1).double().cpu()


@pytest.mark.parametrize("use_hadamard", [False, True])
@pytest.mark.parametrize("name", float8_accuracy.INPUTS)
def test_accuracy_is_that_of_the_emulation(kernel, schedule, name, use_hadamard):
    """Append, rotation, scales and attention together, within 1.1 times the emulated error."""
    schedule(multiprocessors=2, seed=1)
    case = Inputs(kernel, name, 2048)
    exact = float8_accuracy.attend(*case.tensors)
    emulated = float8_accuracy.attend_e4m3(*case.tensors, use_hadamard=use_hadamard)
    found = float8_accuracy.loss(case.run(use_hadamard), exact)
    bar = float8_accuracy.loss(emulated, exact)
    assert found.error <= 1.1 * bar.error + BF16
    if name == "Gaussian":
        assert found.error <= 0.06 and found.cosine >= 0.998


def test_the_first_call_is_checked(kernel, schedule):
    schedule(multiprocessors=2, seed=1)
    Inputs(kernel, "peaked scores", 512).run(use_hadamard=True, self_check=True)
    words = (
        "cached_attention: expected a cosine of at least 0.99 with attention in float32, got 0.9.* "
        "in head 0 of layer 0; norm queries and keys, or make the cache with dtype=torch.bfloat16"
    )
    with pytest.raises(RuntimeError, match=words):
        Inputs(kernel, "varying norms", 2048).run(use_hadamard=True, self_check=True)


def test_a_check_is_made_once_for_a_layer_and_a_number_of_frames(kernel, schedule, monkeypatch):
    calls = []
    package = import_module("aapt_kernels.cached_attention")
    monkeypatch.setattr(package, "check_attention", lambda *x: calls.append(check_attention(*x)))
    schedule(multiprocessors=2, seed=1)
    case = Case(kernel, tokens=20, frames=2, step=4)
    case.cache.self_check = True
    for frames in (2, 2, 1, 1):
        cached_attention(case.q[:, : frames * 20].contiguous(), case.cache, 1)
    checked = {("cached_attention", 1, 40), ("cached_attention", 1, 20)}
    assert len(calls) == 2 and case.cache.checked == checked
    case.cache.recheck()
    case.run()
    assert len(calls) == 3
    case.cache.k_scale.fill_(math.nan)  # says nothing, so the next call is checked too
    case.cache.recheck()
    case.run()
    assert len(calls) == 4 and not case.cache.checked
    with use_backend("cpu" if kernel == "cpu" else "reference"):
        case.run()
    assert len(calls) == 4  # nothing is rounded there


@pytest.mark.slow
def test_200_000_keys(kernel, schedule):
    schedule(multiprocessors=2, seed=1)
    case = Inputs(kernel, "Gaussian", 200_000)
    found = float8_accuracy.loss(case.run(True), float8_accuracy.attend(*case.tensors))
    assert found.error <= 0.06 and found.cosine >= 0.998


def test_a_pinned_frame_meets_its_own_rotation(kernel, schedule):
    """q and q_sink of kv_append are one query, rotated twice; the cache has the Hadamard matrix."""
    schedule(multiprocessors=3, seed=4)
    tokens, heads = 48, 2
    cache = KVCache(
        *(1, 1, heads, HEAD_DIM),
        **dict(text_tokens=0, tokens_per_frame=tokens, window_frames=1),
        **dict(dtype=E4M3, use_hadamard=True, device=kernel),
    )
    cache.k_scale.fill_(0.02)
    cache.v_scale.fill_(0.01)
    generator = torch.Generator().manual_seed(0)
    keys, values = [], []
    for _ in range(3):
        q, k, v = torch.randn(3, 1, tokens, heads, HEAD_DIM, generator=generator).bfloat16()
        angles = torch.rand(2, tokens, HEAD_DIM // 2, generator=generator) * 6.3
        tables = [x.to(kernel) for x in (angles[0].cos(), angles[0].sin())]
        sink = dict(zip(("cos_sink", "sin_sink"), (angles[1].cos(), angles[1].sin())))
        sink = {name: x.to(kernel) for name, x in sink.items()}
        q_out, q_sink = kv_append(
            *(x.to(kernel) for x in (q, k, v)), cache, 0, None, None, *tables, **sink
        )
        out = cached_attention(q_out, cache, 0, q_sink=q_sink)
        cache.advance()
        keys.append(rotate(k, angles[0].cos(), angles[0].sin()))
        values.append(v)
    k, v = torch.cat(keys, 1), torch.cat(values, 1)
    q, q_sink = (rotate(q, x.cos(), x.sin()) for x in angles)
    seen = torch.ones(1, k.shape[1], dtype=torch.bool)
    exact, _ = attend(q, k, v, seen, HEAD_DIM**-0.5, q_sink=q_sink, sink=slice(0, tokens))
    assert relative(out.cpu(), exact) < 0.07


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k_scale": lambda x: None}, "expected k_scale and v_scale with a cache of float8_e4m3fn"),
        ({"v_scale": lambda x: x.double()}, r"v_scale: expected contiguous float32 \(2,\)"),
        (
            {"k_cache": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)},
            "k_cache: expected memory for a multiple of 16 keys per head, got strides .*; make the",
        ),
        ({"v_cache": lambda x: x.contiguous()}, "v_cache: expected the tokens of a column"),
    ],
)
def test_unsuitable_arguments_never_reach_the_kernel(kernel, change, words):
    case = Case(kernel, tokens=9)
    cache = case.cache
    names = "q k_cache v_cache step text_lens q_sink".split()
    tensors = (case.q, cache.k[1], cache.v[1], cache.step, cache.text_lens, None)
    arguments = dict(zip(names, tensors, strict=True))
    scales = dict(zip(("k_scale", "v_scale"), cache.scales(1), strict=True))
    for name, spoil in change.items():
        held = arguments if name in arguments else scales
        held[name] = spoil(held[name])
    rest = (*cache.integers, case.scale, *scales.values(), None)
    with pytest.raises((RuntimeError, BackendError), match=words):
        torch.ops.aapt.cached_attention(*arguments.values(), *rest)


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 2, 11])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("tokens", [1, 44, 127, 172, 300])
def test_sweep(kernel, schedule, tokens, pinned, step):
    for seed, text in enumerate((0, 64, 201)):
        schedule(
            multiprocessors=(4, 9, 17)[seed % 3],
            seed=seed,
            tma=seed % 3,
            wgmma=seed % 2 * 2,
            shuffle_blocks=True,
        )
        Case(
            kernel,
            tokens=tokens,
            heads=3,
            step=step,
            text_tokens=text,
            text_lens=[math.ceil(text * (seed + 1) / 7)],
            pinned=pinned,
            seed=seed,
        ).check()
