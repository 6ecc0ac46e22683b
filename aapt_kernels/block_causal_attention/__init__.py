"""Block-causal sliding-window attention over `[text | frames]` (docs/method.md#3), for training.

layout = FrameLayout(text_tokens=24, tokens_per_frame=40, frames=8, window_frames=6)
out = block_causal_attention(q, k, v, layout, text_lens=text_lens)
"""

import torch
from torch import Tensor

from ..backend import deferred, for_simulator, implement, register_autograd, register_fake
from ..checks import (
    check_dense_rows,
    check_device,
    check_dtype,
    check_no_tangent,
    check_shape,
    scale_limit,
    sm90_limit,
)
from ..layout import FrameLayout
from ..precision import follow_autocast, wide
from . import cpu, ref


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: FrameLayout,
    *,
    text_lens: Tensor | None = None,
    q_sink: Tensor | None = None,
    scale: float | None = None,
    prefix_grad: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend under the mask of `layout`, which is never materialised.

    q (B, layout.query_length, H, D), k and v (B, layout.key_length, H, D) -> out like q. Any
    strides with a contiguous last dimension. Under autocast q, k, v and q_sink are cast to its
    dtype; otherwise they share one.

    text_lens (B,) int32 or int64: number of text tokens per sample; text keys from there on are
    padding that nobody sees, and a row that sees nothing gives out 0. q_sink
    (B, frames x tokens_per_frame, H, D): the frame queries that meet the sink keys, rotated for a
    clamped distance (docs/method.md#12); q unless given. scale: factor of the scores, 1 / sqrt(D)
    unless given. prefix_grad=False leaves the gradient rows of `[sink | past]` in k and v zero and
    saves their cost. return_lse also returns the log-sum-exp of the scores, (B, H, query_length)
    float32 (float64 for float64 inputs), -inf in a row that sees nothing; it has a gradient too.

    A key that a row does not see reaches neither its output nor a gradient, not even as NaN.

    Differentiable once in q, k, v and q_sink; on the reference again. The sm_90a backward adds to
    dq in an order that varies from run to run; under torch.use_deterministic_algorithms(True) it
    computes dq in a pass of its own, which takes about 40 % more arithmetic. All other backends are
    deterministic anyway.

    Raises ValueError or TypeError if an argument does not fit the layout or q, and
    NotImplementedError in forward-mode differentiation.
    """
    q, k, v, q_sink = follow_autocast(q, k, v, q_sink)
    batch, _, heads, head_dim = check_shape(
        "q", q, ("batch", layout.query_length, "heads", "head_dim"), layout
    )
    key_shape = (batch, layout.key_length, heads, head_dim)
    frame_shape = (batch, layout.query_length - layout.text_tokens, heads, head_dim)
    check_shape("k", k, key_shape, layout)
    check_shape("v", v, key_shape, layout)
    tensors = {"q": q, "k": k, "v": v}
    if q_sink is not None:
        check_shape("q_sink", q_sink, frame_shape, layout)
        tensors["q_sink"] = q_sink
    check_dense_rows(tensors)
    check_dtype(tensors)
    check_no_tangent("block_causal_attention", tensors)
    if text_lens is not None:
        check_shape("text_lens", text_lens, (batch,))
        check_dtype({"text_lens": text_lens}, (torch.int32, torch.int64))
        tensors["text_lens"] = text_lens = text_lens.contiguous()
    check_device(tensors)
    if not prefix_grad and layout.past_frames is None:
        raise ValueError(
            "prefix_grad: expected True for a layout that starts at frame 0 "
            "(past_frames=None), got False"
        )
    if scale is None:
        scale = max(head_dim, 1) ** -0.5
    q, k, v, q_sink = for_simulator(q, k, v, q_sink)
    out, lse = torch.ops.aapt.block_causal_attention(
        q, k, v, text_lens, q_sink, *layout.integers, scale, prefix_grad
    )
    return (out, lse) if return_lse else out


@register_fake("block_causal_attention")
def _(q, k, v, *_):
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((batch, heads, length), dtype=wide(q.dtype))


@register_fake("block_causal_attention_backward")
def _(dout, dlse, q, k, v, out, lse, text_lens, q_sink, *_):
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return *gradients, q.new_empty(0 if q_sink is None else q_sink.shape)


def _save(ctx, inputs, output):
    q, k, v, text_lens, q_sink, *ctx.arguments = inputs
    ctx.save_for_backward(q, k, v, *output, text_lens, q_sink)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse, text_lens, q_sink = ctx.saved_tensors
    check_no_tangent("block_causal_attention_backward", {"dout": dout, "dlse": dlse})
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dq_sink = torch.ops.aapt.block_causal_attention_backward(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        text_lens,
        q_sink,
        *ctx.arguments,
        torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv, None, None if q_sink is None else dq_sink, *[None] * len(ctx.arguments)


def _sm90_limit(q, k=None, v=None, text_lens=None, q_sink=None, *options):
    scale = options[-2] if options else None
    return sm90_limit(q, k=k, v=v, text_lens=text_lens, q_sink=q_sink) or scale_limit(scale)


def _sm90_backward_limit(dout, dlse=None, q=None, k=None, v=None, out=None, lse=None, *rest):
    gradients = {"dout": dout, "dlse": dlse}  # others than contiguous ones are copied
    given = {name: x for name, x in gradients.items() if x is not None and x.is_contiguous()}
    reason = sm90_limit(dout if q is None else q, out=out, lse=lse, **given)
    return reason or (_sm90_limit(q, k, v, *rest[:-1]) if rest else None)


implement(
    "block_causal_attention",
    limits={"cuda": _sm90_limit, "triton": deferred(__name__, "limit")},
    reference=ref.reference_forward,
    cpu=cpu.forward,
    triton=deferred(__name__),
)
implement(
    "block_causal_attention_backward",
    limits={"cuda": _sm90_backward_limit, "triton": deferred(__name__, "limit")},
    reference=ref.reference_backward,
    cpu=cpu.backward,
    triton=deferred(__name__, "backward"),
)
register_autograd("block_causal_attention", _backward, _save)
