"""Control scripts: the camera's controls over time, from a preset or a file.

A text file holds one piece per line, seconds and keys, with `#` before a comment:

    2.0 w     # walk ahead
    1.5 wd    # walk and turn right
    0.5 -     # stand still

w walks ahead, s walks back, a turns left, d turns right. A `.json` file holds a list of pieces in
numbers instead, `[{"seconds": 2, "yaw": 0.5, "forward": 1}, ...]`; a value left out is 0. A script
that is shorter than the video is repeated.
"""

import difflib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..clock import STEP_SECONDS

if TYPE_CHECKING:  # importing torch takes a second, so not before a control is made
    from ..model.conditioning import Control

YAW_RANGE = (-1.0, 1.0)
FORWARD_RANGE = (-0.4, 1.0)  # deflections seen in training: walking back is slow
KEYS = {"w": (0.0, 1.0), "s": (0.0, -0.4), "a": (-1.0, 0.0), "d": (1.0, 0.0)}  # (yaw, forward)

PRESETS = {  # name -> (seconds, yaw, forward) pieces
    "walk": (
        (1.5, 0.0, 1.0),
        (1.0, 0.5, 0.8),
        (1.5, 0.0, 1.0),
        (1.0, -0.6, 0.6),
        (0.5, -0.3, 1.0),
        (1.5, 0.0, 1.0),
        (1.0, 0.8, 0.4),
        (1.0, 0.2, 1.0),
        (1.0, -0.5, 0.8),
    ),
    "still": ((1.0, 0.0, 0.0),),
    "forward": ((1.0, 0.0, 1.0),),
    "back": ((1.0, 0.0, -0.4),),
    "turn-left": ((1.0, -0.5, 0.0),),
    "turn-right": ((1.0, 0.5, 0.0),),
    "look-around": (
        (1.5, -0.6, 0.0),
        (0.5, 0.0, 0.0),
        (3.0, 0.6, 0.0),
        (0.5, 0.0, 0.0),
        (1.5, -0.6, 0.0),
        (0.5, 0.0, 0.0),
    ),
    "circle": ((1.0, 0.4, 0.8),),
    "zigzag": ((1.0, 0.7, 0.8), (1.0, -0.7, 0.8)),
    "there-and-back": ((2.0, 0.0, 1.0), (0.5, 0.0, 0.0), (5.0, 0.0, -0.4), (0.5, 0.0, 0.0)),
}


@dataclass(frozen=True)
class Piece:
    """One deflection held for `seconds`."""

    seconds: float
    yaw: float = 0.0
    forward: float = 0.0

    def __post_init__(self):
        for name, expected, low, high in (
            ("seconds", "a finite number above 0", math.ulp(0.0), sys.float_info.max),
            ("yaw", "a number in [{:g}, {:g}]", *YAW_RANGE),
            ("forward", "a number in [{:g}, {:g}]", *FORWARD_RANGE),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and low <= value <= high):
                raise ValueError(f"{name}: expected {expected.format(low, high)}, got {value!r}")


@dataclass(frozen=True)
class ControlScript:
    """Pieces played in turn and repeated for ever; iterating yields one Control per step."""

    name: str
    pieces: tuple[Piece, ...]
    step_seconds: float = STEP_SECONDS

    @property
    def seconds(self) -> float:
        return sum(piece.seconds for piece in self.pieces)

    def at(self, seconds: float) -> Piece:
        """The piece that is playing `seconds` after the start."""
        ends = itertools.accumulate(piece.seconds for piece in self.pieces)
        seconds = seconds % self.seconds
        return next((p for p, end in zip(self.pieces, ends) if seconds < end), self.pieces[-1])

    def __iter__(self) -> Iterator["Control"]:
        """Yields controls without end; a step follows the piece that plays at its middle."""
        from ..model.conditioning import Control

        for step in itertools.count():
            piece = self.at((step + 0.5) * self.step_seconds)
            yield Control(yaw=piece.yaw, forward=piece.forward)


def load_controls(name_or_path: str | Path, step_seconds: float = STEP_SECONDS) -> ControlScript:
    """Loads the preset of that name, else the file at that path (see the module's docstring).

    ValueError, in one line, for an unknown name or a file that is not a control script.
    """
    name = str(name_or_path)
    if name in PRESETS:
        pieces = tuple(Piece(*piece) for piece in PRESETS[name])
    elif _exists(Path(name)):
        pieces = _read(Path(name))
    else:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"controls: expected a file or one of {', '.join(PRESETS)}, got {name!r}{hint}"
        )
    return ControlScript(name, pieces, step_seconds)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise ValueError(f"controls: cannot read {path}: {error.strerror}") from None


def _read(path: Path) -> tuple[Piece, ...]:
    if not (path.is_file() or path.is_dir()):  # a pipe would be waited for without end
        raise ValueError(
            f"controls: expected a text file, got {path}: a pipe or a device; save it first"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"controls: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"controls: expected a text file, got {path}: not UTF-8") from None
    pieces = _parse_json(path, text) if path.suffix == ".json" else _parse_text(path, text)
    if not pieces:
        raise ValueError(f"{path}: expected at least one piece such as '2.0 w', got none")
    return pieces


def _parse_text(path: Path, text: str) -> tuple[Piece, ...]:
    pieces = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            if len(words) != 2:
                raise ValueError(f"expected '<seconds> <keys>' such as '2.0 wd', got {line!r}")
            pieces.append(Piece(_seconds(words[0]), *_deflection(words[1])))
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
    return tuple(pieces)


def _parse_json(path: Path, text: str) -> tuple[Piece, ...]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: expected JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: expected a flat list of pieces, got deep nesting") from None
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected a list of pieces, got {type(items).__name__}")
    names = {field.name for field in fields(Piece)}
    pieces = []
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict) or not {"seconds"} <= item.keys() <= names:
            raise ValueError(
                f"{path}: piece {number}: expected an object of seconds and, where not 0, "
                f"yaw and forward, got {json.dumps(item)}"
            )
        try:
            pieces.append(Piece(**item))
        except ValueError as error:
            raise ValueError(f"{path}: piece {number}: {error}") from None
    return tuple(pieces)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"seconds: expected a number, got {text!r}") from None


def _deflection(keys: str) -> tuple[float, float]:
    """(yaw, forward) of keys held together, as in 'wd'; '-' is no key."""
    pressed = set() if keys == "-" else set(keys.lower())
    opposite = {"w", "s"} <= pressed or {"a", "d"} <= pressed
    if pressed - KEYS.keys() or opposite or len(pressed) != len(keys.replace("-", "")):
        raise ValueError(
            f"keys: expected - or any of w a s d, each once and no opposites, got {keys!r}"
        )
    return sum(KEYS[key][0] for key in pressed), sum(KEYS[key][1] for key in pressed)
