"""Streaming from the diffusion model of stage 1: the baseline that one forward pass replaces."""

import torch
from torch import Tensor

from .flow import per_clip, schedule
from .model import VideoTransformer, velocity


class DiffusionRollout:
    """A batch of streams, each frame denoised over `steps` times with guidance, one NFE of twice
    the batch per time (SPEC 6, 12).

    In training all frames of a clip share one t. So every time has a cache of its own, where a
    frame sees those before it as they were at that time.

    Args:
        text, text_lens: Of the prompts, (B, text_tokens, text_width) and (B,).
        unguided: The same two of empty prompts.
        first: The user's frame, (B, C, 1, H, W).
        shift: Of the times, as in training.
        guidance: w of v = v_empty + w (v_prompt - v_empty); 10 in the paper.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: VideoTransformer,
        text: Tensor,
        text_lens: Tensor,
        unguided: tuple[Tensor, Tensor],
        first: Tensor,
        *,
        steps: int,
        shift: float,
        guidance: float,
    ):
        if steps < 1:
            raise ValueError(f"steps: expected 1 or more, got {steps}")
        self.model, self.guidance, self.last = model, guidance, first
        self.times = schedule(steps, shift).to(first.device)
        text, text_lens = torch.cat([text, unguided[0]]), torch.cat([text_lens, unguided[1]])
        self.caches = []
        for time in self.times[1:]:
            pairs = model.encode_text(text, text_lens, time.expand(len(text)))
            cache = model.new_cache(len(text), first.shape[-2:], dtype=pairs[0][0].dtype)
            for layer, (k, v) in enumerate(pairs):
                cache.write_text(layer, k, v, text_lens)
            self.caches.append(cache)

    @torch.no_grad()
    def step(self, noise: Tensor, recycled: Tensor, condition: Tensor | None) -> Tensor:
        """The next latent frame (B, C, 1, H, W)."""
        model, x = self.model, noise
        both = recycled.repeat(2, 1, 1, 1, 1)
        driven = None if condition is None else condition.repeat(2, 1, 1, 1, 1)
        for index in reversed(range(len(self.caches))):
            doubled = x.repeat(2, 1, 1, 1, 1)
            time = self.times[index + 1].expand(len(doubled))
            output = model.step(doubled, both, driven, time, self.caches[index]).to(x.dtype)
            guided, free = velocity(model.config, output, doubled, both).chunk(2)
            v = free + self.guidance * (guided - free)
            x = x - per_clip((self.times[index + 1] - self.times[index]).expand(len(x))) * v
        self.last = x
        return x
