"""Walks: every action that made a stream, as JSON lines that replay bit for bit.

The first line names what the walk starts from; each later line is one step or one branch:

    {"walk": 1, "aapt": "0.1.0", "model": "tiny-world", "digest": "5e0c...", "first_frame":
     "<PNG, base64>", "prompt": "green meadow at noon", "seed": 0}
    {"step": 1, "yaw": 0.0, "forward": 1.0, "crc": 2774014811}
    {"step": 2, "yaw": 0.5, "forward": 1.0, "prompt": "neon city at night", "crc": 910386502}
    {"branch": 1, "parent": 0, "from": 1}
    {"step": 2, "yaw": -1.0, "forward": 0.0, "crc": 3158046101, "redone": [[0.0, 1.0, 2]]}
    {"step": 3, "yaw": -1.0, "forward": 0.0, "crc": 1264088719, "together": 3}

The first frame is null in a walk that starts from its prompt alone. A step of a model that follows
poses has `pose` instead of `yaw` and `forward`, the points [x, y, visible] of each video frame; so
has the first line, for the first frame, if a pose was given there. The first line has `cache`, the
name of the stream's cache, if that is not "model". Steps follow the branch line above them, and
branch 0 needs no line. `prompt` is written where it changes. `redone` lists earlier passes of that
step as [yaw, forward, video frames shown], or [pose, video frames shown]: they were made again when
the control changed. `crc` is the CRC-32 of the step's video frames: a replay tells with it where
another build or device first makes other bits. `together` is the number of streams that the step's
pass was for, 1 unless written: bits of a shared pass, and of the steps after, are not those of a
stream alone.
"""

import base64
import binascii
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ..checkpoint import file_digest
from ..model.caches import MODEL, check_name, check_same
from ..model.conditioning import Control
from ..model.pose import Pose

if TYPE_CHECKING:
    from .generator import StreamingGenerator
    from .stream import Stream

FORMAT = 1
MAX_PIXELS = 1 << 26  # of a first frame in a file


class Redone(NamedTuple):
    """A pass that was made again, and how many of its video frames had been shown."""

    yaw: float
    forward: float
    shown: int

    @property
    def control(self) -> Control:
        return Control(self.yaw, self.forward)


class RedonePose(NamedTuple):
    """A pass under a pose that was made again, and how many of its video frames had been shown."""

    pose: Pose
    shown: int

    @property
    def control(self) -> Pose:
        return self.pose


class Step(NamedTuple):
    """One step: its control, the prompt in force, the CRC-32 of its video frames, earlier passes,
    and the number of streams in its pass. yaw and forward are None for a model that its prompt
    alone drives, and for one that follows poses."""

    yaw: float | None
    forward: float | None
    prompt: str
    crc: int | None = None
    redone: tuple[Redone | RedonePose, ...] = ()
    together: int = 1
    pose: Pose | None = None

    @property
    def control(self) -> Control | Pose | None:
        return self.pose if self.yaw is None else Control(self.yaw, self.forward)

    def under(self, control: Control | Pose | None) -> "Step":
        """Returns the step with another control."""
        if isinstance(control, Control):
            return self._replace(yaw=control.yaw, forward=control.forward, pose=None)
        return self._replace(yaw=None, forward=None, pose=control)

    def redone_after(self, shown: int) -> Redone | RedonePose:
        """Returns the step as an earlier pass, of which `shown` video frames had been shown."""
        if self.yaw is None:
            return RedonePose(self.pose, shown)
        return Redone(self.yaw, self.forward, shown)


@dataclass
class Branch:
    """Steps `start` + 1 onwards of one line of play; the earlier ones are those of `parent`."""

    parent: int | None
    start: int
    steps: list[Step] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + len(self.steps)


@dataclass
class Walk:
    """A tree of steps, all from one first frame.

    Attributes:
        model, digest: Name and SHA-256 of the model.
        first_frame: uint8 (height, width, 3); None for a stream from the prompt alone.
        prompt: The prompt before the first step.
        seed: The seed of all noise.
        pose: Of the first frame, if a pose was given.
        cache: The name of the stream's cache.
        size: Height and width of the video of a stream from the prompt alone; None for those of the
            first frame, and for logs that do not say it.
    """

    model: str
    digest: str
    first_frame: np.ndarray | None
    prompt: str
    seed: int
    branches: list[Branch] = field(default_factory=lambda: [Branch(None, 0)])
    pose: Pose | None = None
    cache: str = MODEL
    size: tuple[int, int] | None = None

    def copy(self) -> "Walk":
        """Returns a walk of its own with these steps."""
        branches = [replace(branch, steps=branch.steps.copy()) for branch in self.branches]
        return replace(self, branches=branches)

    def check(self, branch: int, step: int) -> None:
        """ValueError unless the walk has this step."""
        if not 0 <= branch < len(self.branches):
            raise ValueError(f"branch: expected a number below {len(self.branches)}, got {branch}")
        if not 0 <= step <= self.branches[branch].end:
            raise ValueError(
                f"step: expected at most {self.branches[branch].end} in branch {branch}, got {step}"
            )

    def append(self, branch: int, after: int, step: Step) -> int:
        """Adds a step after step `after` of a branch: at its end, else in a new branch. Returns the
        branch that the step is in."""
        self.check(branch, after)
        if after < self.branches[branch].end:
            branch = self.split(branch, after)
        self.branches[branch].steps.append(step)
        return branch

    def split(self, branch: int, after: int) -> int:
        """Adds an empty branch after a step; returns its number."""
        self.check(branch, after)
        while after < self.branches[branch].start:
            branch = self.branches[branch].parent
        self.branches.append(Branch(branch, after))
        return len(self.branches) - 1

    def lineage(self, branch: int, step: int) -> Iterator[tuple[int, int, int]]:
        """Yields (branch, first step, last step) of the parts of the path to a step, last part
        first; a part may be empty."""
        self.check(branch, step)
        at: int | None = branch
        while at is not None:
            start = self.branches[at].start
            yield at, start + 1, step
            step, at = min(step, start), self.branches[at].parent

    def path(self, branch: int, step: int) -> list[Step]:
        """Returns steps 1 to `step` as that branch has them."""
        steps: list[Step] = []
        for part, first, last in self.lineage(branch, step):
            made = self.branches[part]
            steps[:0] = made.steps[first - 1 - made.start : max(0, last - made.start)]
        return steps

    def prompt_at(self, branch: int, step: int) -> str:
        """Returns the prompt in force in a step."""
        for part, first, last in self.lineage(branch, step):
            if first <= last:
                return self.branches[part].steps[last - first].prompt
        return self.prompt

    def pose_at(self, branch: int, step: int) -> Pose | None:
        """Returns the pose of a step's video frames, in step 0 that of the first frame, if any."""
        for part, first, last in self.lineage(branch, step):
            if first <= last:
                return self.branches[part].steps[last - first].pose
        return self.pose

    @property
    def steps(self) -> int:
        """Steps of all branches."""
        return sum(len(branch.steps) for branch in self.branches)

    def lines(self, version: str) -> Iterator[str]:
        """Yields the walk as JSON lines. version: of this package."""
        picture = None
        if self.first_frame is not None:
            file = io.BytesIO()
            Image.fromarray(self.first_frame).save(file, "png")
            picture = base64.b64encode(file.getvalue()).decode()
        yield json.dumps(
            {
                "walk": FORMAT,
                "aapt": version,
                "model": self.model,
                "digest": self.digest,
                "first_frame": picture,
                "prompt": self.prompt,
                "seed": self.seed,
                **_pose_field(self.pose),
                **({} if self.cache == MODEL else {"cache": self.cache}),
                **({} if self.size is None else {"size": self.size}),
            }
        )
        for number, branch in enumerate(self.branches):
            if number:
                line = {"branch": number, "parent": branch.parent, "from": branch.start}
                yield json.dumps(line)
            prompt = self.prompt if not number else self.prompt_at(branch.parent, branch.start)
            for index, step in enumerate(branch.steps, start=branch.start + 1):
                yield json.dumps(_step_line(index, step, prompt))
                prompt = step.prompt


def _step_line(number: int, step: Step, before: str) -> dict[str, Any]:
    line: dict[str, Any] = {"step": number}
    if step.yaw is not None:
        line |= {"yaw": step.yaw, "forward": step.forward}
    line |= _pose_field(step.pose)
    if step.prompt != before:
        line["prompt"] = step.prompt
    if step.crc is not None:
        line["crc"] = step.crc
    if step.redone:
        line["redone"] = [_redone_entry(earlier) for earlier in step.redone]
    if step.together > 1:
        line["together"] = step.together
    return line


def _redone_entry(earlier: Redone | RedonePose) -> list[Any]:
    if isinstance(earlier, RedonePose):
        return [earlier.pose.points.tolist(), earlier.shown]
    return list(earlier)


def _pose_field(pose: Pose | None) -> dict[str, Any]:
    return {} if pose is None else {"pose": pose.points.tolist()}


def _read_pose(line: dict[str, Any]) -> Pose | None:
    return _pose(line["pose"]) if "pose" in line else None


def _pose(points: Any) -> Pose:
    try:
        return Pose(points)
    except (OverflowError, TypeError, ValueError) as error:
        said = str(error)
        raise ValueError(said if said.startswith("pose: ") else f"pose: {said}"[:160]) from None


def load_walk(lines: Iterable[str]) -> Walk:
    """Reads a walk. ValueError names the line, what was expected and what was given."""
    walk, branch = None, 0
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = _json(text)
            if not isinstance(line, dict):
                raise ValueError(f"expected an object, got {text[:40]!r}")
            if walk is None:
                walk = _read_start(line)
            elif "branch" in line:
                branch = _read_branch(walk, line)
            else:
                _read_step(walk, branch, line)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"walk: line {number}: {error}") from None
    if walk is None:
        raise ValueError("walk: expected JSON lines of an action log, got none")
    return walk


def _read_redone(earlier: Any, posed: bool) -> Redone | RedonePose:
    """Reads an earlier pass of a step. posed: the step has a pose."""
    length, fields = (2, "pose, frames") if posed else (3, "yaw, forward, frames")
    if not (isinstance(earlier, list) and len(earlier) == length and isinstance(earlier[-1], int)):
        raise ValueError(f"redone: expected [{fields}], got {earlier!r}"[:120])
    if posed:
        return RedonePose(_pose(earlier[0]), earlier[1])
    control = Control(*earlier[:2])
    return Redone(control.yaw, control.forward, earlier[2])


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON, got {text[:40]!r}: {error.msg}") from None


def read_walk(file: Path) -> Walk:
    """Reads a walk from a file. ValueError as `load_walk`, and for a file that cannot be read."""
    try:
        return load_walk(file.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise ValueError(f"walk: cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"walk: expected a text file, got {file}: not UTF-8") from None


def _get(line: dict[str, Any], name: str, kind: type, *default: Any) -> Any:
    value = line.get(name, *default)
    if (isinstance(value, kind) and not isinstance(value, bool)) or (
        default and value is default[0]
    ):
        return value
    raise ValueError(f"{name}: expected {kind.__name__}, got {value!r}"[:120])


def _read_start(line: dict[str, Any]) -> Walk:
    if line.get("walk") != FORMAT:
        raise ValueError(f"walk: expected {FORMAT}, got {line.get('walk')!r}"[:120])
    first_frame = _read_picture(line)
    seed = _get(line, "seed", int)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {seed}")
    names = (_get(line, name, str) for name in ("model", "digest"))
    pose, cache = _read_pose(line), check_name(_get(line, "cache", str, MODEL))
    like = dict(pose=pose, cache=cache, size=_read_size(line))
    return Walk(*names, first_frame, _get(line, "prompt", str), seed, **like)


def _read_size(line: dict[str, Any]) -> tuple[int, int] | None:
    given = line.get("size")
    if given is None:
        return None
    if not isinstance(given, list) or [type(x) for x in given] != [int, int] or min(given) < 1:
        raise ValueError(f"size: expected [height, width], got {given!r}"[:120])
    return tuple(given)


def _read_picture(line: dict[str, Any]) -> np.ndarray | None:
    if "first_frame" in line and line["first_frame"] is None:
        return None
    try:
        data = base64.b64decode(_get(line, "first_frame", str), validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"expected at most {MAX_PIXELS} pixels")
            return np.array(picture.convert("RGB"))
    except (
        binascii.Error,
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"first_frame: expected a PNG in base64: {error}"[:160]) from None


def _read_branch(walk: Walk, line: dict[str, Any]) -> int:
    number = len(walk.branches)
    if line["branch"] != number:
        raise ValueError(f"branch: expected {number}, got {line['branch']!r}")
    parent, after = _get(line, "parent", int), _get(line, "from", int)
    walk.check(parent, after)
    if after < walk.branches[parent].start:
        raise ValueError(
            f"from: expected at least {walk.branches[parent].start} in branch {parent}, got {after}"
        )
    return walk.split(parent, after)


def _read_step(walk: Walk, branch: int, line: dict[str, Any]) -> None:
    end = walk.branches[branch].end
    if line.get("step") != end + 1:
        raise ValueError(f"step: expected {end + 1}, got {line.get('step')!r}"[:120])
    yaw, forward = (line.get(name) for name in ("yaw", "forward"))
    if (yaw, forward) != (None, None):
        control = Control(yaw, forward)
        yaw, forward = control.yaw, control.forward
    pose = _read_pose(line)
    if pose is not None and yaw is not None:
        raise ValueError("pose: expected no yaw and forward beside it, got some")
    redone = [_read_redone(earlier, pose is not None) for earlier in _get(line, "redone", list, [])]
    prompt = _get(line, "prompt", str, walk.prompt_at(branch, end))
    crc = _get(line, "crc", int, None)
    together = _get(line, "together", int, 1)
    if together < 1:
        raise ValueError(f"together: expected at least 1, got {together}")
    walk.append(branch, end, Step(yaw, forward, prompt, crc, tuple(redone), together, pose))


def model_digest(folder: Path) -> str:
    """Returns the SHA-256 of a checkpoint's weights, which a walk names. CheckpointError if a file
    cannot be read."""
    digests = [file_digest(folder / f"{part}.safetensors") for part in ("model", "vae")]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def frames_crc(frames: np.ndarray) -> int:
    """Returns the CRC-32 of video frames."""
    return zlib.crc32(np.ascontiguousarray(frames))


def take_prompt(stream: "Stream", step: Step) -> None:
    """Gives a stream the prompt of its next step."""
    if stream.prompt != step.prompt:
        stream.prompt = step.prompt


def submit(stream: "Stream", step: Step) -> Callable[[], np.ndarray]:
    """Starts one step of a walk; returns the call that waits for its video frames, see
    `Stream.submit`. Earlier passes of the step are not made again: they change no later frame."""
    take_prompt(stream, step)
    return stream.submit(step.control)


def make(stream: "Stream", step: Step) -> np.ndarray:
    """Makes one step of a walk, uint8 (frames, H, W, 3)."""
    return submit(stream, step)()


def make_as_seen(stream: "Stream", step: Step) -> tuple[np.ndarray, np.ndarray]:
    """Makes one step of a walk. Returns its video frames, and these frames as they were shown: up
    to a redo those of the earlier pass."""
    if not step.redone:
        frames = make(stream, step)
        return frames, frames
    snapshot = stream.snapshot()
    shown: list[np.ndarray] = []
    for earlier in (*step.redone, None):
        stream.restore(snapshot)
        frames = make(stream, step if earlier is None else step.under(earlier.control))
        shown.extend(frames[len(shown) : len(frames) if earlier is None else earlier.shown])
    return frames, np.stack(shown)


class Replay:
    """A stream that makes the steps of a walk again, as they were shown.

    Attributes:
        first_frame: The first frame as the decoder shows it, uint8 (1, H, W, 3); (0, H, W, 3) in a
            walk from its prompt alone.
        differing: Numbers of the steps whose video frames have another CRC-32.
        shared: Number of the first step whose pass was shared with other streams, None before one.
            CRC-32 are compared up to there: this stream, which is alone, makes near pixels after.

    CacheError unless the generator's cache is that of the walk.
    """

    def __init__(self, generator: "StreamingGenerator", walk: Walk):
        check_same("walk", generator.cache, walk.cache, f"choose the cache {walk.cache}")
        self.generator = generator
        self.differing: list[int] = []
        self.shared: int | None = None
        self._stream = generator.open(walk.first_frame, walk.prompt, walk.seed, pose=walk.pose)
        self.first_frame = self._stream.first_frame

    def step(self, step: Step) -> np.ndarray:
        """Makes the next step of a path, uint8 (frames, H, W, 3)."""
        frames, shown = make_as_seen(self._stream, step)
        if self.shared is None and step.together > 1:
            self.shared = self._stream.steps
        if self.shared is None and step.crc not in (None, frames_crc(frames)):
            self.differing.append(self._stream.steps)
        return shown

    def close(self) -> None:
        """Frees the stream's memory."""
        self._stream.close()
