"""Clips of latents with their motion and prompts, from which every training stage draws."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ..vae.pixels import to_video
from .randomness import ClipRandom

FirstFrame = Literal["always", "half", "never"]


@dataclass(frozen=True)
class ClipBatch:
    """Windows of clips, drawn for one update.

    Attributes:
        latents: (B, C, 1 + T, H, W), of unit deviation.
        motion: Row n drives latent frame n + 1. Controls (B, T, 2), poses (B, T, frames, 4, 4) that
            are relative to the video frame before, or channels (B, C, T, H, W); None for clips
            without motion.
        prompts: One per clip.
        windows: The number of each clip in its set, and the latent frame its window begins with.
    """

    latents: Tensor
    motion: Tensor | None
    prompts: Sequence[str]
    windows: Sequence[tuple[int, int]]

    @property
    def targets(self) -> Tensor:
        """Latent frames to generate (B, C, T, H, W): all but the first."""
        return self.latents[:, :, 1:]

    @property
    def recycled(self) -> Tensor:
        """The latent frame before each target (B, C, T, H, W)."""
        return self.latents[:, :, :-1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the latents."""
        return tuple(self.latents.shape[-2:])


class Clips(Protocol):
    """A set of clips that a stage draws from."""

    @property
    def latent_frames(self) -> int:
        """Latent frames of the longest clips, without the first frame."""

    def part(self, random: ClipRandom, frames: int) -> "ClipsOfOneSize":
        """The clips for an update that needs `frames` latent frames after the first.

        These clips have one size and one length, and every rank draws from the same part.
        """

    def sample(
        self, random: ClipRandom, frames: int, first_frame: FirstFrame = "half"
    ) -> ClipBatch:
        """Draw one window of 1 + `frames` latent frames per clip of `random`, on its device.

        Latent frame 0 of a clip covers one video frame, every other latent frame covers four. A
        stream starts from a frame of the first kind. With "always" every window starts with frame
        0; with "half" half of them do, and the others anywhere; with "never" none does
        (`docs/method.md#8`, segments).
        """


class ClipsOfOneSize(Clips, Protocol):
    """A set whose clips have one size and one length."""

    def __len__(self) -> int:
        """Number of clips."""

    def motion(self, numbers: Sequence[int]) -> Tensor:
        """Read the whole motion of clips by their numbers, laid out as `ClipBatch.motion`.

        Only for clips with motion. The tensor is on the CPU.
        """


class LatentClips:
    """Encoded clips in memory; batches are random windows with random phrasings.

    Args:
        latents: (clips, C, length, H, W), of any float type.
        motion: Controls (clips, length - 1, 2), or channels (clips, C', length - 1, H, W) of any
            float type.
        phrasings: The prompts that describe each clip; one of them is drawn.
    """

    def __init__(self, latents: Tensor, motion: Tensor, phrasings: Sequence[Sequence[str]]):
        if len(latents) != len(motion) or len(latents) != len(phrasings):
            raise ValueError(
                f"latents, motion, phrasings: expected one length, got {len(latents)}, "
                f"{len(motion)}, {len(phrasings)}"
            )
        length, size = latents.shape[2] - 1, latents.shape[3:]
        self._time = 1 if motion.dim() == 3 else 2  # the axis of latent frames in the motion
        fits = motion.shape[1:] == (length, 2)
        if not fits and (motion.dim() != 5 or motion.shape[2:] != (length, *size)):
            raise ValueError(
                f"motion: expected controls (clips, {length}, 2) or channels (clips, C, {length}, "
                f"{', '.join(map(str, size))}), got {tuple(motion.shape)}"
            )
        self.latents, self.all_motion, self.phrasings = latents, motion, phrasings

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
        motion = [
            self.all_motion[c].narrow(self._time - 1, s, frames) for c, s in zip(clips, starts)
        ]
        return ClipBatch(
            torch.stack(latents).to(random.device, torch.float32),
            torch.stack(motion).to(random.device, torch.float32),
            [self.phrasings[c][choice] for c, choice in zip(clips, choices)],
            list(zip(clips, starts)),
        )

    def motion(self, numbers: Sequence[int]) -> Tensor:
        return self.all_motion[list(numbers)].float()


def window_starts(
    random: ClipRandom, length: int, frames: int, first_frame: FirstFrame
) -> list[int]:
    """Draw the first latent frame of each window, see `Clips.sample`.

    length: latent frames of a clip. frames: latent frames of a window after its first. ValueError
    if a window does not fit.
    """
    if first_frame not in get_args(FirstFrame):
        raise ValueError(f"first_frame: expected 'always', 'half' or 'never', got {first_frame!r}")
    earliest = 1 if first_frame == "never" else 0
    places = length - frames - earliest
    if places < 1:
        raise ValueError(f"frames: expected at most {length - 1 - earliest}, got {frames}")
    if first_frame == "always":
        return [0] * len(random)
    starts = [earliest + place for place in random.integers(places)]
    if first_frame == "half":
        starts = [start * coin for start, coin in zip(starts, random.integers(2))]
    return starts


class VideoClips:
    """Clips as pixels: at most `count` videos, each uint8 (F, H, W, 3), all of one shape."""

    def __init__(self, videos: Iterable[Tensor], count: int):
        first = next(videos := iter(videos))
        self.videos = first.new_empty(count, *first.shape)  # a list to stack would need it twice
        made = 0
        for made, video in enumerate(chain([first], videos), start=1):
            self.videos[made - 1] = video
        self.videos = self.videos[:made]

    def sample(self, random: ClipRandom, frames: int) -> Tensor:
        """Draw random windows (B, 3, frames, H, W) in [-1, 1]. ValueError if clips are shorter."""
        count, length = self.videos.shape[:2]
        if frames > length:
            raise ValueError(f"frames: expected at most {length}, got {frames}")
        clips, starts = random.integers(count), random.integers(length - frames + 1)
        windows = [self.videos[c, s : s + frames] for c, s in zip(clips, starts)]
        return to_video(torch.stack(windows).to(random.device))
