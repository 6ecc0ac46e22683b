"""Block-causal sliding-window attention over `[text | frames]` (SPEC 3), for training.

layout = FrameLayout(text_tokens=24, tokens_per_frame=40, frames=8, window_frames=6)
out = block_causal_attention(q, k, v, layout, text_lens=text_lens)
"""

import torch
from torch import Tensor

from ..backend import deferred, implement, register_autograd, register_fake
from ..checks import check_dense_rows, check_device, check_dtype, check_shape, sm90_limit
from ..layout import FrameLayout
from ..precision import wide
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
    """Attention under the mask of `layout`, which is never materialised.

    q (B, layout.query_length, H, D), k and v (B, layout.key_length, H, D) -> out like q. Any
    strides with a contiguous last dimension.

    text_lens (B,) int32 or int64: text keys from there on are padding that nobody sees; a row that
    sees nothing gives out 0. q_sink (B, frames x tokens_per_frame, H, D): the frame queries as the
    sink keys shall see them, rotated for a clamped distance (SPEC 12). scale: 1 / sqrt(D) unless
    given. prefix_grad=False leaves the gradient rows of `[sink | past]` in k and v zero and saves
    their cost. return_lse also returns the log-sum-exp of the scores, (B, H, query_length) float32
    (float64 for float64 inputs), -inf in a row that sees nothing; it has a gradient as well.

    The sm_90a backward adds to dq in an order that varies from run to run; under
    torch.use_deterministic_algorithms(True) it computes dq apart, which takes about 40 % more
    arithmetic. All other backends are deterministic anyway.

    Raises ValueError or TypeError where an argument does not fit the layout or q.
    """
    batch, _, heads, head_dim = check_shape(
        "q", q, ("batch", layout.query_length, "heads", "head_dim"), str(layout)
    )
    key_shape = (batch, layout.key_length, heads, head_dim)
    frame_shape = (batch, layout.query_length - layout.text_tokens, heads, head_dim)
    check_shape("k", k, key_shape, str(layout))
    check_shape("v", v, key_shape, str(layout))
    tensors = {"q": q, "k": k, "v": v}
    if q_sink is not None:
        check_shape("q_sink", q_sink, frame_shape, str(layout))
        tensors["q_sink"] = q_sink
    check_dense_rows(tensors)
    check_dtype(tensors)
    if text_lens is not None:
        check_shape("text_lens", text_lens, (batch,))
        check_dtype({"text_lens": text_lens}, (torch.int32, torch.int64))
        tensors["text_lens"] = text_lens
    check_device(tensors)
    if not prefix_grad and layout.past_frames is None:
        raise ValueError(
            "prefix_grad: expected True for a layout that starts at frame 0 "
            "(past_frames=None), got False"
        )
    if scale is None:
        scale = head_dim**-0.5
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


register_autograd("block_causal_attention", _backward, _save)
LIMITS = {"cuda": sm90_limit, "triton": deferred(__name__, "limit")}
implement(
    "block_causal_attention",
    limits=LIMITS,
    reference=ref.reference_forward,
    cpu=cpu.forward,
    triton=deferred(__name__),
)
implement(
    "block_causal_attention_backward",
    limits=LIMITS,
    reference=ref.reference_backward,
    cpu=cpu.backward,
    triton=deferred(__name__, "backward"),
)
