"""Specification: norm and rotate new frames, write them to the slots that the counter names.

The slots are found on the device, so this runs wherever PyTorch does, without waiting for the
device.
"""

import torch

from ..precision import as_bits, hadamard, quantise
from ..qk_norm_rope import ref as norm_rope


def cache_rows(step, token, geometry):
    """Return the rows of the cache that store these tokens (n,) of frames step, step + 1, ..."""
    text_tokens, tokens_per_frame, window_frames, sink_frames = geometry
    frame = step + torch.div(token, tokens_per_frame, rounding_mode="floor")
    in_ring = sink_frames + (frame - sink_frames) % (window_frames + 1)
    slot = torch.where(frame < sink_frames, frame, in_ring)
    return text_tokens + slot * tokens_per_frame + token % tokens_per_frame


def forward(q, k, v, k_cache, v_cache, step, *arguments):
    *arguments, k_scale, v_scale, use_hadamard = arguments
    arguments, geometry = arguments[:-4], arguments[-4:]
    q, k, q_sink = norm_rope.reference_forward(q, k, *arguments)
    if use_hadamard:
        q, k, q_sink = (hadamard(x) if x.numel() else x for x in (q, k, q_sink))
    index = cache_rows(step, torch.arange(q.shape[1], device=q.device), geometry)
    for cached, x, scale in zip((k_cache, v_cache), (k, v), (k_scale, v_scale), strict=True):
        as_bits(cached).index_copy_(1, index, as_bits(quantise(x, scale, cached.dtype)))
    return q, q_sink
