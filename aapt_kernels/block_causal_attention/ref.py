"""Specification of block-causal attention in plain PyTorch, forward and backward.

The rows of one frame see the same keys, so each frame (and the text) attends to these keys alone: a
key that a row does not see never meets it. With s = scale q k^T (the sink columns from q_sink, if
given), -inf in padding,

    p = softmax(s)    lse = logsumexp(s)    out = p v
    dv = p^T dout     ds = p (dout v^T - rowsum(dout out) + dlse)     dq = scale ds k,  dk = ...

Everything is computed in the dtype of q: float64 inputs give an oracle, bfloat16 inputs the error
that plain PyTorch makes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import FrameLayout
from ..precision import dense, widen


class Block(NamedTuple):
    """Query rows that see one set of keys: the text, or one frame."""

    rows: slice  # of the query
    keys: Tensor  # indices of the keys: text, then sink, then window
    sink: slice  # columns of the sink among those keys

    def sink_rows(self, layout: FrameLayout) -> slice:
        """Rows of q_sink, which has none for text."""
        return slice(self.rows.start - layout.text_tokens, self.rows.stop - layout.text_tokens)


def blocks(layout: FrameLayout, device: torch.device) -> Iterator[Block]:
    """Cover the query: text, then frame after frame."""
    text, tokens = layout.text_tokens, layout.tokens_per_frame
    if text:
        yield Block(slice(0, text), torch.arange(text, device=device), slice(text, text))
    for frame in range(layout.frames):
        intervals = layout.intervals(frame)
        keys = torch.cat([torch.arange(*interval, device=device) for interval in intervals])
        start, (sink_start, sink_end) = text + frame * tokens, intervals[1]
        yield Block(slice(start, start + tokens), keys, slice(text, text + sink_end - sink_start))


def padding(text_lens: Tensor | None, layout: FrameLayout, device: torch.device) -> Tensor | None:
    """Return (B, key_length) bool, True for text keys that nobody sees; None without any."""
    if text_lens is None:
        return None
    key = torch.arange(layout.key_length, device=device)
    return (key >= text_lens[:, None]) & (key < layout.text_tokens)


def without(hidden: Tensor | None, x: Tensor) -> Tensor:
    """Return x (B, key_length, H, D), zero where hidden."""
    return x if hidden is None else x.masked_fill(hidden[..., None, None], 0)


def scores(
    block: Block,
    q: Tensor,
    k: Tensor,
    q_sink: Tensor | None,
    hidden: Tensor | None,
    layout: FrameLayout,
    scale: float,
) -> Tensor:
    """Return (B, H, rows, keys) of a block, -inf in padding."""
    k = k[:, block.keys]
    s = torch.einsum("bqhd,bkhd->bhqk", q[:, block.rows] * scale, k)
    if q_sink is not None:
        sink_q = q_sink[:, block.sink_rows(layout)] * scale
        sink = torch.einsum("bqhd,bkhd->bhqk", sink_q, k[:, block.sink])
        s = torch.cat([s[..., : block.sink.start], sink, s[..., block.sink.stop :]], dim=-1)
    return s if hidden is None else s.masked_fill(hidden[:, None, None, block.keys], -torch.inf)


def probabilities(s: Tensor) -> Tensor:
    """Return softmax(s), zero in a row that sees nothing."""
    return torch.where((s == -torch.inf).all(-1, keepdim=True), 0, s.softmax(-1))


def forward(q, k, v, text_lens, q_sink, *arguments):
    *integers, scale, _ = arguments
    layout = FrameLayout(*integers)
    hidden = padding(text_lens, layout, q.device)
    k, v = without(hidden, k), without(hidden, v)
    outs, lses = [q[:, :0]], [q.new_empty((q.shape[0], q.shape[2], 0))]
    for block in blocks(layout, q.device):
        s = scores(block, q, k, _of_frames(block, q_sink, layout), hidden, layout, scale)
        outs.append(torch.einsum("bhqk,bkhd->bqhd", probabilities(s), v[:, block.keys]))
        lses.append(s.logsumexp(-1))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=-1)


def backward(dout, dlse, q, k, v, out, lse, text_lens, q_sink, *arguments):
    *integers, scale, prefix_grad, _ = arguments
    layout = FrameLayout(*integers)
    hidden = padding(text_lens, layout, q.device)
    k, v = without(hidden, k), without(hidden, v)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dqs, dq_sinks = [q[:, :0]], [q[:, :0]]
    for block in blocks(layout, q.device):
        rows, keys = block.rows, block.keys
        sink_q = _of_frames(block, q_sink, layout)
        p = probabilities(scores(block, q, k, sink_q, hidden, layout, scale))
        block_dout, block_k = dout[:, rows], k[:, keys]
        row = torch.einsum("bqhd,bqhd->bhq", block_dout, out[:, rows])
        if dlse is not None:
            row = row - dlse[:, :, rows].to(row.dtype)
        weight = torch.einsum("bqhd,bkhd->bhqk", block_dout, v[:, keys]) - row[..., None]
        ds = p * weight * scale
        block_dk = torch.einsum("bhqk,bqhd->bkhd", ds, q[:, rows])
        if sink_q is not None:
            ds_sink, sink_rows = ds[..., block.sink], block.sink_rows(layout)
            dq_sinks.append(torch.einsum("bhqk,bkhd->bqhd", ds_sink, block_k[:, block.sink]))
            dk_sink = torch.einsum("bhqk,bqhd->bkhd", ds_sink, q_sink[:, sink_rows])
            start, stop = block.sink.start, block.sink.stop
            block_dk = torch.cat([block_dk[:, :start], dk_sink, block_dk[:, stop:]], dim=1)
            ds = torch.cat([ds[..., :start], ds[..., stop:]], dim=-1)
            block_k = torch.cat([block_k[:, :start], block_k[:, stop:]], dim=1)
        dqs.append(torch.einsum("bhqk,bkhd->bqhd", ds, block_k))
        dk = dk.index_add(1, keys, block_dk)
        dv = dv.index_add(1, keys, torch.einsum("bhqk,bqhd->bkhd", p, block_dout))
    dk, dv = without(hidden, dk), without(hidden, dv)
    if not prefix_grad:
        key = torch.arange(layout.key_length, device=q.device)
        given = ((key >= layout.prefix[0]) & (key < layout.prefix[1]))[None]
        dk, dv = without(given, dk), without(given, dv)
    dq_sink = q.new_empty(0) if q_sink is None else torch.cat(dq_sinks, dim=1)
    return torch.cat(dqs, dim=1), dk, dv, dq_sink


def _of_frames(block: Block, q_sink: Tensor | None, layout: FrameLayout) -> Tensor | None:
    """Return q_sink for a block of frames, None for the text."""
    return q_sink if block.rows.start >= layout.text_tokens else None


def reference_forward(q, *arguments):
    out, lse = forward(*widen(q, *arguments))
    return dense(out, q.dtype), lse


def reference_backward(dout, *arguments):
    return tuple(dense(gradient, dout.dtype) for gradient in backward(*widen(dout, *arguments)))
