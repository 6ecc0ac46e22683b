"""block_causal_attention against dense SDPA, FlexAttention, a float64 oracle and itself."""

import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from aapt_kernels import FrameLayout, block_causal_attention
from aapt_kernels.block_causal_attention import cpu, ref
from aapt_kernels.block_causal_attention.cases import LAYOUTS, make_inputs
from aapt_kernels.testing import assert_error_ratio

from .oracles import spec_mask

SMALL = {name: layout for name, layout in LAYOUTS.items() if layout.tokens_per_frame < 100}
NAMES = ("out", "lse", "dq", "dk", "dv", "dq_sink")


def differentiate(function, inputs, names, dlse=True):
    """Outputs and gradients of function(**inputs) -> (out, lse); -inf rows of lse give none."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    out, lse = function(**leaves)
    seen = lse.isfinite()
    targets, gradients = [out], [inputs["dout"]]
    if dlse:
        targets.append(lse)
        gradients.append(torch.where(seen, inputs["dlse"], 0))
    return out, lse, *torch.autograd.grad(targets, leaves.values(), gradients)


def dense_attention(layout, mask, q, k, v, q_sink=None):
    """Plain autograd attention under a boolean mask (B or 1, query, key)."""
    scale = q.shape[-1] ** -0.5
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if q_sink is not None:
        text, tokens = layout.text_tokens, layout.tokens_per_frame
        given = layout.frames if layout.past_frames is None else layout.sink_frames
        sink = slice(text, text + min(layout.sink_frames, given) * tokens)
        padded = torch.cat([q[:, :text], q_sink], dim=1)
        sink_scores = torch.einsum("bqhd,bkhd->bhqk", padded, k[:, sink]) * scale
        scores = torch.cat([scores[..., : sink.start], sink_scores, scores[..., sink.stop :]], -1)
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    p = torch.exp(scores - torch.where(lse.isfinite(), lse, 0)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", p.to(v.dtype), v), lse


@pytest.mark.parametrize("q_sink", [False, True])
@pytest.mark.parametrize("text_lens", [None, (0, 2)])
@pytest.mark.parametrize("layout", SMALL.values(), ids=SMALL)
def test_value_and_gradients(backend, layout, text_lens, q_sink):
    inputs = make_inputs(layout)
    names = ("q", "k", "v", "q_sink") if q_sink else ("q", "k", "v")
    lens = None if text_lens is None else torch.tensor(text_lens).clamp(max=layout.text_tokens)
    mask = spec_mask(layout, lens)
    expected = differentiate(
        lambda **leaves: dense_attention(layout, mask, **leaves), inputs, names
    )
    actual = differentiate(
        lambda **leaves: block_causal_attention(
            **leaves, layout=layout, text_lens=lens, return_lse=True
        ),
        inputs,
        names,
    )
    for name, ours, theirs in zip(NAMES, actual, expected, strict=False):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: n + m
        )
    assert actual[0].is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_dense_scaled_dot_product_attention(backend, layout):
    inputs = make_inputs(layout)
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.dense_mask())
    actual = block_causal_attention(inputs["q"], inputs["k"], inputs["v"], layout)
    torch.testing.assert_close(actual.transpose(1, 2), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["odd", "short-past", "two-sinks", "no-window", "unlimited"])
def test_equals_flex_attention(backend, name):
    layout = LAYOUTS[name]
    inputs = make_inputs(layout, dtype=torch.float32)

    def score_mod(score, batch, head, query, key):
        return torch.where(layout.mask_mod(batch, head, query, key), score, -torch.inf)

    q, k, v = (inputs[name].transpose(1, 2).contiguous() for name in ("q", "k", "v"))
    expected = flex_attention(q, k, v, score_mod=score_mod)
    actual = block_causal_attention(inputs["q"], inputs["k"], inputs["v"], layout)
    torch.testing.assert_close(actual.transpose(1, 2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["tiny-world", "odd", "short-past", "large-frames", "whole-clip", "frame-and-past"]
)
def test_error_is_at_most_twice_that_of_plain_pytorch(backend, name, dtype):
    layout = LAYOUTS[name]
    inputs = make_inputs(layout, heads=2, head_dim=16, dtype=dtype)
    oracle = {key: value.double() for key, value in inputs.items()}
    names = ("q", "k", "v", "q_sink")
    lens = torch.tensor([layout.text_tokens, 1])
    arguments = (*layout.integers, 16**-0.5, True)

    def plain(inputs):
        tensors = [inputs[name] for name in ("q", "k", "v")]
        out, lse = ref.forward(*tensors, lens, inputs["q_sink"], *arguments)
        rest = (out, lse, lens, inputs["q_sink"], *arguments, False)
        gradients = ref.backward(inputs["dout"], inputs["dlse"], *tensors, *rest)
        return out, lse, *gradients

    actual = differentiate(
        lambda **leaves: block_causal_attention(
            **leaves, layout=layout, text_lens=lens, return_lse=True
        ),
        inputs,
        names,
    )
    assert [x.dtype for x in actual] == [dtype, torch.float32] + [dtype] * 4
    for name, ours, exact, baseline in zip(
        NAMES, actual, plain(oracle), plain(inputs), strict=True
    ):
        assert_error_ratio(ours, exact, baseline, name)


def test_gradcheck(backend):
    layout = FrameLayout(1, 2, 2, 1, past_frames=1)
    inputs = make_inputs(layout, batch=1, heads=1, head_dim=2)
    leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v", "q_sink")]

    def function(q, k, v, q_sink):
        return block_causal_attention(
            q, k, v, layout, q_sink=q_sink, text_lens=torch.tensor([1]), return_lse=True
        )

    assert torch.autograd.gradcheck(function, leaves)


def test_gradient_through_the_lse_alone(backend):
    layout = LAYOUTS["odd"]
    q = make_inputs(layout)["q"].requires_grad_()
    _, lse = block_causal_attention(q, q.detach(), q.detach(), layout, return_lse=True)
    (gradient,) = torch.autograd.grad(lse.sum(), q)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, q.detach()) * q.shape[-1] ** -0.5
    dense = scores.masked_fill(~layout.dense_mask(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(gradient, torch.autograd.grad(dense.sum(), q)[0])


def test_prefix_grad_false_leaves_the_prefix_rows_zero(backend):
    for name in ("short-past", "past-two-sinks"):
        layout = LAYOUTS[name]
        inputs = make_inputs(layout)

        def run(prefix_grad, layout=layout, inputs=inputs):
            return differentiate(
                lambda **leaves: block_causal_attention(
                    **leaves, layout=layout, prefix_grad=prefix_grad, return_lse=True
                ),
                inputs,
                ("q", "k", "v", "q_sink"),
            )

        full, part = run(True), run(False)
        start, end = layout.prefix
        for index in (3, 4):
            assert full[index][:, start:end].abs().amin() > 0 or name == "short-past"
            full[index][:, start:end] = 0
        for ours, theirs in zip(part, full, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix_grad", [False, True])
@pytest.mark.parametrize("name", ["whole-clip", "frame-and-past"])
def test_one_frame_that_sees_every_key(backend, monkeypatch, name, prefix_grad, dtype):
    """It is plain attention, and on the cpu backend one call of PyTorch's own."""
    layout = LAYOUTS[name]
    inputs = make_inputs(layout, dtype=dtype)
    monkeypatch.setattr(cpu, "tiles", None)

    def dense(inputs):
        leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v")]
        q, k, v = (x.transpose(1, 2) for x in leaves)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out, *torch.autograd.grad(out, leaves, inputs["dout"])

    prefix = {} if layout.past_frames is None else {"prefix_grad": prefix_grad}
    leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v")]
    out = block_causal_attention(*leaves, layout, **prefix)
    actual = [out, *torch.autograd.grad(out, leaves, inputs["dout"])]
    exact, baseline = dense({key: x.double() for key, x in inputs.items()}), dense(inputs)
    if not prefix.get("prefix_grad", True):
        for gradients in (exact, baseline):
            for gradient in gradients[2:]:
                gradient[:, slice(*layout.prefix)] = 0
    for ours, oracle, theirs, of in zip(actual, exact, baseline, ("out", "dq", "dk", "dv")):
        assert ours.dtype == dtype and ours.is_contiguous()
        if dtype == torch.float64:  # the oracle's own dtype
            torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
        else:
            assert_error_ratio(ours, oracle, theirs, of)


@pytest.mark.parametrize("fails", [False, True])
def test_the_precision_of_the_process_is_as_before(monkeypatch, fails):
    """The backward of bfloat16 narrows products for its own time, also if it fails."""
    seen, whole = [], cpu.tiled_backward

    def observed(*arguments):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        if fails:
            raise MemoryError
        return whole(*arguments)

    monkeypatch.setattr(cpu, "tiled_backward", observed)
    layout = LAYOUTS["odd"]
    inputs = make_inputs(layout, dtype=torch.bfloat16)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(MemoryError) if fails else nullcontext():
        differentiate(
            lambda **leaves: block_causal_attention(**leaves, layout=layout, return_lse=True),
            inputs,
            ("q", "k", "v"),
        )
    assert seen == ["bf16"]
    assert torch.backends.mkldnn.matmul.fp32_precision == before != "bf16"
    torch.get_float32_matmul_precision()  # raises after a mixture of settings


def test_a_row_that_sees_nothing_is_zero_and_has_no_gradient(backend):
    layout = FrameLayout(4, 3, 2, 1)
    inputs = make_inputs(layout, dtype=torch.float32)
    lens = torch.tensor([0, 4])
    out, lse, dq, dk, dv = differentiate(
        lambda q, k, v: block_causal_attention(q, k, v, layout, text_lens=lens, return_lse=True),
        inputs,
        ("q", "k", "v"),
    )
    assert (out[0, :4] == 0).all()
    assert (lse[0, :, :4] == -torch.inf).all()
    for gradient in (dq, dk, dv):
        assert gradient.isfinite().all()
        assert (gradient[0, :4] == 0).all()


def test_two_segments_equal_one(backend):
    """Segment 2 with the detached prefix of segment 1 is the rest of one long pass."""
    text, tokens, window, first, second = 3, 5, 2, 5, 4
    whole = FrameLayout(text, tokens, first + second, window)
    q, k, v = (make_inputs(whole)[name] for name in ("q", "k", "v"))
    expected = block_causal_attention(q, k, v, whole)
    rest = FrameLayout(text, tokens, second, window, past_frames=window)

    def frames(x, start, end):
        return x[:, text + start * tokens : text + end * tokens]

    def with_prefix(x):
        pieces = [(0, 1), (first - window, first), (first, first + second)]
        return torch.cat([x[:, :text], *(frames(x, *piece) for piece in pieces)], dim=1)

    new = torch.cat([q[:, :text], frames(q, first, first + second)], dim=1)
    actual = block_causal_attention(new, with_prefix(k), with_prefix(v), rest)
    torch.testing.assert_close(actual[:, text:], frames(expected, first, first + second))


def test_scale_and_int32_text_lens(backend):
    layout = LAYOUTS["odd"]
    q, k, v = (make_inputs(layout)[name] for name in ("q", "k", "v"))
    lens = torch.tensor([1, 3], dtype=torch.int32)
    doubled = block_causal_attention(2 * q, k, v, layout, text_lens=lens, scale=0.1)
    torch.testing.assert_close(
        block_causal_attention(q, k, v, layout, text_lens=lens.long(), scale=0.2), doubled
    )


LAYOUT = FrameLayout(2, 3, 4, 1, past_frames=1)
WORDS = "for 2 text tokens + 1 sink + 1 past + 4 frames of 3 tokens"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"q": torch.zeros(2, 13, 3, 8)},
            ValueError,
            f"q: expected (batch, 14, heads, head_dim) {WORDS}, got (2, 13, 3, 8)",
        ),
        (
            {"q": torch.zeros(14, 3, 8)},
            ValueError,
            f"q: expected (batch, 14, heads, head_dim) {WORDS}, got (14, 3, 8)",
        ),
        (
            {"k": torch.zeros(2, 14, 3, 8)},
            ValueError,
            f"k: expected (2, 20, 3, 8) {WORDS}, got (2, 14, 3, 8)",
        ),
        (
            {"v": torch.zeros(2, 20, 3, 4)},
            ValueError,
            f"v: expected (2, 20, 3, 8) {WORDS}, got (2, 20, 3, 4)",
        ),
        (
            {"q_sink": torch.zeros(2, 14, 3, 8)},
            ValueError,
            f"q_sink: expected (2, 12, 3, 8) {WORDS}, got (2, 14, 3, 8)",
        ),
        (
            {"k": torch.zeros(2, 20, 3, 8, dtype=torch.float64)},
            TypeError,
            "k: expected torch.float32 like q, got torch.float64",
        ),
        (
            {"q": torch.zeros(2, 14, 3, 8, dtype=torch.int64)},
            TypeError,
            "q: expected torch.float32 or torch.float64 or torch.bfloat16 or torch.float16, "
            "got torch.int64",
        ),
        (
            {"v": torch.zeros(2, 20, 3, 8, device="meta")},
            ValueError,
            "v: expected a tensor on cpu like q, got meta",
        ),
        (
            {"v": torch.zeros(2, 20, 8, 3).transpose(2, 3)},
            ValueError,
            "v: expected a contiguous last dimension (stride 1), got strides (480, 24, 1, 3)",
        ),
        (
            {"text_lens": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "text_lens: expected (2,), got (3,)",
        ),
        (
            {"text_lens": torch.zeros(2)},
            TypeError,
            "text_lens: expected torch.int32 or torch.int64, got torch.float32",
        ),
    ],
)
def test_errors(change, error, words):
    arguments = {
        "q": torch.zeros(2, 14, 3, 8),
        "k": torch.zeros(2, 20, 3, 8),
        "v": torch.zeros(2, 20, 3, 8),
    } | change
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        block_causal_attention(**arguments, layout=LAYOUT)


def test_prefix_grad_needs_a_prefix():
    layout = FrameLayout(0, 1, 1, 1)
    x = torch.zeros(1, 1, 1, 1)
    words = "prefix_grad: expected True for a layout that starts at frame 0 (past_frames=None)"
    with pytest.raises(ValueError, match=re.escape(words)):
        block_causal_attention(x, x, x, layout, prefix_grad=False)
