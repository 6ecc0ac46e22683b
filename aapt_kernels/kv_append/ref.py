"""Specification: norm and rotate one frame, write it to the slot that the counter names.

The slot is found on the device, so this runs wherever PyTorch does, without waiting for the device.
"""

import torch

from ..qk_norm_rope import ref as norm_rope


def forward(q, k, v, k_cache, v_cache, step, *arguments):
    *arguments, text_tokens, tokens_per_frame, window_frames, sink_frames = arguments
    q, k, q_sink = norm_rope.reference_forward(q, k, *arguments)
    in_ring = sink_frames + (step - sink_frames) % (window_frames + 1)
    slot = torch.where(step < sink_frames, step, in_ring)
    tokens = torch.arange(tokens_per_frame, device=q.device)
    index = text_tokens + slot * tokens_per_frame + tokens
    k_cache.index_copy_(1, index, k)
    v_cache.index_copy_(1, index, v)
    return q, q_sink
