"""The passes of both ways of forcing: student forcing and teacher forcing (docs/method.md#8)."""

import torch
from torch import Tensor

from ..model.discriminator import Discriminator
from ..model.transformer import VideoTransformer, clean
from ..model.world_model import Conditions
from ..streaming.student import Segment, frames_of


def teacher_forced_logits(
    discriminator: Discriminator, x: Tensor, real: Tensor, conditions: Conditions, t: Tensor
) -> Tensor:
    """Compute the logits of teacher-forced frames, each as a continuation of real frames.

    For each frame of `x` the discriminator's cache holds the real frames before it, and never
    another frame of `x`. No gradient flows into the cache.

    Args:
        x: Frames (copies * B, C, T, H, W). A teacher-forced generator made each from the real
            frames before it.
        real: Real clips (B, C, 1 + T, H, W).
        conditions, t: Conditions and times of the B real clips.

    Returns (copies * B, T).
    """
    backbone, (condition, text, text_lens) = discriminator.backbone, conditions
    copies = len(x) // len(real)
    with torch.no_grad():
        words = backbone.encode_text(text, text_lens, t)
        cache = backbone.new_cache(len(real), real.shape[-2:], dtype=words[0][0].dtype)
        for layer, (k, v) in enumerate(words):
            cache.write_text(layer, k, v, text_lens)
        constants = backbone.step_constants(t, real.shape[-2:])

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
            new = real[:, :, index + 1 : index + 2]
            backbone.step(new, before, driven, t, cache, constants)
    return torch.cat(logits, dim=1)


def parallel_pass(
    model: VideoTransformer, segment: Segment, text: Tensor, text_lens: Tensor
) -> Tensor:
    """Compute the frames of a rolled-out segment again, in parallel and with gradient.

    Args:
        text: (B, text_tokens, text_width), embedded anew for every segment, with gradient
            (docs/method.md#8).

    Returns (B, C, T, H, W).
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
