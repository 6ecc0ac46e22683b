"""One visitor's world: a tree of steps, its snapshots, and one or two streams being played.

A world is used by the generator thread alone. What takes many steps is an iterator that pauses
after each of them, so that other worlds have their turn.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..model.conditioning import Control
from ..model.pose import Pose
from ..streaming.actions import Step, Walk, frames_crc, make, submit
from ..streaming.controls import FORWARD_RANGE, YAW_RANGE
from ..streaming.figure import PoseGoal, next_pose
from ..streaming.generator import StreamingGenerator
from ..streaming.history import History
from ..streaming.skeletons import NOBODY
from ..streaming.snapshot import Snapshot
from ..streaming.stream import Stream
from .saved import SavedWorld, load_saved
from .settings import Settings


@dataclass
class Lane:
    """A stream being played, and its place in the tree.

    Attributes:
        script: Recorded controls still to be played, next one last.
        frames: The video frames of the last step.
        before: The state before the last step, while a redo may ask for it.
        seeking: A seek is under way: the stream is not at branch and step.
    """

    stream: Stream
    branch: int
    step: int
    frames: np.ndarray
    script: list[Control | Pose] = field(default_factory=list)
    before: Snapshot | None = None
    seeking: bool = False


@dataclass(frozen=True)
class Made:
    """One step: its video frames, uint8 (F, H, W, 3), its place, and seconds of its phases."""

    frames: np.ndarray
    branch: int
    step: int
    model_seconds: float = 0.0
    pixel_seconds: float = 0.0


@dataclass(frozen=True)
class Pass:
    """A pass of the model that has been submitted.

    Attributes:
        pixels: Waits for the video frames of one stream.
        started, submitted: When it began and when it was submitted, in seconds of
            `time.perf_counter`.
        streams: Streams that share it.
    """

    pixels: Callable[[], np.ndarray]
    started: float
    submitted: float
    streams: int = 1


class World:
    """A walk that is being made.

    Attributes:
        walk: All steps so far.
        driven_by: See `driven_by`.
        lanes: One stream, in a split two.
        prompt: The prompt of the next step.
        redo: Keep what a redo needs.
    """

    def __init__(self, generator: StreamingGenerator, walk: Walk, settings: Settings):
        self.generator, self.walk, self.settings = generator, walk, settings
        self.driven_by = driven_by(generator)
        self.redo = False
        self.prompt = walk.prompt
        self.lanes: list[Lane] = []
        per_second = generator.fps / generator.frames_per_step
        every = max(1, round(settings.snapshot_seconds * per_second))
        budget = settings.history_mib << 20
        self.history = History(walk, budget, every, recent=math.ceil(60 * per_second))

    def open(self) -> Made:
        """Opens the first frame, a blank one for a walk from its prompt alone."""
        walk = self.walk
        stream = self.generator.open(walk.first_frame, walk.prompt, walk.seed, pose=walk.pose)
        frames = stream.first_frame
        if not len(frames):
            frames = blank(self.generator)[None]
        self._replace([Lane(stream, 0, 0, frames)])
        if (0, 0) not in self.history:
            self._remember(self.lanes[0])
        return Made(frames, 0, 0)

    def resume(
        self, branch: int, step: int, prompt: str, snapshot: Snapshot, frames: np.ndarray
    ) -> Made:
        """Opens a step whose snapshot and video frames were kept."""
        self.open()
        lane = self.lanes[0]
        lane.stream.restore(snapshot)
        lane.branch, lane.step, lane.frames, self.prompt = branch, step, frames, prompt
        self._remember(lane)
        return Made(frames, branch, step)

    def take(self, saved: SavedWorld) -> None:
        """Keeps the snapshot of a saved world. ValueError if it is not of this walk."""
        made = load_saved(saved, self.walk, self.lanes[0].stream.snapshot())
        self.history.add(saved.branch, saved.step, made, saved.frames)

    def _remember(self, lane: Lane) -> None:
        self.history.add(lane.branch, lane.step, lane.stream.snapshot(), lane.frames)

    def place(self) -> tuple[int, int]:
        """Returns branch and step of the first lane."""
        return self.lanes[0].branch, self.lanes[0].step

    def control(self, lane: Lane, given: Control | PoseGoal) -> Control | Pose | None:
        """Returns the control of a lane's next step, when the visitor's is `given`."""
        if lane.script:
            return lane.script[-1]
        return self._control_after(lane.branch, lane.step, given)

    def _control_after(
        self, branch: int, step: int, given: Control | PoseGoal
    ) -> Control | Pose | None:
        """Returns the control of the step after a step, when the visitor's is `given`."""
        if self.driven_by == "camera":
            return given
        if self.driven_by == "prompt":
            return None
        goal = given if isinstance(given, PoseGoal) else PoseGoal()
        before = (self.walk.pose_at(branch, step) or NOBODY).points[-1]
        generator = self.generator
        rate = generator.frames_per_step, generator.fps
        return next_pose(before, goal, step + 1, *rate, generator.width / generator.height)

    def begin(self, lane: Lane, control: Control | Pose | None) -> Step:
        """Returns a lane's next step, which a pass makes and `finish` ends."""
        lane.before = lane.stream.snapshot() if self.redo else None
        return Step(None, None, self.prompt).under(control)

    def finish(self, lane: Lane, step: Step, made: Pass) -> Made:
        """Ends a lane's next step: waits for its video frames and writes it to the walk."""
        seconds = self._take(lane, made)
        step = step._replace(crc=frames_crc(lane.frames), together=made.streams)
        lane.branch = self.walk.append(lane.branch, lane.step, step)
        lane.step += 1
        if lane.script:
            lane.script.pop()
        if self.history.wants(lane.branch, lane.step):
            self._remember(lane)
        return Made(lane.frames, lane.branch, lane.step, *seconds)

    @staticmethod
    def submit(lane: Lane, step: Step) -> Pass:
        """Starts a pass for one lane alone."""
        started = time.perf_counter()
        pixels = submit(lane.stream, step)
        return Pass(pixels, started, time.perf_counter())

    @staticmethod
    def _take(lane: Lane, made: Pass) -> tuple[float, float]:
        """Waits for a lane's video frames; returns the seconds until their pass was submitted, and
        then for the pixels."""
        lane.frames = made.pixels()
        return made.submitted - made.started, time.perf_counter() - made.submitted

    def again(self, lane: Lane, given: Control | PoseGoal, shown: int) -> Made:
        """Makes a lane's last step again, when the visitor's control is now `given`; `shown` of its
        frames were shown."""
        steps = self.walk.branches[lane.branch].steps
        earlier = steps[-1]
        lane.stream.restore(lane.before)
        redone = (*earlier.redone, earlier.redone_after(shown))
        control = self._control_after(lane.branch, lane.step - 1, given)
        step = Step(None, None, self.prompt, redone=redone).under(control)
        seconds = self._take(lane, self.submit(lane, step))
        steps[-1] = step._replace(crc=frames_crc(lane.frames))
        if (lane.branch, lane.step) in self.history:
            self._remember(lane)
        return Made(lane.frames, lane.branch, lane.step, *seconds)

    def seek(self, branch: int, step: int) -> Iterator[tuple[int, int]]:
        """Plays a stream up to a step from the nearest snapshot. Yields (steps replayed, steps to
        replay) before each step; the iterator's value is a `Made`. A split ends."""
        self.walk.check(branch, step)
        self._replace(self.lanes[:1])
        start = self._start(branch, step)
        lane, path = self.lanes[0], self.walk.path(branch, step)
        lane.before, lane.script, lane.seeking = None, [], True
        for number in range(start, step):
            yield number - start, step - start
            lane.frames = make(lane.stream, path[number])
        lane.branch, lane.step, lane.seeking = branch, step, False
        self.prompt = self.walk.prompt_at(branch, step)
        if start < step:
            self._remember(lane)
        return Made(lane.frames, branch, step)

    def _start(self, branch: int, step: int) -> int:
        """Moves the first lane to the nearest known step on the way to a step; returns it."""
        if self.lanes:
            lane = self.lanes[0]
            if not lane.seeking and (lane.branch, lane.step) == (branch, step):
                return step
        nearest = self.history.nearest(branch, step)
        if nearest is None or not self.lanes:
            before = self.place() if self.lanes else (0, 0)
            self.open()
            self.lanes[0].branch, self.lanes[0].step = before  # until the seek has ended
        if nearest is None:
            return 0
        lane = self.lanes[0]
        lane.stream.restore(nearest.snapshot)
        lane.frames = nearest.frames
        return nearest.step

    def split(self, branch: int, step: int) -> Iterator[tuple[int, int]]:
        """Opens two lanes at a step, each with a branch of its own; yields as `seek` does."""
        made = yield from self.seek(branch, step)
        first = self.lanes[0]
        second = Lane(first.stream.fork(), branch, step, first.frames)
        self.lanes = [first, second]
        for lane in self.lanes:
            lane.branch = self.walk.split(branch, step)
        return made

    def join(self) -> None:
        """Ends a split; the first lane stays."""
        self._replace(self.lanes[:1])

    def follow(self, branch: int) -> None:
        """Plays the recorded controls of a branch from here on, under the prompt in force.

        ValueError if the branch does not pass through this step.
        """
        lane = self.lanes[0]
        self.walk.check(branch, lane.step)
        path = self.walk.path(branch, self.walk.branches[branch].end)
        if path[: lane.step] != self.walk.path(lane.branch, lane.step):
            raise ValueError(f"branch: expected one through this step, got {branch}; seek to it")
        lane.script = [step.control for step in reversed(path[lane.step :])]

    def bytes(self) -> int:
        """Memory of streams and snapshots."""
        befores = (lane.before.bytes for lane in self.lanes if lane.before)
        return self.history.bytes + sum(lane.stream.bytes for lane in self.lanes) + sum(befores)

    def close(self) -> None:
        """Frees the memory of streams and snapshots; the walk stays."""
        self._replace([])
        self.history.clear()

    def _replace(self, lanes: list[Lane]) -> None:
        kept = {id(lane) for lane in lanes}
        for lane in self.lanes:
            if id(lane) not in kept:
                lane.stream.close()
        self.lanes = lanes


def driven_by(generator: StreamingGenerator) -> Literal["camera", "pose", "prompt"]:
    """Returns what a visitor drives a model by. ValueError for a model that takes other condition
    channels."""
    if generator.poses:
        return "pose"
    if generator.driven_by == "channels":
        raise ValueError(
            "model: expected one that a camera, poses or its prompt drives, got one driven by "
            "condition channels, which StreamingGenerator's streams take"
        )
    return generator.driven_by


def blank(generator: StreamingGenerator) -> np.ndarray:
    """Returns a grey picture, uint8 (height, width, 3), which stands where nothing is made yet."""
    return np.full((generator.height, generator.width, 3), 128, np.uint8)


def goal_of(points: list[tuple[float, float] | None] | None, motion: str | None) -> PoseGoal:
    """Returns the goal of a visitor's points, None for a hidden one, or motion."""
    return PoseGoal(None if points is None else pose_of(points), motion)


def pose_of(points: list[tuple[float, float] | None]) -> Pose:
    """Returns the pose of one video frame from its points, None for a hidden one."""
    return Pose([[(0, 0, 0) if point is None else (*point, 1) for point in points]])


def clamped(yaw: float, forward: float) -> Control:
    """Returns the control of deflections, within the ranges that models were trained with."""
    return Control(
        min(max(yaw, YAW_RANGE[0]), YAW_RANGE[1]),
        min(max(forward, FORWARD_RANGE[0]), FORWARD_RANGE[1]),
    )
