"""Specification: the queries of new frames attend to the whole cache under a mask of slots.

The mask is computed from the counter on the device, so this runs wherever PyTorch does, without
waiting for the device.
"""

import torch

from ..precision import dense, dequantise, widen


def visible(step, frames, text_lens, capacity, geometry):
    """Return (batch, capacity) bool, True where frames step ... step + frames - 1 see the cache,
    themselves included."""
    text_tokens, tokens_per_frame, *_ = geometry
    key = torch.arange(capacity, device=step.device)
    slot = torch.div(key - text_tokens, tokens_per_frame, rounding_mode="floor")
    # Slots fill up in order, and a full ring holds exactly the window that ends with the last frame
    seen = (key >= text_tokens) & (slot < step + frames)
    begin = text_tokens - torch.clamp(text_lens, 0, text_tokens)[:, None]
    return seen | ((key >= begin) & (key < text_tokens))


def attend(q, k_cache, v_cache, q_sink, seen, sink, scale, k_scale, v_scale):
    """Attend with rows of q to the keys that are seen (batch, capacity), with those of q_sink, if
    any, to the keys of the slice `sink`. Return out and the log-sum-exp of the scores."""
    k_cache, v_cache = dequantise(k_cache, k_scale, q.dtype), dequantise(v_cache, v_scale, q.dtype)
    # A weight of zero would still multiply NaN in a slot that the frames do not see
    k_cache, v_cache = (x.masked_fill(~seen[..., None, None], 0) for x in (k_cache, v_cache))
    s = torch.einsum("bqhd,bkhd->bhqk", q * scale, k_cache)
    if q_sink is not None:
        s[..., sink] = torch.einsum("bqhd,bkhd->bhqk", q_sink * scale, k_cache[:, sink])
    s = s.masked_fill(~seen[:, None, None], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v_cache), s.logsumexp(-1)


def forward(q, k_cache, v_cache, step, text_lens, q_sink, *arguments):
    *geometry, scale, k_scale, v_scale, _ = arguments
    text_tokens, tokens_per_frame, _, sink_frames = geometry
    seen = visible(step, q.shape[1] // tokens_per_frame, text_lens, k_cache.shape[1], geometry)
    sink = slice(text_tokens, text_tokens + sink_frames * tokens_per_frame)
    return attend(q, k_cache, v_cache, q_sink, seen, sink, scale, k_scale, v_scale)


def reference_forward(q, *arguments):
    out, lse = forward(*widen(q, *arguments))
    return dense(out, q.dtype), lse
