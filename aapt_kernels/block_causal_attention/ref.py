"""The specification: block-causal attention with a dense mask, forward and backward.

With s = scale q k^T (the sink columns from q_sink, where given), masked to -inf where unseen,

    p = softmax(s)    lse = logsumexp(s)    out = p v
    dv = p^T dout     ds = p (dout v^T - rowsum(dout out) + dlse)     dq = scale ds k,  dk = ...

Everything is computed in the dtype of q, so float64 inputs give an oracle and bfloat16 inputs the
error that plain PyTorch makes.
"""

import torch
from torch import Tensor

from ..layout import FrameLayout
from ..precision import dense, widen


def scores(
    q: Tensor,
    k: Tensor,
    q_sink: Tensor | None,
    text_lens: Tensor | None,
    layout: FrameLayout,
    scale: float,
) -> Tensor:
    """(B, H, query_length, key_length), -inf where the mask hides the key."""
    s = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    if q_sink is not None:
        start, end = layout.sink
        sink = torch.einsum("bqhd,bkhd->bhqk", q_sink * scale, k[:, start:end])
        s[:, :, layout.text_tokens :, start:end] = sink
    seen = layout.dense_mask(q.device)
    if text_lens is not None:
        key = torch.arange(layout.key_length, device=q.device)
        seen = seen & ((key < text_lens[:, None]) | (key >= layout.text_tokens))[:, None, None]
    return s.masked_fill(~seen, -torch.inf)


def probabilities(s: Tensor) -> Tensor:
    """softmax(s), zero in a row that sees nothing."""
    return torch.where((s == -torch.inf).all(-1, keepdim=True), 0, s.softmax(-1))


def forward(q, k, v, text_lens, q_sink, *arguments):
    *integers, scale, _ = arguments
    s = scores(q, k, q_sink, text_lens, FrameLayout(*integers), scale)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities(s), v)
    return out, s.logsumexp(-1)


def backward(dout, dlse, q, k, v, out, lse, text_lens, q_sink, *arguments):
    *integers, scale, prefix_grad, _ = arguments
    layout = FrameLayout(*integers)
    p = probabilities(scores(q, k, q_sink, text_lens, layout, scale))
    dv = torch.einsum("bhqk,bqhd->bkhd", p, dout)
    row = torch.einsum("bqhd,bqhd->bhq", dout, out)
    if dlse is not None:
        row = row - dlse.to(row.dtype)
    ds = p * (torch.einsum("bqhd,bkhd->bhqk", dout, v) - row[..., None]) * scale

    dq_sink = q.new_empty(0)
    ds_sink = None
    if q_sink is not None:
        start, end = layout.sink
        ds_sink = ds[:, :, layout.text_tokens :, start:end].clone()
        ds[:, :, layout.text_tokens :, start:end] = 0
        dq_sink = torch.einsum("bhqk,bkhd->bqhd", ds_sink, k[:, start:end])
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, k)
    dk = torch.einsum("bhqk,bqhd->bkhd", ds, q)
    if q_sink is not None:
        dk[:, start:end] += torch.einsum("bhqk,bqhd->bkhd", ds_sink, q_sink)
    if not prefix_grad:
        start, end = layout.prefix
        dk[:, start:end] = 0
        dv[:, start:end] = 0
    return dq, dk, dv, dq_sink


def reference_forward(q, *arguments):
    out, lse = forward(*widen(q, *arguments))
    return dense(out, q.dtype), lse


def reference_backward(dout, *arguments):
    return tuple(dense(gradient, dout.dtype) for gradient in backward(*widen(dout, *arguments)))
