"""Fast CPU implementation: flash attention on views of the cache, which is never copied.

Text, sink and ring are stored side by side, so one call sees exactly what the new frames see.
q_sink takes three calls, whose results are merged by their log-sum-exp.
"""

import torch
from torch import Tensor

from ..flash import Part, clips_of_one_text, flash, merge
from ..precision import dense, dequantise


def attend(q, k, v, intervals, q_sink, sink, scale) -> Part:
    """Attend with q to key intervals, and with q_sink to the interval `sink`."""
    if intervals == [(0, k.shape[1])]:  # the steady state: not even a slice
        return flash(q, k, v, scale)
    parts = [flash(q, k[:, a:b], v[:, a:b], scale) for a, b in intervals if b > a]
    if q_sink is not None:
        a, b = sink
        parts.append(flash(q_sink, k[:, a:b], v[:, a:b], scale))
    return merge(parts)


def forward(q, k_cache, v_cache, step, text_lens, q_sink, *arguments):
    text_tokens, tokens_per_frame, window_frames, sink_frames, scale, *scales, _ = arguments
    new_frames = q.shape[1] // tokens_per_frame
    frames = min(int(step) + new_frames, sink_frames + window_frames + 1)
    sink_end = text_tokens + min(sink_frames, frames) * tokens_per_frame
    end = text_tokens + frames * tokens_per_frame
    if sink_end == text_tokens:
        q_sink = None
    if any(x is not None for x in scales):
        k_cache, v_cache = (
            dequantise(x[:, :end], x_scale, q.dtype)
            for x, x_scale in zip((k_cache, v_cache), scales, strict=True)
        )

    def part(length: int, q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None) -> Part:
        begin = text_tokens - length
        intervals = [(begin, end)] if q_sink is None else [(begin, text_tokens), (sink_end, end)]
        return attend(q, k, v, intervals, q_sink, (text_tokens, sink_end), scale)

    batch = (q, k_cache, v_cache, q_sink)
    clips = clips_of_one_text(text_lens, text_tokens)
    if len(clips) == 1:
        out, lse = part(clips[0][1], *batch)
    else:
        parts = [
            part(length, *(None if x is None else x[clip] for x in batch)) for clip, length in clips
        ]
        out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return dense(out.transpose(1, 2), q.dtype), lse.contiguous()
