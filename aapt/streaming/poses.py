"""Pose scripts: keypoints over time, from a preset or a JSON file.

A file holds video frames per second, and for every video frame the 14 points of `POINTS`:

    {"fps": 12, "keypoints": [[[0.50, 0.33], [0.50, 0.45], null, ...], ...]}

A point is [x, y], shares of the image's width and height from the top left corner, or null if it is
hidden. Points between two video frames are interpolated. A script that is shorter than the video is
played forwards and backwards in turn, so that nothing jumps.
"""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..model.pose import POINTS, Pose, check_points

FOLDER = Path(__file__).parent.parent / "assets" / "poses"  # torch is imported later
PRESETS = ("show", "still", "walk", "wave", "dance", "jump", "reach")
FPS_RANGE = (1.0, 240.0)


@dataclass(frozen=True)
class PoseScript:
    """Poses at `fps` video frames per second, (frames, 14, 3) of (x, y, visible), two or more."""

    name: str
    fps: float
    points: np.ndarray

    @property
    def seconds(self) -> float:
        """Time from the first pose to the last."""
        return (len(self.points) - 1) / self.fps

    def at(self, seconds: float) -> np.ndarray:
        """The points (14, 3) at a time, forwards and backwards in turn.

        A point between two poses is visible if it is in both.
        """
        seconds = seconds % (2 * self.seconds)
        place = min(seconds, 2 * self.seconds - seconds) * self.fps
        before = min(int(place), len(self.points) - 2)
        a, b, share = self.points[before], self.points[before + 1], place - before
        found = a + share * (b - a)
        found[:, 2] = np.minimum(a[:, 2], b[:, 2])
        return found

    @property
    def first(self) -> Pose:
        """The pose of the first video frame."""
        return Pose(self.at(0.0)[None])

    def steps(self, fps: float, frames: int) -> Iterator[Pose]:
        """Yields without end the poses of steps of `frames` video frames after the first, at `fps`
        video frames per second."""
        at = 1
        while True:
            yield Pose(np.stack([self.at((at + frame) / fps) for frame in range(frames)]))
            at += frames


def load_poses(name_or_path: str | Path) -> PoseScript:
    """Loads the preset of that name, else the file at that path (see the module's docstring).

    ValueError, in one line, for an unknown name or a file that is not a pose script.
    """
    name = str(name_or_path)
    if name in PRESETS:
        return _read(name, FOLDER / f"{name}.json")
    path = Path(name)
    if path.is_file():
        return _read(name, path)
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"pose: expected a file or one of {', '.join(PRESETS)}, got {name!r}{hint}")


def _read(name: str, path: Path) -> PoseScript:
    try:
        script = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"pose: cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: expected JSON: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path}: expected JSON of poses, got none") from None
    try:
        return PoseScript(name, *_parse(script))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except OverflowError:
        raise ValueError(
            f"{path}: keypoints: expected finite numbers, got a whole number beyond float64"
        ) from None


def _parse(script: Any) -> tuple[float, np.ndarray]:
    if not isinstance(script, dict) or script.keys() != {"fps", "keypoints"}:
        raise ValueError('expected {"fps": 24, "keypoints": [...]}')
    fps, frames = script["fps"], script["keypoints"]
    low, high = FPS_RANGE
    if not _is_number(fps) or not low <= fps <= high:
        raise ValueError(f"fps: expected a number in [{low:g}, {high:g}], got {fps!r}")
    if not isinstance(frames, list) or len(frames) < 2:
        got = len(frames) if isinstance(frames, list) else repr(frames)[:40]
        raise ValueError(f"keypoints: expected two video frames or more, got {got}")
    points = np.array([_frame(number, frame) for number, frame in enumerate(frames)])
    check_points(points)
    return float(fps), points


def _frame(number: int, frame: Any) -> list[tuple[float, float, float]]:
    if not isinstance(frame, list) or len(frame) != len(POINTS):
        got = f"{len(frame)} points" if isinstance(frame, list) else repr(frame)[:40]
        raise ValueError(
            f"keypoints: expected {len(POINTS)} points ({', '.join(POINTS)}) in video frame "
            f"{number}, got {got}"
        )
    return [_point(number, name, point) for name, point in zip(POINTS, frame)]


def _point(number: int, name: str, point: Any) -> tuple[float, float, float]:
    if point is None:
        return (0.0, 0.0, 0.0)
    if not isinstance(point, list) or len(point) != 2 or not all(map(_is_number, point)):
        raise ValueError(
            f"keypoints: expected [x, y] or null for the {name} in video frame {number}, got "
            f"{point!r}"[:160]
        )
    return (float(point[0]), float(point[1]), 1.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
