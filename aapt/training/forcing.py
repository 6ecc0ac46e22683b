"""Judging teacher-forced frames: each on its own, after the real frames before it (SPEC 8)."""

import torch
from torch import Tensor

from ..model.discriminator import Discriminator
from ..model.transformer import VideoTransformer, clean
from ..model.world_model import Conditions
from ..streaming.student import Segment, frames_of


def teacher_forced_logits(
    discriminator: Discriminator, x: Tensor, real: Tensor, conditions: Conditions, t: Tensor
) -> Tensor:
    """Logits (copies B, T) of frames x (copies B, C, T, H, W), made from the frames before them in
    the real clips `real` (B, C, 1 + T, H, W), so that none follows another.

    Frame by frame, the discriminator meets one of x and then the real one in its place, which
    alone stays in its cache. conditions, t: of the B real clips. No gradient into the cache.
    """
    backbone, (condition, text, text_lens) = discriminator.backbone, conditions
    copies = len(x) // len(real)
    with torch.no_grad():
        words = backbone.encode_text(text, text_lens, t)
        cache = backbone.new_cache(len(real), real.shape[-2:], dtype=words[0][0].dtype)
        for layer, (k, v) in enumerate(words):
            cache.write_text(layer, k, v, text_lens)

    def each(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat(copies, *(1 for _ in tensor.shape[1:]))

    logits = []
    for index in range(x.shape[2]):
        frame = slice(index, index + 1)
        before, driven = real[:, :, frame], frames_of(condition, frame)
        prefix = None
        if index:
            pairs = (cache.prefix(layer) for layer in range(len(words)))
            prefix = [(each(k), each(v)) for k, v in pairs]
        logits.append(
            discriminator(
                x[:, :, frame],
                *map(each, (before, driven, text, text_lens, t)),
                prefix=prefix,
                start_frame=index,
            )
        )
        with torch.no_grad():
            backbone.step(real[:, :, index + 1 : index + 2], before, driven, t, cache)
    return torch.cat(logits, dim=1)


def parallel_pass(
    model: VideoTransformer, segment: Segment, text: Tensor, text_lens: Tensor
) -> Tensor:
    """The segment's frames once more, in parallel and with gradient: (B, C, T, H, W).

    text (B, text_tokens, text_width) is embedded anew, with gradient, in every segment (SPEC 8).
    """
    time = segment.noise.new_ones(len(segment.noise))
    output = model(
        segment.noise,
        segment.recycled,
        segment.condition,
        text,
        text_lens,
        time,
        prefix=segment.prefix,
        start_frame=segment.start_frame,
    )
    return clean(
        model.config, output.to(segment.noise.dtype), segment.noise, segment.recycled, time
    )
