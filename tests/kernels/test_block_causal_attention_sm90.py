"""The sm_90a kernels of block_causal_attention: simulated everywhere, and on a device if there is
one. Both run the same sources through the same host code. The oracle is the reference in float64.
"""

import itertools

import pytest
import torch

from aapt_kernels import FrameLayout, block_causal_attention, use_backend
from aapt_kernels.backend import BackendError
from aapt_kernels.block_causal_attention import ref
from aapt_kernels.block_causal_attention.cases import LAYOUTS
from aapt_kernels.testing import assert_error_ratio

from .broken import check_broken_frame, differentiate, make_tensors

LSE_TOLERANCE = 2e-5  # one key too many or too few costs more
OPS = torch.ops.aapt
NAMES = ("dq", "dk", "dv", "dq_sink")


class Case:
    """Random inputs of both directions, strided as a model makes them."""

    def __init__(
        self,
        device,
        layout,
        *,
        batch=1,
        heads=2,
        head_dim=64,
        text_lens=None,
        pinned=False,
        prefix_grad=True,
        scale=None,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(length, parts=1):
            x = torch.randn(batch, length, parts, heads, head_dim, generator=generator)
            return x.bfloat16().to(device).unbind(2)

        self.layout = layout
        query, key, text = layout.query_length, layout.key_length, layout.text_tokens
        self.q, _ = normal(query, 2)
        self.k, self.v, _ = normal(key, 3)
        (self.dout,) = normal(query)
        self.dlse = torch.randn(batch, heads, query, generator=generator).to(device)
        self.q_sink = normal(query - text, 2)[1] if pinned else None
        self.text_lens = None
        if text_lens is not None:
            self.text_lens = torch.tensor(text_lens).clamp(max=text).to(device)
        scale = head_dim**-0.5 if scale is None else scale
        self.arguments = (*layout.integers, scale, prefix_grad)

    def inputs(self, dtype):
        tensors = (self.q, self.k, self.v, self.text_lens, self.q_sink)
        return [x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors]

    def forward(self):
        return OPS.block_causal_attention(*self.inputs(torch.bfloat16), *self.arguments)

    def check_forward(self):
        out, lse = self.forward()
        oracle, oracle_lse = ref.forward(*self.inputs(torch.float64), *self.arguments)
        baseline, _ = ref.forward(*self.inputs(torch.bfloat16), *self.arguments)
        assert_error_ratio(out, oracle, baseline)
        torch.testing.assert_close(lse.double(), oracle_lse, rtol=0, atol=LSE_TOLERANCE)

    def backward(self, out, lse, dlse=True, deterministic=False):
        dlse = torch.where(lse.isfinite(), self.dlse, 0) if dlse else None
        return OPS.block_causal_attention_backward(
            self.dout,
            dlse,
            self.q,
            self.k,
            self.v,
            out,
            lse,
            self.text_lens,
            self.q_sink,
            *self.arguments,
            deterministic,
        )

    def check_backward(self, **options):
        out, lse = self.forward()
        gradients = self.backward(out, lse, **options)
        dlse = torch.where(lse.isfinite(), self.dlse, 0) if options.get("dlse", True) else None

        def plain(dtype):
            q, k, v, text_lens, q_sink = self.inputs(dtype)
            exact = ref.forward(q, k, v, text_lens, q_sink, *self.arguments)
            wide = dlse if dlse is None else dlse.to(exact[1].dtype)
            tensors = (self.dout.to(dtype), wide, q, k, v, *exact, text_lens, q_sink)
            return ref.backward(*tensors, *self.arguments, False)

        triples = zip(NAMES, gradients, plain(torch.float64), plain(torch.bfloat16), strict=True)
        for name, ours, oracle, baseline in triples:
            assert_error_ratio(ours, oracle, baseline, name)
        return gradients


QUICK = {"tiny-world", "no-text", "text-only", "two-sinks", "past-two-sinks"}
NAMED = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in LAYOUTS]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_forward(kernel, schedule, name, pinned, head_dim):
    schedule(multiprocessors=3, seed=len(name))
    heads = 1 if name == "large-frames" else 2
    Case(kernel, LAYOUTS[name], heads=heads, head_dim=head_dim, pinned=pinned).check_forward()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_backward(kernel, schedule, name, pinned, head_dim, deterministic):
    schedule(multiprocessors=3, seed=len(name))
    heads = 1 if name == "large-frames" else 2
    case = Case(kernel, LAYOUTS[name], heads=heads, head_dim=head_dim, pinned=pinned)
    case.check_backward(deterministic=deterministic)


@pytest.mark.parametrize("tokens", [1, 60, 63, 64, 65, 127, 129, 150])
def test_frame_lengths(kernel, schedule, tokens):
    schedule(multiprocessors=4, seed=tokens)
    frames = 2 if tokens > 64 else 5
    case = Case(kernel, FrameLayout(9, tokens, frames, 1), head_dim=128, text_lens=[5])
    case.check_forward()
    case.check_backward()


@pytest.mark.parametrize("tokens", [63, 65, 127, 191, 192, 193])
def test_frame_lengths_of_three_warpgroups(kernel, schedule, tokens):
    """The forward of head_dim 64, whose query tiles have 192 rows."""
    schedule(multiprocessors=4, seed=tokens, tma=tokens % 3, wgmma=tokens % 2 * 2)
    frames = 2 if tokens > 64 else 5
    Case(kernel, FrameLayout(9, tokens, frames, 1), text_lens=[5]).check_forward()


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_sample_has_its_own_text(kernel, schedule, deterministic):
    schedule(multiprocessors=5, seed=2)
    layout = FrameLayout(140, 30, 2, 1)
    case = Case(kernel, layout, batch=4, heads=3, text_lens=[0, 1, 129, 140], pinned=True)
    case.check_forward()
    case.check_backward(deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_prefix_without_gradient(kernel, schedule, pinned, deterministic):
    """Tiles of the prefix alone skip two products, and its rows are zero wherever they lie."""
    schedule(multiprocessors=3, seed=3)
    layout = FrameLayout(10, 100, 2, 3, past_frames=3)
    case = Case(kernel, layout, pinned=pinned, prefix_grad=False, text_lens=[7])
    _, dk, dv, _ = case.check_backward(deterministic=deterministic)
    start, end = layout.prefix
    assert (dk[:, start:end] == 0).all() and (dv[:, start:end] == 0).all()


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 132])
def test_any_number_of_shares(kernel, schedule, multiprocessors):
    schedule(multiprocessors=multiprocessors, seed=multiprocessors)
    case = Case(kernel, FrameLayout(20, 90, 3, 1), heads=3)
    case.check_forward()
    case.check_backward()


def test_more_pairs_than_take_turns(kernel, schedule):
    schedule(multiprocessors=9, seed=4)
    case = Case(kernel, FrameLayout(3, 17, 2, 0), batch=2, heads=13)
    case.check_forward()
    case.check_backward()


@pytest.mark.parametrize("wgmma", [0, 1, 2])
@pytest.mark.parametrize("tma", [0, 1, 2])
def test_any_order_of_completion(kernel, schedule, tma, wgmma):
    case = Case(kernel, FrameLayout(20, 70, 3, 1), head_dim=128, text_lens=[7], pinned=True)
    for seed in (1, 2):
        schedule(multiprocessors=5, seed=seed, tma=tma, wgmma=wgmma, shuffle_blocks=True)
        case.check_forward()
        case.check_backward(deterministic=seed == 2)


def test_deterministic_means_bit_for_bit(kernel, schedule):
    """Whatever the order of CTAs, copies and sums; and that order does change the other mode."""
    case = Case(kernel, FrameLayout(20, 150, 4, 2), heads=2)
    out, lse = case.forward()
    results = {True: [], False: []}
    for seed in (1, 2, 3):
        schedule(multiprocessors=6, seed=seed, tma=1, shuffle_blocks=True)
        for deterministic, runs in results.items():
            runs.append(case.backward(out, lse, deterministic=deterministic))
    for runs in results.values():
        for run in runs[1:]:  # dk and dv are sums in one CTA in either mode
            assert torch.equal(run[1], runs[0][1]) and torch.equal(run[2], runs[0][2])
    assert all(torch.equal(run[0], results[True][0][0]) for run in results[True])
    if kernel == "cpu":
        assert any(not torch.equal(run[0], results[False][0][0]) for run in results[False])


def test_the_mode_follows_pytorch(kernel, schedule, monkeypatch):
    """torch.use_deterministic_algorithms, as autograd calls the op."""
    schedule(multiprocessors=2, seed=0)
    seen = []
    op = OPS.block_causal_attention_backward
    monkeypatch.setattr(
        OPS, "block_causal_attention_backward", lambda *x: seen.append(x[-1]) or op(*x)
    )
    case = Case(kernel, FrameLayout(0, 8, 1, 0))
    before = torch.are_deterministic_algorithms_enabled()
    for wanted in (True, False):
        torch.use_deterministic_algorithms(wanted, warn_only=True)
        q = case.q.detach().requires_grad_()
        block_causal_attention(q, case.k, case.v, case.layout).sum().backward()
    torch.use_deterministic_algorithms(before, warn_only=True)
    assert seen == [True, False]


def test_gradients_arrive_in_any_layout(kernel, schedule):
    """The gradient of a sum is expanded; a transposed projection gives it head-major."""
    schedule(multiprocessors=2, seed=0)
    case = Case(kernel, FrameLayout(3, 40, 2, 1))
    head_major = case.dout.transpose(1, 2).contiguous().transpose(1, 2)
    ones = torch.ones((), dtype=torch.bfloat16, device=case.q.device)
    for gradient in (head_major, ones.expand(case.dout.shape)):
        results = []
        for dout in (gradient, gradient.contiguous()):
            q = case.q.detach().requires_grad_()
            out = block_causal_attention(q, case.k, case.v, case.layout)
            results += torch.autograd.grad(out, q, dout)
        assert_error_ratio(results[0], results[1].double(), results[1])


def test_expanded_inputs_equal_their_copies(kernel, schedule):
    """Keys and values that all heads, or all samples, share."""
    schedule(multiprocessors=2, seed=0)
    case = Case(kernel, FrameLayout(3, 40, 2, 1), batch=2, pinned=True)
    shape = case.k.shape
    case.k, case.v = case.k[:, :, :1].expand(shape), case.v[:1].expand(shape)
    case.q_sink = case.q_sink[:1].expand(case.q_sink.shape)
    results = []
    for _ in range(2):
        out, lse = case.forward()
        results.append((out, lse, *case.backward(out, lse, deterministic=True)))
        case.k, case.v = case.k.contiguous(), case.v.contiguous()
        case.q_sink = case.q_sink.contiguous()
    for expanded, copied in zip(*results, strict=True):
        assert torch.equal(expanded, copied)


def test_large_scores_do_not_overflow(kernel, schedule):
    schedule(multiprocessors=3, seed=0)
    case = Case(kernel, FrameLayout(3, 40, 3, 1), scale=20.0)
    out, lse = case.forward()
    _, oracle_lse = ref.forward(*case.inputs(torch.float64), *case.arguments)
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=0)
    assert all(x.isfinite().all() for x in (out, *case.backward(out, lse)))


HIDDEN = {
    "padded text": (FrameLayout(150, 60, 3, 1), [20, 0]),
    "padded text before a sink": (FrameLayout(90, 70, 4, 1, 1), [80, 33]),
    "frames before the window": (FrameLayout(10, 100, 2, 1, 1, past_frames=3), [7, 10]),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("name", HIDDEN)
def test_keys_that_no_query_sees_may_be_nan(
    kernel, schedule, name, pinned, head_dim, deterministic
):
    schedule(multiprocessors=3, seed=1)
    layout, text_lens = HIDDEN[name]
    case = Case(
        kernel,
        layout,
        batch=2,
        heads=1,
        head_dim=head_dim,
        text_lens=text_lens,
        pinned=pinned,
    )
    key = torch.arange(layout.key_length, device=case.k.device)
    padding = (key >= case.text_lens[:, None]) & (key < layout.text_tokens)
    seen = layout.dense_mask(key.device).any(0) & ~padding
    hidden = ~seen[:, :, None, None]
    assert hidden.any()
    results = []
    for key_value, value in ((0.0, 0.0), (float("nan"), float("inf"))):
        case.k.masked_fill_(hidden, key_value)
        case.v.masked_fill_(hidden, value)
        out, lse = case.forward()
        results.append((out, lse, *case.backward(out, lse, deterministic=deterministic)))
    for tensor, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(tensor, expected)
    _, _, _, dk, dv, _ = results[1]
    assert not dk[hidden.expand_as(dk)].any() and not dv[hidden.expand_as(dv)].any()


SHARED_TILES = {
    "frames of less than a tile": (FrameLayout(5, 23, 6, 1, sink_frames=2), False),
    "the same, clamped": (FrameLayout(5, 23, 6, 1, sink_frames=2), True),
    "after a past": (FrameLayout(3, 7, 8, 2, past_frames=2), True),
    "frames that cross tiles": (FrameLayout(28, 100, 4, 1), False),
}
NAN, INF = torch.nan, torch.inf
BROKEN = [("qkv", NAN), ("q", NAN), ("k", NAN), ("k", INF), ("v", NAN), ("v", INF), ("dout", NAN)]


@pytest.mark.parametrize("head_dim, deterministic", [(64, False), (128, False), (128, True)])
@pytest.mark.parametrize("broken, bad", BROKEN)
@pytest.mark.parametrize("name", SHARED_TILES)
def test_a_broken_frame_in_a_shared_tile(
    kernel, schedule, name, broken, bad, head_dim, deterministic
):
    """Reaches what sees it, as in the reference, and nothing else."""
    schedule(multiprocessors=3, seed=len(name))
    layout, clamped = SHARED_TILES[name]
    tensors, dout, dlse = make_tensors(layout, torch.bfloat16, clamped, (1, 1, head_dim), kernel)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    names = (broken,) if broken == "dout" else tuple(broken)
    results = check_broken_frame(layout, tensors, dout, dlse, names, bad)
    torch.use_deterministic_algorithms(before, warn_only=True)
    if bad == bad:  # beside infinity, only NaN is the same everywhere
        return
    with use_backend("reference"):
        expected = differentiate(tensors, layout, None, dout, dlse)
    for ours, reference in zip(results, expected, strict=True):
        assert not (reference.isnan() & ~ours.isnan()).any()


def test_a_broken_prefix_without_gradient(kernel, schedule):
    schedule(multiprocessors=3, seed=3)
    layout = FrameLayout(10, 100, 2, 3, past_frames=3)
    case = Case(kernel, layout, prefix_grad=False)
    start, end = layout.prefix
    case.k[:, end - 1] = NAN
    out, lse = case.forward()
    assert (
        out[:, layout.text_tokens :].isnan().all() and out[:, : layout.text_tokens].isfinite().all()
    )
    for deterministic in (False, True):
        _, dk, dv, _ = case.backward(out, lse, deterministic=deterministic)
        assert not dk[:, start:end].any() and not dv[:, start:end].any()
        assert dk[:, end:].isnan().all()


def test_text_lengths_beyond_the_text_are_cut(kernel, schedule):
    schedule(multiprocessors=2, seed=0)
    layout = FrameLayout(9, 20, 2, 1)
    case = Case(kernel, layout, batch=2)
    expected, _ = case.forward()
    case.text_lens = torch.tensor([9, 1000], dtype=torch.int32, device=case.q.device)
    assert torch.equal(case.forward()[0], expected)


def test_unsuitable_arguments_are_refused(kernel):
    case = Case(kernel, FrameLayout(2, 8, 1, 0), scale=-1.0)
    with pytest.raises(RuntimeError, match="scale: expected a positive number"):
        case.forward()
    case = Case(kernel, FrameLayout(2, 8, 1, 0))
    tensors = case.inputs(torch.bfloat16)
    with pytest.raises(RuntimeError, match="k: expected"):
        OPS.block_causal_attention(tensors[0], tensors[1][:, :5], *tensors[2:], *case.arguments)
    out, lse = case.forward()
    with pytest.raises(RuntimeError, match="lse: expected"):
        case.backward(out, lse.double())
    x = torch.zeros(1, 8, 1, 32, dtype=torch.bfloat16, device=case.q.device)
    with pytest.raises(BackendError, match="it takes bfloat16 with head_dim 64 or 128"):
        block_causal_attention(x, x, x, FrameLayout(0, 8, 1, 0))


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("past", [None, 0, 2])
@pytest.mark.parametrize("window", [0, 1, None])
@pytest.mark.parametrize("tokens", [1, 44, 127, 129, 172, 300])
def test_sweep(kernel, schedule, tokens, window, past, head_dim, pinned):
    frames = 6 if tokens < 100 else 2
    for seed, (text, sinks) in enumerate(itertools.product((0, 64, 200), (0, 1, 2))):
        schedule(
            multiprocessors=(4, 9, 17)[seed % 3],
            seed=seed,
            tma=seed % 3,
            wgmma=seed % 2 * 2,
            shuffle_blocks=True,
        )
        layout = FrameLayout(text, tokens, frames, window, sinks, past)
        case = Case(
            kernel,
            layout,
            head_dim=head_dim,
            text_lens=[text * (seed + 1) // 9],
            pinned=pinned,
            prefix_grad=past is None or seed % 2 == 0,
            seed=seed,
        )
        case.check_forward()
        case.check_backward(deterministic=seed % 4 == 3)
