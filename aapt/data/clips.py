"""Clips of latents with their motion and prompts: what every training stage eats."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..vae.pixels import to_video
from .randomness import ClipRandom

FirstFrame = Literal["half", "never"]


@dataclass(frozen=True)
class ClipBatch:
    """latents (B, C, 1 + T, H, W) in unit deviation; one prompt per clip. Row n of `motion`
    drives latent n + 1: controls (B, T, 2), poses relative to the video frame before
    (B, T, frames, 4, 4), or channels (B, C, T, H, W); None where nothing is controlled."""

    latents: Tensor
    motion: Tensor | None
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


class Clips(Protocol):
    """What a stage draws from."""

    @property
    def latent_frames(self) -> int:
        """Of the longest clips, after their first."""

    def part(self, random: ClipRandom, frames: int) -> "Clips":
        """The clips that an update draws from if it needs `frames` latent frames after the first:
        all of one size and length, and the same ones on every rank."""

    def sample(
        self, random: ClipRandom, frames: int, first_frame: FirstFrame = "half"
    ) -> ClipBatch:
        """One window of 1 + `frames` latent frames for each clip of `random`, on its device.

        A clip's latent 0 covers one video frame, all others cover four. A stream always starts
        from such a frame, so half of the windows do; "never" leaves it out (SPEC 8, segments).
        """


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

    @property
    def latent_frames(self) -> int:
        return self.latents.shape[2] - 1

    def part(self, random: ClipRandom, frames: int) -> "LatentClips":
        return self

    def sample(
        self, random: ClipRandom, frames: int, first_frame: FirstFrame = "half"
    ) -> ClipBatch:
        clips = random.integers(len(self))
        starts = window_starts(random, self.latents.shape[2], frames, first_frame)
        choices = random.integers([len(self.phrasings[c]) for c in clips])
        latents = [self.latents[c, :, s : s + frames + 1] for c, s in zip(clips, starts)]
        controls = [self.controls[c, s : s + frames] for c, s in zip(clips, starts)]
        return ClipBatch(
            torch.stack(latents).to(random.device, torch.float32),
            torch.stack(controls).to(random.device),
            [self.phrasings[c][choice] for c, choice in zip(clips, choices)],
        )


def window_starts(
    random: ClipRandom, length: int, frames: int, first_frame: FirstFrame
) -> list[int]:
    """Where windows of 1 + `frames` latents begin in clips of `length`, see `Clips.sample`.

    ValueError if they do not fit.
    """
    earliest = 1 if first_frame == "never" else 0
    places = length - frames - earliest
    if places < 1:
        raise ValueError(f"frames: expected at most {length - 1 - earliest}, got {frames}")
    starts = [earliest + place for place in random.integers(places)]
    if first_frame == "half":
        starts = [start * coin for start, coin in zip(starts, random.integers(2))]
    return starts


class VideoClips:
    """Clips as pixels: at most `count`, each uint8 (F, H, W, 3), all of one shape."""

    def __init__(self, videos: Iterable[Tensor], count: int):
        first = next(videos := iter(videos))
        self.videos = first.new_empty(count, *first.shape)  # beside a list, twice the memory
        made = 0
        for made, video in enumerate(chain([first], videos), start=1):
            self.videos[made - 1] = video
        self.videos = self.videos[:made]

    def sample(self, random: ClipRandom, frames: int) -> Tensor:
        """Random windows (B, 3, frames, H, W) in [-1, 1]."""
        count, length = self.videos.shape[:2]
        if frames > length:
            raise ValueError(f"frames: expected at most {length}, got {frames}")
        clips, starts = random.integers(count), random.integers(length - frames + 1)
        windows = [self.videos[c, s : s + frames] for c, s in zip(clips, starts)]
        return to_video(torch.stack(windows).to(random.device))
