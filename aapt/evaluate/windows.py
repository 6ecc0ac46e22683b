"""The moments of an evaluation: windows, every second, and the seconds of the sheet."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..clock import FPS, FRAMES_PER_LATENT, SHEET_SECONDS, STEPS_PER_SECOND


@dataclass(frozen=True)
class Window:
    """The steps `first` to `last`, counted from 1; step n makes video frames 4 n - 3 to 4 n."""

    name: str
    first: int
    last: int

    @property
    def frames(self) -> range:
        """Numbers of the window's video frames, and before them of the last one before it."""
        return range(FRAMES_PER_LATENT * (self.first - 1), FRAMES_PER_LATENT * self.last + 1)

    @property
    def middle(self) -> float:
        """Middle of the window in seconds of video."""
        return (self.first - 1 + self.last) / 2 / STEPS_PER_SECOND


WINDOWS = (
    Window("0-1.3 s", 1, 8),
    Window("4-6 s", 25, 36),
    Window("29-31 s", 175, 186),
    Window("55-60 s", 331, 360),
    Window("175-180 s", 1051, 1080),
    Window("295-300 s", 1771, 1800),
)


@dataclass(frozen=True)
class Schedule:
    """The moments at which rollouts of `steps` latent frames, and their truth, are measured.

    true_steps: latent frames of the truth, which may be shorter or longer. Neither number counts
    the first frame.
    """

    steps: int
    true_steps: int

    @cached_property
    def windows(self) -> list[Window]:
        """Windows that end within the rollouts."""
        return [window for window in WINDOWS if window.last <= self.steps]

    @cached_property
    def sheet_seconds(self) -> list[int]:
        """Seconds of video that the contact sheet shows."""
        return [s for s in SHEET_SECONDS if s * FPS <= self.steps * FRAMES_PER_LATENT]

    @cached_property
    def drift_seconds(self) -> range:
        """Whole seconds of the rollouts, from 1."""
        return range(1, self.steps // STEPS_PER_SECOND + 1)

    @cached_property
    def true_seconds(self) -> range:
        """Whole seconds of the rollouts at which there is a truth."""
        return range(1, min(self.steps, self.true_steps) // STEPS_PER_SECOND + 1)

    @cached_property
    def frames(self) -> list[int]:
        """Numbers of the video frames that are measured or shown of a rollout."""
        return sorted({s * FPS for s in self.sheet_seconds}.union(*self._runs))

    @cached_property
    def true_frames(self) -> list[int]:
        """Numbers of the video frames that are needed of the truth; some may be after its end."""
        moved = (shifted_inside(run, self.true_steps) for run in self._runs)
        return sorted(set(self.frames).union(*moved))

    @property
    def _runs(self) -> list[Sequence[int]]:
        """Runs of consecutive frame numbers that are measured together."""
        return [*(window.frames for window in self.windows), *map(drift_frames, self.drift_seconds)]


def drift_frames(second: int) -> tuple[int, int]:
    """Return the numbers of the last two video frames of a second."""
    return FPS * second - 1, FPS * second


def shifted_inside(frames: Sequence[int], steps: int) -> list[int]:
    """Shift a run of consecutive frame numbers back so that it ends inside a video.

    The video has 1 + 4 `steps` frames. A run that is longer than the video loses its beginning.
    """
    beyond = max(0, frames[-1] - FRAMES_PER_LATENT * steps)
    return [frame - beyond for frame in frames if frame >= beyond]
