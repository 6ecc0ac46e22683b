"""The passes of all ways of forcing: student forcing, teacher forcing (docs/method.md#8), diffusion
forcing (#12)."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.clips import ClipBatch
from ..model.config import ModelConfig
from ..model.discriminator import Discriminator
from ..model.transformer import VideoTransformer, clean
from ..model.world_model import Conditions
from ..streaming.student import Segment, frames_of

Forcing = Literal["teacher", "diffusion"]


class DenoisingForcing:
    """Chooses frames, times and conditions for a stage that denoises.

    Under "teacher" forcing a clip has one time, and each frame is denoised beside the clean frame
    before it, which is recycled. Under "diffusion" forcing (arXiv 2407.01392) no frame is recycled
    and each has a time of its own, so that a frame is denoised after noisy ones; frame 0, the
    user's, is clean. A step of such a model takes two frames of work: the new frame, and the
    finished frame once more.

    ValueError for another kind, and for a model with recycled channels under diffusion forcing.
    """

    def __init__(self, kind: Forcing, config: ModelConfig):
        if kind not in get_args(Forcing):
            raise ValueError(f"forcing: expected 'teacher' or 'diffusion', got {kind!r}")
        if kind == "diffusion" and (config.block != "wan" or config.recycled_channels):
            raise ValueError(
                "forcing: expected 'teacher' unless the model is of block 'wan' without recycled "
                "channels, got 'diffusion'"
            )
        self.apart = kind == "diffusion"  # frames have times of their own

    def frames(self, batch: ClipBatch) -> tuple[Tensor, Tensor | None]:
        """Returns the clean frames to noise and the recycled frames, (B, C, T, H, W) each."""
        return (batch.latents, None) if self.apart else (batch.targets, batch.recycled)

    def draw(self, frames: int, draw: Callable[[], Tensor]) -> Tensor:
        """Draw (B,) numbers, or (B, frames) of which those of frame 0 are 0."""
        if not self.apart:
            return draw()
        drawn = torch.stack([draw() for _ in range(frames)], dim=1)
        drawn[:, 0] = 0
        return drawn

    def conditions(self, conditions: Conditions) -> Conditions:
        """Add the condition of frame 0, which nothing drives, if it is among the frames."""
        channels = conditions.condition
        if self.apart and channels is not None:
            channels = F.pad(channels, (0, 0, 0, 0, 1, 0))
        return conditions._replace(condition=channels)

    def learnt(self, losses: Tensor) -> Tensor:
        """Select the frames with a loss from (..., T) or (B, C, T, H, W) of all frames."""
        if not self.apart:
            return losses
        return losses[:, 1:] if losses.dim() == 2 else losses[:, :, 1:]


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
