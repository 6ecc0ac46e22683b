"""Streaming from the diffusion model of stage 1: the baseline that one pass per frame replaces."""

from typing import Any

import torch
from torch import Tensor

from ..model.config import SamplingConfig
from ..model.flow import per_clip, schedule
from ..model.transformer import VideoTransformer, velocity


class DiffusionRollout:
    """A batch of streams, each frame denoised over the times of a schedule (docs/method.md#6, #12).

    With guidance each time is one pass over twice the batch. In training all frames of a clip share
    one t; so each time has its own cache, which holds the earlier frames as they were at that time.

    Args:
        text, text_lens: Embeddings of the prompts, (B, text_tokens, text_width), and lengths (B,).
        unguided: Embeddings and lengths of empty prompts; ignored without guidance.
        first: The user's frame, (B, C, 1, H, W).
    """

    @torch.no_grad()
    def __init__(
        self,
        model: VideoTransformer,
        text: Tensor,
        text_lens: Tensor,
        unguided: tuple[Tensor, Tensor],
        first: Tensor,
        sampling: SamplingConfig,
    ):
        self.model, self.sampling = model, sampling
        self.times = schedule(sampling.steps, sampling.shift).to(first.device)
        if sampling.branches == 2:
            text, text_lens = torch.cat([text, unguided[0]]), torch.cat([text_lens, unguided[1]])
        self.text = text, text_lens
        self.pasts = [self.new_past(time.expand(len(text)), first) for time in self.times[1:]]

    def new_past(self, time: Tensor, first: Tensor) -> Any:
        """Returns the memory of earlier frames for the frames at `time` (B,)."""
        text, text_lens = self.text
        pairs = self.model.encode_text(text, text_lens, time)
        cache = self.model.new_cache(len(text), first.shape[-2:], dtype=pairs[0][0].dtype)
        for layer, (k, v) in enumerate(pairs):
            cache.write_text(layer, k, v, text_lens)
        return cache, self.model.step_constants(time, first.shape[-2:])

    def output(self, past: Any, *inputs: Tensor | None) -> Tensor:
        """Returns the network's output for one frame's (noisy, recycled, condition, time)."""
        cache, constants = past
        return self.model.step(*inputs, cache, constants)

    @torch.no_grad()
    def step(self, noise: Tensor, recycled: Tensor, condition: Tensor | None) -> Tensor:
        """Makes the next latent frame (B, C, 1, H, W)."""
        model, sampling, x = self.model, self.sampling, noise
        copies = (sampling.branches, 1, 1, 1, 1)
        before = recycled.repeat(copies)
        driven = None if condition is None else condition.repeat(copies)
        for index in reversed(range(len(self.pasts))):
            noisy = x.repeat(copies)
            time = self.times[index + 1].expand(len(noisy))
            output = self.output(self.pasts[index], noisy, before, driven, time).to(x.dtype)
            v, *free = velocity(model.config, output, noisy, before).chunk(sampling.branches)
            if free:
                v = free[0] + sampling.guidance * (v - free[0])
            x = x - per_clip((self.times[index + 1] - self.times[index]).expand(len(x))) * v
        return x


class RecomputedRollout(DiffusionRollout):
    """`DiffusionRollout` without caches, for a few frames: every pass computes all frames so far
    again, as they were at its time.

    Work grows with the square of the number of frames; memory is that of a forward pass in
    training. Caches of 8 B parameters would take 17 GB for each stream and time.
    """

    def new_past(self, time: Tensor, first: Tensor) -> list[tuple[Tensor | None, ...]]:
        return []

    def output(self, past: list[tuple[Tensor | None, ...]], *inputs: Tensor | None) -> Tensor:
        *frame, time = inputs
        past.append(tuple(frame))
        clip = (None if x[0] is None else torch.cat(x, dim=2) for x in zip(*past))
        return self.model(*clip, *self.text, time)[:, :, -1:]
