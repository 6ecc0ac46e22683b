"""When an evaluation looks: in windows, at every second, and at the seconds of the sheet."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..clock import FPS, FRAMES_PER_LATENT, STEPS_PER_SECOND


@dataclass(frozen=True)
class Window:
    """The steps `first` to `last`, counted from 1; step n makes video frames 4 n - 3 to 4 n."""

    name: str
    first: int
    last: int

    @property
    def frames(self) -> range:
        """Its video frames, and before them the last one of the step before."""
        return range(FRAMES_PER_LATENT * (self.first - 1), FRAMES_PER_LATENT * self.last + 1)

    @property
    def middle(self) -> float:
        """In seconds."""
        return (self.first - 1 + self.last) / 2 / STEPS_PER_SECOND


WINDOWS = (
    Window("0-1.3 s", 1, 8),
    Window("4-6 s", 25, 36),
    Window("29-31 s", 175, 186),
    Window("55-60 s", 331, 360),
)


def drift_frames(second: int) -> tuple[int, int]:
    """The video frames that stand for a second: its last two."""
    return FPS * second - 1, FPS * second


def nearest(frames: Sequence[int], steps: int) -> list[int]:
    """The video frames that stand for `frames`, successive ones, where `steps` latent frames follow
    the first: themselves, or where they go on for longer the last ones, as many as there are."""
    beyond = max(0, frames[-1] - FRAMES_PER_LATENT * steps)
    return [frame - beyond for frame in frames if frame >= beyond]
