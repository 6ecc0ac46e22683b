"""CPU implementation: the counter is in reach, so the frame is copied to a slice."""

from ..qk_norm_rope import cpu as norm_rope


def forward(q, k, v, k_cache, v_cache, step, *arguments):
    *arguments, text_tokens, tokens_per_frame, window_frames, sink_frames = arguments
    q, k, q_sink = norm_rope.forward(q, k, *arguments)
    slot = int(step)
    if slot >= sink_frames:
        slot = sink_frames + (slot - sink_frames) % (window_frames + 1)
    start = text_tokens + slot * tokens_per_frame
    k_cache[:, start : start + tokens_per_frame] = k
    v_cache[:, start : start + tokens_per_frame] = v
    return q, q_sink
