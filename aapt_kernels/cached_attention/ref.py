"""Specification: one frame's queries attend to the whole cache under a mask of slots.

The mask is computed from the counter on the device, so this runs wherever PyTorch does, without
waiting for the device.
"""

import torch

from ..precision import dense, widen


def visible(step, text_lens, capacity, text_tokens, tokens_per_frame, window_frames, sink_frames):
    """Return (batch, capacity) bool, True where frame `step` sees the cache, itself included."""
    key = torch.arange(capacity, device=step.device)
    slot = torch.div(key - text_tokens, tokens_per_frame, rounding_mode="floor")
    # Slots fill up in order, and a full ring holds exactly the window and the frame itself
    seen = (key >= text_tokens) & (slot <= step)
    begin = text_tokens - torch.clamp(text_lens, 0, text_tokens)[:, None]
    return seen | ((key >= begin) & (key < text_tokens))


def forward(q, k_cache, v_cache, step, text_lens, q_sink, *arguments):
    *geometry, scale = arguments
    text_tokens, tokens_per_frame, _, sink_frames = geometry
    seen = visible(step, text_lens, k_cache.shape[1], *geometry)
    # A weight of zero would still multiply NaN in a slot that the frame does not see
    k_cache, v_cache = (x.masked_fill(~seen[..., None, None], 0) for x in (k_cache, v_cache))
    s = torch.einsum("bqhd,bkhd->bhqk", q * scale, k_cache)
    if q_sink is not None:
        start, end = text_tokens, text_tokens + sink_frames * tokens_per_frame
        sink = torch.einsum("bqhd,bkhd->bhqk", q_sink * scale, k_cache[:, start:end])
        s[..., start:end] = sink
    s = s.masked_fill(~seen[:, None, None], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v_cache), s.logsumexp(-1)


def reference_forward(q, *arguments):
    out, lse = forward(*widen(q, *arguments))
    return dense(out, q.dtype), lse
