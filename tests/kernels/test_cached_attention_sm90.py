"""The sm_90a kernel of cached_attention: simulated everywhere, and on a device if there is one.

Both run the same source through the same host code. The oracle is the reference in float64.
"""

import itertools
import math

import pytest
import torch

from aapt_kernels import KVCache, cached_attention
from aapt_kernels.cached_attention import ref
from aapt_kernels.testing import assert_error_ratio

LSE_TOLERANCE = 2e-5  # one key too many or too few costs more


class Case:
    """The queries of new frames and a cache in the middle of a stream, both random."""

    def __init__(
        self,
        device,
        *,
        tokens,
        frames=1,
        heads=2,
        head_dim=64,
        batch=1,
        text_tokens=0,
        text_lens=None,
        window_frames=2,
        sink_frames=1,
        step=0,
        pinned=False,
        scale=None,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).bfloat16().to(device)

        self.cache = KVCache(
            batch,
            1,
            heads,
            head_dim,
            text_tokens=text_tokens,
            tokens_per_frame=tokens,
            window_frames=window_frames,
            sink_frames=sink_frames,
            dtype=torch.bfloat16,
            device=device,
        )
        self.cache.k.copy_(normal(*self.cache.k.shape))
        self.cache.v.copy_(normal(*self.cache.v.shape))
        self.cache.step.fill_(step)
        lens = [text_tokens] * batch if text_lens is None else text_lens
        self.cache.text_lens.copy_(torch.tensor(lens))
        # Views of one projection, as a model makes them
        queries = normal(batch, frames * tokens, 2, heads, head_dim)
        self.q, q_sink = queries.unbind(2)
        self.q_sink = q_sink if pinned else None
        self.scale = head_dim**-0.5 if scale is None else scale

    def arguments(self, dtype):
        cache = self.cache
        tensors = (self.q, cache.k[0], cache.v[0], cache.step, cache.text_lens, self.q_sink)
        cast = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors]
        return *cast, *cache.integers, self.scale, None, None, None

    def run(self):
        return cached_attention(
            self.q, self.cache, 0, q_sink=self.q_sink, scale=self.scale, return_lse=True
        )

    def check(self):
        out, lse = self.run()
        oracle, oracle_lse = ref.forward(*self.arguments(torch.float64))
        baseline, _ = ref.forward(*self.arguments(torch.bfloat16))
        assert_error_ratio(out, oracle, baseline)
        torch.testing.assert_close(lse.double(), oracle_lse, rtol=0, atol=LSE_TOLERANCE)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 60, 64, 65, 127, 128, 129, 192, 193])
def test_frame_lengths(kernel, schedule, tokens, head_dim):
    schedule(multiprocessors=3, seed=tokens)
    Case(kernel, tokens=tokens, head_dim=head_dim, step=3, text_tokens=17, text_lens=[9]).check()


@pytest.mark.parametrize("step", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("pinned", [False, True])
def test_ring_cold_filling_and_wrapped(kernel, schedule, step, pinned):
    schedule(multiprocessors=4, seed=step)
    Case(kernel, tokens=60, step=step, text_tokens=5, pinned=pinned, seed=step).check()


@pytest.mark.parametrize("step", [0, 1, 2, 9])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize(("frames", "sink_frames"), [(2, 0), (2, 1), (3, 2), (3, 5)])
def test_several_frames(kernel, schedule, frames, sink_frames, pinned, step):
    """Cold, filling and wrapped; more pinned slots than new frames, and fewer."""
    schedule(multiprocessors=4, seed=step)
    Case(
        kernel,
        tokens=50,
        frames=frames,
        sink_frames=sink_frames,
        step=step,
        text_tokens=5,
        pinned=pinned,
        seed=step,
    ).check()


@pytest.mark.parametrize("pinned", [False, True])
def test_a_negative_length_of_text_is_none(kernel, schedule, pinned):
    schedule(multiprocessors=2, seed=1)
    Case(kernel, tokens=60, step=1, text_tokens=5, text_lens=[-3], pinned=pinned).check()


def test_a_workspace_is_left_as_it_was_found(kernel, schedule):
    """Calls of any number of frames, cut into shares, count their parts from zero."""
    schedule(multiprocessors=5, seed=1)
    first = Case(kernel, tokens=130, frames=3, step=4)
    workspace = first.cache.workspace
    assert workspace is not None and not workspace.any()
    for frames in (3, 1, 2):
        case = Case(kernel, tokens=130, frames=frames, step=4, seed=frames)
        case.cache.workspace = workspace
        case.check()
        assert workspace.any()  # query tiles were shared
        # 64 rows each of tiles of 192, of two heads, for as many frames as fit
        blocks = 2 * math.ceil(3 * 130 / 192) * 3
        assert not workspace[:blocks].any()
    twin = first.cache.clone()
    assert twin.workspace is None  # a snapshot has no use for it
    first.cache = twin
    first.run()
    assert twin.workspace.shape == workspace.shape
    assert twin.workspace.data_ptr() != workspace.data_ptr()


def test_a_workspace_that_is_too_small_is_refused(kernel, schedule):
    schedule(multiprocessors=5, seed=1)
    case = Case(kernel, tokens=130, step=4)
    case.cache.workspace = case.cache.workspace[:-1]
    with pytest.raises(RuntimeError, match="workspace: expected at least .* words, got"):
        case.run()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sink_frames", [0, 1, 2])
def test_pinned_rotation(kernel, schedule, sink_frames, head_dim):
    schedule(multiprocessors=5, seed=1)
    Case(
        kernel,
        tokens=100,
        head_dim=head_dim,
        sink_frames=sink_frames,
        step=7,
        text_tokens=40,
        text_lens=[13],
        pinned=True,
    ).check()


def test_every_sample_has_its_own_text(kernel, schedule):
    schedule(multiprocessors=7, seed=2)
    Case(
        kernel, tokens=40, batch=4, heads=3, step=5, text_tokens=512, text_lens=[0, 1, 257, 512]
    ).check()


@pytest.mark.parametrize(("tokens", "head_dim"), [(250, 64), (190, 128)])
@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 5, 8, 13, 132])
def test_any_number_of_shares(kernel, schedule, multiprocessors, tokens, head_dim):
    """Query tiles are cut anywhere: between key tiles, over many CTAs, in the narrow last one."""
    schedule(multiprocessors=multiprocessors, seed=multiprocessors)
    Case(
        kernel,
        tokens=tokens,
        heads=3,
        head_dim=head_dim,
        step=6,
        window_frames=4,
        text_tokens=8,
    ).check()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("wgmma", [0, 2])
@pytest.mark.parametrize("tma", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_order_of_completion(kernel, schedule, seed, tma, wgmma, head_dim):
    schedule(multiprocessors=5, seed=seed, tma=tma, wgmma=wgmma, shuffle_blocks=True)
    Case(kernel, tokens=150, head_dim=head_dim, step=4, text_tokens=20, text_lens=[7]).check()


def test_the_order_of_ctas_does_not_change_a_bit(kernel, schedule):
    schedule(multiprocessors=6)  # the cache has memory for as many
    case = Case(kernel, tokens=150, heads=3, step=5, text_tokens=20)
    results = []
    for seed in (1, 2, 3):
        schedule(seed=seed, shuffle_blocks=True)
        results.append(case.run())
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seed", range(6))
def test_many_narrow_tiles_in_a_row(kernel, schedule, seed, head_dim):
    """A warpgroup that skips another's key tile must not let it be refilled before all its lanes
    have seen it come."""
    schedule(multiprocessors=(4, 9, 17)[seed % 3], seed=seed, tma=seed % 3, wgmma=seed % 2 * 2)
    text = (0, 0, 64, 64, 200, 200)[seed]
    lens = [math.ceil(text * (seed + 1) / 7)]
    Case(
        kernel,
        tokens=60,
        heads=24,
        head_dim=head_dim,
        text_tokens=text,
        text_lens=lens,
        pinned=bool(seed % 2),
        seed=seed,
    ).check()


def test_large_scores_do_not_overflow(kernel, schedule):
    schedule(multiprocessors=3, seed=0)
    case = Case(kernel, tokens=70, step=3, scale=20.0)
    out, lse = case.run()
    assert out.isfinite().all() and lse.isfinite().all()
    oracle, oracle_lse = ref.forward(*case.arguments(torch.float64))
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=0)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_hidden_rows_may_be_nan(kernel, schedule, step, pinned, head_dim):
    """Padding of the text, and slots of the ring that a reset has left as they were."""
    schedule(multiprocessors=3, seed=step, tma=step)
    case = Case(
        kernel,
        tokens=70,
        head_dim=head_dim,
        batch=2,
        step=step,
        text_tokens=150,
        text_lens=[20, 0],
        window_frames=3,
        pinned=pinned,
    )
    cache = case.cache
    seen = ref.visible(cache.step, 1, cache.text_lens, cache.k.shape[2], cache.integers)
    hidden = ~seen[None, :, :, None, None]
    assert hidden.any()
    results = []
    for key_value, value in ((0.0, 0.0), (math.nan, math.inf), (math.inf, math.nan)):
        case.cache.k.masked_fill_(hidden, key_value)
        case.cache.v.masked_fill_(hidden, value)
        results.append(case.run())
    assert results[0][0].isfinite().all() and results[0][1].isfinite().all()
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_unsuitable_arguments_are_refused(kernel):
    case = Case(kernel, tokens=8)
    with pytest.raises(RuntimeError, match="scale: expected"):
        cached_attention(case.q, case.cache, 0, scale=-1.0)
    with pytest.raises(RuntimeError, match="text_lens: expected"):
        arguments = list(case.arguments(torch.bfloat16))
        arguments[4] = arguments[4].int()
        torch.ops.aapt.cached_attention(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("step", [0, 2, 11])
@pytest.mark.parametrize("heads", [1, 3, 24])
@pytest.mark.parametrize("tokens", [1, 44, 60, 127, 129, 172, 300])
def test_sweep(kernel, schedule, tokens, heads, step, head_dim):
    for seed, (text, pinned) in enumerate(itertools.product((0, 64, 200), (False, True))):
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
            heads=heads,
            head_dim=head_dim,
            step=step,
            text_tokens=text,
            text_lens=[math.ceil(text * (seed + 1) / 7)],
            pinned=pinned,
            seed=seed,
        ).check()
