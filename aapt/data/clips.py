"""Clips of latents with their controls and prompts: what every training stage eats."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClipBatch:
    """latents (B, C, 1 + T, H, W) in unit deviation; controls (B, T, 2), row n driving latent
    n + 1; one prompt per clip."""

    latents: Tensor
    controls: Tensor
    prompts: Sequence[str]

    @property
    def targets(self) -> Tensor:
        return self.latents[:, :, 1:]

    @property
    def recycled(self) -> Tensor:
        return self.latents[:, :, :-1]

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.latents.shape[-2:])


class LatentClips:
    """Encoded clips in memory; batches are random windows with random phrasings.

    latents: (clips, C, length, H, W) of any float type; controls: (clips, length - 1, 2);
    phrasings: per clip the prompts that describe it.
    """

    def __init__(self, latents: Tensor, controls: Tensor, phrasings: Sequence[Sequence[str]]):
        if len(latents) != len(controls) or len(latents) != len(phrasings):
            raise ValueError(
                f"latents, controls, phrasings: expected one length, got {len(latents)}, "
                f"{len(controls)}, {len(phrasings)}"
            )
        if controls.shape[1:] != (latents.shape[2] - 1, 2):
            raise ValueError(
                f"controls: expected (clips, {latents.shape[2] - 1}, 2), "
                f"got {tuple(controls.shape)}"
            )
        self.latents, self.controls, self.phrasings = latents, controls, phrasings

    def __len__(self) -> int:
        return len(self.latents)

    def sample(
        self,
        batch: int,
        frames: int,
        generator: torch.Generator,
        first_frame: Literal["half", "never"] = "half",
    ) -> ClipBatch:
        """`batch` windows of 1 + `frames` latent frames, drawn by `generator`.

        A clip's latent 0 covers one video frame, all others cover four. A stream always starts
        from such a frame, so half of the windows do; "never" leaves it out (SPEC 8, segments).
        """
        length = self.latents.shape[2]
        earliest = 1 if first_frame == "never" else 0
        if frames + 1 + earliest > length:
            raise ValueError(f"frames: expected at most {length - 1 - earliest}, got {frames}")
        clips = torch.randint(len(self), (batch,), generator=generator).tolist()
        starts = torch.randint(earliest, length - frames, (batch,), generator=generator)
        if first_frame == "half":
            starts[torch.rand(batch, generator=generator) < 0.5] = 0
        starts = starts.tolist()
        latents = [
            self.latents[c, :, s : s + frames + 1].float()
            for c, s in zip(clips, starts, strict=True)
        ]
        controls = [self.controls[c, s : s + frames] for c, s in zip(clips, starts, strict=True)]
        choice = torch.randint(1 << 30, (batch,), generator=generator).tolist()
        prompts = [
            self.phrasings[c][n % len(self.phrasings[c])]
            for c, n in zip(clips, choice, strict=True)
        ]
        return ClipBatch(torch.stack(latents), torch.stack(controls), prompts)
