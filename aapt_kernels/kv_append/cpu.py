"""CPU implementation: the counter is in reach, so each frame is copied to a slice."""

from ..precision import hadamard, quantise
from ..qk_norm_rope import cpu as norm_rope


def forward(q, k, v, k_cache, v_cache, step, *arguments):
    *arguments, k_scale, v_scale, use_hadamard = arguments
    *arguments, text_tokens, tokens_per_frame, window_frames, sink_frames = arguments
    q, k, q_sink = norm_rope.forward(q, k, *arguments)
    if use_hadamard:
        q, k, q_sink = (hadamard(x) if x.numel() else x for x in (q, k, q_sink))
    k, v = (
        quantise(x, scale, cached.dtype)
        for x, scale, cached in zip((k, v), (k_scale, v_scale), (k_cache, v_cache), strict=True)
    )
    first = int(step)
    for frame in range(q.shape[1] // tokens_per_frame):
        slot = first + frame
        if slot >= sink_frames:
            slot = sink_frames + (slot - sink_frames) % (window_frames + 1)
        start, source = text_tokens + slot * tokens_per_frame, frame * tokens_per_frame
        k_cache[:, start : start + tokens_per_frame] = k[:, source : source + tokens_per_frame]
        v_cache[:, start : start + tokens_per_frame] = v[:, source : source + tokens_per_frame]
    return q, q_sink
