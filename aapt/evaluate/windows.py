"""The moments of an evaluation: windows, every second, and the seconds of the sheet."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..clock import FPS, FRAMES_PER_LATENT, SHEET_SECONDS


@dataclass(frozen=True)
class Window:
    """The steps `first` to `last`, counted from 1; step n makes video frames 4 n - 3 to 4 n.

    fps: Video frames per second.
    """

    name: str
    first: int
    last: int
    fps: int = FPS

    @property
    def frames(self) -> range:
        """Numbers of the window's video frames, and before them of the last one before it."""
        return range(FRAMES_PER_LATENT * (self.first - 1), FRAMES_PER_LATENT * self.last + 1)

    @property
    def middle(self) -> float:
        """Middle of the window in seconds of video."""
        return (self.first - 1 + self.last) / 2 * FRAMES_PER_LATENT / self.fps


SECONDS = {
    "0-1.3 s": (0, 4 / 3),
    "4-6 s": (4, 6),
    "29-31 s": (29, 31),
    "55-60 s": (55, 60),
    "175-180 s": (175, 180),
    "295-300 s": (295, 300),
}


def windows_at(fps: int) -> tuple[Window, ...]:
    """Return the windows, whose first and last second are SECONDS, at a rate of video frames."""
    rate = fps / FRAMES_PER_LATENT
    return tuple(
        Window(name, round(begin * rate) + 1, round(end * rate), fps)
        for name, (begin, end) in SECONDS.items()
    )


WINDOWS = windows_at(FPS)


@dataclass(frozen=True)
class Schedule:
    """The moments at which rollouts of `steps` latent frames, and their truth, are measured.

    true_steps: latent frames of the truth, which may be shorter or longer. Neither number counts
    the first frame. fps: Video frames per second.
    """

    steps: int
    true_steps: int
    fps: int = FPS

    @cached_property
    def windows(self) -> list[Window]:
        """Windows that end within the rollouts."""
        return [window for window in windows_at(self.fps) if window.last <= self.steps]

    @cached_property
    def sheet_seconds(self) -> list[int]:
        """Seconds of video that the contact sheet shows."""
        return [s for s in SHEET_SECONDS if s * self.fps <= self.steps * FRAMES_PER_LATENT]

    @cached_property
    def drift_seconds(self) -> range:
        """Whole seconds of the rollouts, from 1."""
        return range(1, FRAMES_PER_LATENT * self.steps // self.fps + 1)

    @cached_property
    def true_seconds(self) -> range:
        """Whole seconds of the rollouts at which there is a truth."""
        return range(1, FRAMES_PER_LATENT * min(self.steps, self.true_steps) // self.fps + 1)

    @cached_property
    def frames(self) -> list[int]:
        """Numbers of the video frames that are measured or shown of a rollout."""
        return sorted({s * self.fps for s in self.sheet_seconds}.union(*self._runs))

    @cached_property
    def true_frames(self) -> list[int]:
        """Numbers of the video frames that are needed of the truth; some may be after its end."""
        moved = (shifted_inside(run, self.true_steps) for run in self._runs)
        return sorted(set(self.frames).union(*moved))

    @property
    def _runs(self) -> list[Sequence[int]]:
        """Runs of consecutive frame numbers that are measured together."""
        seconds = (drift_frames(second, self.fps) for second in self.drift_seconds)
        return [*(window.frames for window in self.windows), *seconds]


def drift_frames(second: int, fps: int = FPS) -> tuple[int, int]:
    """Return the numbers of the last two video frames of a second."""
    return fps * second - 1, fps * second


def shifted_inside(frames: Sequence[int], steps: int) -> list[int]:
    """Shift a run of consecutive frame numbers back so that it ends inside a video.

    The video has 1 + 4 `steps` frames. A run that is longer than the video loses its beginning.
    """
    beyond = max(0, frames[-1] - FRAMES_PER_LATENT * steps)
    return [frame - beyond for frame in frames if frame >= beyond]
