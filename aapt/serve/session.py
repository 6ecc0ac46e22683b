"""A visitor's session: input and commands in, messages with video frames out.

The connection's thread leaves input and jobs; the generator thread takes them slice by slice, as a
flow of the scheduler.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import numpy as np

from ..model.caches import CacheError
from ..model.conditioning import Control
from ..streaming.actions import Branch, Step, Walk
from ..streaming.figure import PoseGoal
from ..streaming.history import History
from ..streaming.snapshot import Snapshot
from . import protocol
from .images import FrameEncoder
from .metrics import Metrics
from .protocol import FrameHeader
from .saved import SavedWorld, write_saved
from .scheduler import Scheduler
from .sender import Send, Sender
from .world import Lane, Made, Pass, World, clamped, goal_of

EARLY = 0.75  # shortest time between the starts of two steps of a stream, in periods
SETTLE = 0.01  # seconds that a pass made for a changed control waits for further changes
SMOOTHING = 0.2  # weight of the newest step in the mean time of a step
LINES_PER_SLICE = 100
LONG_REPLAY = 6  # steps from which on progress is told
Job = Generator[None, None, None]
log = logging.getLogger("aapt.serve")


@dataclass(frozen=True)
class Place:
    """The state of a visitor's world. An open world has its history. A closed world may have a
    snapshot with the video frames of its last step, or a saved world of an earlier step. Otherwise
    it is replayed up to `step`."""

    walk: Walk
    branch: int
    step: int
    prompt: str
    snapshot: Snapshot | None = None
    frames: np.ndarray | None = None
    history: History | None = None
    saved: SavedWorld | None = None


@dataclass(frozen=True)
class Sample:
    """The visitor's input as a step uses it: keys held, or a figure's goal, keys tapped since the
    step before, and the sequence and client's time of the message that they came with."""

    held: Control | PoseGoal = Control()
    taps: Control = Control()
    sequence: int = 0
    time: float = 0.0

    @property
    def control(self) -> Control | PoseGoal:
        if isinstance(self.held, PoseGoal):
            return self.held
        return Control(self.taps.yaw or self.held.yaw, self.taps.forward or self.held.forward)


@dataclass(frozen=True)
class Turn:
    """A step of a lane that has begun, and when, in seconds of `time.perf_counter`."""

    lane: Lane
    step: Step
    started: float


class Session:
    """One world being played.

    Args:
        world: The world, not yet open.
        place: Where it stands once `resume` has opened it.
        send: Takes a message, and the lane of frames, None for a message that must arrive; called
            from the generator thread and that of the encoder.
        image_format: "jpeg", "webp" or "h264".
    """

    def __init__(
        self,
        world: World,
        place: Place,
        scheduler: Scheduler,
        metrics: Metrics,
        send: Send,
        image_format: str,
    ):
        self.world, self.scheduler, self.metrics = world, scheduler, metrics
        generator = world.generator
        size = generator.height, generator.width
        encoder = FrameEncoder(image_format, world.settings.quality, *size, generator.fps)
        self._format = protocol.FORMATS.index(image_format)
        self._sender = Sender(send, encoder)
        self.send = self._sender.send
        self.period = generator.frames_per_step / generator.fps  # seconds per step
        self.touched = time.monotonic()  # when the visitor last did something
        self.ended: str | None = None  # why the server ended it
        self.bytes = 0  # of streams and snapshots
        self.place = place
        self._lock = threading.Lock()
        self._inputs = [Sample(), Sample()]  # by lane
        self._shown: protocol.Shown | None = None
        self._shown_at = 0.0  # when the page said so, in seconds of `time.perf_counter`
        self._changed: float | None = None  # when the input first differed from what passes used
        self._wants_again = False
        self._jobs: deque[tuple[Job, bool]] = deque()  # with True for a seek
        self._closing = False
        # Used by the generator thread alone, but for `end`:
        self._playing = False
        self._prompt_sequence = 0
        self._samples = [Sample(), Sample()]  # used by the last step of each lane
        self._turn = 0  # the lane of the next step
        self._due = 0.0
        self._earliest = 0.0  # when the next step may begin if a control changes
        self._sent_at = 0.0  # when the frames of the last step were sent
        self._step_seconds = 0.0
        scheduler.add(self)

    # What a connection calls.

    def put_input(self, message: protocol.Input | protocol.PoseInput) -> None:
        """Replaces the state of the controls; taps are kept until a step takes them. ValueError for
        controls that do not drive the model."""
        held = control_of(message)
        tapped = message.taps if isinstance(message, protocol.Input) else None
        self._check(message.type, held)
        with self._lock:
            before = self._inputs[message.lane]
            taps = before.taps
            if tapped:
                new = control_of(tapped)
                taps = Control(new.yaw or taps.yaw, new.forward or taps.forward)
            self._inputs[message.lane] = Sample(held, taps, message.sequence, message.time)
            self._shown, self._shown_at = message.shown, time.perf_counter()
            changed = held != before.held or taps != before.taps
            if changed and self._changed is None:
                self._changed = self._shown_at
            self._wants_again |= changed and self.world.redo
        if changed:
            self.touched = time.monotonic()
            self.scheduler.wake()

    def _check(self, name: str, control: Control | PoseGoal) -> None:
        """ValueError unless a control is of the model's kind: a goal for a model that follows
        poses, else deflections, which a model that its prompt alone drives takes without effect."""
        kind = self.world.driven_by
        if isinstance(control, PoseGoal) != (kind == "pose"):
            wanted = "points or a motion" if kind == "pose" else "yaw and forward"
            raise ValueError(f"{name}: expected {wanted}, because this model is driven by {kind}")

    def post(self, job: Job, seek: bool = False, by_visitor: bool = True) -> None:
        """Adds a job. A seek replaces earlier seeks that are not finished. Without `by_visitor` the
        world counts as idle none the less."""
        if by_visitor:
            self.touched = time.monotonic()
        with self._lock:
            if self._closing:
                return
            if seek:
                self._jobs = deque(entry for entry in self._jobs if not entry[1])
            self._jobs.append((job, seek))
        self.scheduler.wake()

    def close(self, closed: Callable[[Place], None]) -> None:
        """Frees the world's memory after the slice under way; `closed` then gets the place where
        the world stood, on the thread that sends."""
        with self._lock:
            self._closing = True
            self._jobs = deque([(self._close(closed), False)])
        self.scheduler.wake()

    # Jobs of the generator thread.

    def resume(self) -> Job:
        """Opens the world at its place."""
        world, place = self.world, self.place
        at = place.branch, place.step
        if place.snapshot:
            made = world.resume(*at, place.prompt, place.snapshot, place.frames)
        else:
            if place.saved:
                self._take_saved(place.saved)
            made, _ = yield from self._telling(world.seek(*at))
            world.prompt = place.prompt
        self._opened(made, protocol.SEEK if place.step else protocol.FIRST)

    def _take_saved(self, saved: SavedWorld) -> None:
        """Keeps a saved world, from which the seek then starts; without one that fits the walk is
        replayed."""
        self.world.open()
        try:
            self.world.take(saved)
        except ValueError as error:
            self._refuse("upload", str(error))

    def reset(self, seed: int | None) -> Job:
        """Starts the walk again, with another seed if one is given."""
        playing, old = self._playing, self.world
        self._playing = False
        walk = replace(old.walk, branches=[Branch(None, 0)], prompt=old.prompt)
        walk.seed = walk.seed if seed is None else seed
        self.world = World(old.generator, walk, old.settings)
        self.world.redo = old.redo
        old.close()
        self._opened(self.world.open(), protocol.FIRST)
        self._play(playing)
        return
        yield

    def play(self, on: bool) -> Job:
        self._play(on)
        self._tell_state()
        return
        yield

    def redo(self, on: bool) -> Job:
        self.world.redo = on
        return
        yield

    def prompt(self, sequence: int, text: str) -> Job:
        """Changes the prompt of the next steps."""
        self.world.prompt, self._prompt_sequence = text, sequence
        return
        yield

    def seek(self, branch: int, step: int) -> Job:
        """Pauses at a step."""
        started = time.perf_counter()
        self._play(False)
        made, replayed = yield from self._telling(self.world.seek(branch, step))
        self.send(
            protocol.Sought(
                branch=branch,
                step=step,
                prompt=self.world.prompt,
                replayed=replayed,
                ms=1e3 * (time.perf_counter() - started),
            )
        )
        self._send_frames(self.world.lanes[0], made, protocol.SEEK)
        self._tell_tree()
        self._tell_state()

    def split(self, branch: int, step: int, controls: list[Control | PoseGoal | None]) -> Job:
        """Plays two lanes from a step. ValueError for controls that do not drive the model."""
        for control in filter(None, controls):
            self._check("split", control)
        made, most = len(self.world.walk.branches), self.world.settings.branches
        if made + len(controls) > most:
            raise ValueError(f"split: expected at most {most} branches, got {made} and two more")
        playing = self._playing
        self._play(False)
        made, _ = yield from self._telling(self.world.split(branch, step))
        with self._lock:
            given = self._inputs[0]
            self._inputs = [replace(given, held=control or given.held) for control in controls]
        self._turn = 0
        branches = [lane.branch for lane in self.world.lanes]
        self.send(protocol.SplitAnswer(branches=branches, branch=branches[0]))
        for lane in self.world.lanes:
            self._send_frames(lane, made, protocol.SEEK)
        self._tell_tree()
        self._play(playing)

    def join(self) -> Job:
        """Ends a split."""
        self.world.join()
        self._turn = 0
        self.send(protocol.SplitAnswer(branches=None, branch=self.world.lanes[0].branch))
        return
        yield

    def follow(self, branch: int) -> Job:
        """Plays the recorded controls of a branch from here on."""
        self.world.follow(branch)
        self._play(True)
        self._tell_state()
        return
        yield

    def log(self, version: str) -> Job:
        """Sends the action log."""
        lines = []
        for line in self.world.walk.copy().lines(version):
            lines.append(line)
            if len(lines) % LINES_PER_SLICE == 0:
                yield
        self.send(protocol.LogAnswer(lines=lines))

    def save(self) -> Job:
        """Sends the latest snapshot on the way to the present step, if it is small enough."""
        world = self.world
        kept = world.history.nearest(*world.place())
        if kept and kept.bytes <= world.settings.save_bytes:
            header = FrameHeader(kept.branch, kept.step, count=1, kind=protocol.SAVED)
            self.send(header.message([write_saved(kept, world.walk.digest)]))
        return
        yield

    def _close(self, closed: Callable[[Place], None]) -> Job:
        self._playing = False
        place = replace(self.place, history=None)
        try:
            place = self._with_snapshot(place)
        except Exception:  # out of memory, say: the world is replayed when it is resumed
            log.exception("the snapshot of a closed world could not be taken")
        self.world.close()
        self.scheduler.remove(self)
        self.metrics.dropped.inc(self._sender.dropped)
        self._sender.close(lambda: closed(place))
        return
        yield

    def _with_snapshot(self, place: Place) -> Place:
        """Adds the snapshot of a world that stands at its place. One that has failed is replayed
        from its beginning."""
        lane = self.world.lanes[0] if self.world.lanes else None
        if self.ended == "failed":
            return replace(place, snapshot=None, frames=None)
        if lane is None or lane.seeking:
            return place
        return replace(place, snapshot=lane.stream.snapshot(), frames=lane.frames)

    # The flow.

    def due(self) -> float | None:
        if self._jobs:
            return 0.0
        if not self._playing:
            return None
        with self._lock:
            changed, again = self._changed, self._wants_again
        if changed is None or self.world.driven_by == "prompt":
            return self._due
        settled = changed + SETTLE
        return min(self._due, settled if again else max(settled, self._earliest))

    def is_step(self) -> bool:
        """True if the next slice is a step, neither a job nor a step made again."""
        again = self._wants_again and time.perf_counter() < self._due
        return self._playing and not self._jobs and not again

    def run(self) -> None:
        """Does one slice: a part of a job, a step made again, or a step."""
        with self._lock:
            entry = self._jobs[0] if self._jobs else None
        if entry:
            self._run_job(entry)
        elif self.is_step():
            if turn := self.begin():
                self.finish(turn, self.world.submit(turn.lane, turn.step))
        elif self._wants_again:
            self._step_again()
        self.settle()

    def settle(self) -> None:
        """Publishes where the world stands, at the end of a slice; on the way to a step it stands
        where it did before."""
        world = self.world
        if world.lanes and not world.lanes[0].seeking:
            self.place = Place(world.walk, *world.place(), world.prompt, history=world.history)
        self.bytes = world.bytes()

    def _run_job(self, entry: tuple[Job, bool]) -> None:
        over = True
        try:
            next(entry[0])
            over = False
        except StopIteration:
            pass
        except CacheError:  # the world cannot go on
            raise
        except ValueError as error:
            self._refuse("unknown", str(error))
            lanes = self.world.lanes
            if lanes and lanes[0].seeking:  # it replaced a jump: back to where that began
                with self._lock:
                    self._jobs.insert(1, (self.seek(*self.world.place()), True))
        finally:
            with self._lock:
                if over and self._jobs and self._jobs[0] is entry:
                    self._jobs.popleft()

    def fail(self, error: Exception) -> None:
        """Ends the session, because a step has failed; other sessions are as they were."""
        said = "the world has failed and is closed; open a new one"
        self._refuse("failed", str(error) if isinstance(error, CacheError) else said)
        self.end("failed")

    def end(self, reason: str) -> None:
        """Pauses for good and tells the visitor why; the connection then closes the session. Called
        from any thread."""
        self.ended = reason
        self._playing, self._wants_again = False, False
        with self._lock:
            if not self._closing:
                self._jobs.clear()
        self.send(protocol.Ended(reason=reason))

    def begin(self) -> Turn | None:
        """Begins a step: samples the visitor's input. None at the limit of steps or branches, which
        ends the session."""
        started = time.perf_counter()
        world, lane = self.world, self.world.lanes[self._turn]
        walk, settings = world.walk, world.settings
        if walk.steps >= settings.steps or len(walk.branches) > settings.branches:
            self.end("limit")
            return None
        with self._lock:
            sample = self._samples[self._turn] = self._inputs[self._turn]
            self._inputs[self._turn] = replace(sample, taps=Control())
            self._changed, self._wants_again = None, False
        return Turn(lane, world.begin(lane, world.control(lane, sample.control)), started)

    def finish(self, turn: Turn, submitted: Pass) -> None:
        """Ends a step whose pass was submitted: sends its video frames."""
        world, lane, started = self.world, turn.lane, turn.started
        followed = bool(lane.script)
        branches = len(world.walk.branches)
        made = world.finish(lane, turn.step, submitted)
        took = time.perf_counter() - started
        self._step_seconds += (SMOOTHING if self._step_seconds else 1.0) * (
            took - self._step_seconds
        )
        wait = max(0.0, started - self._due)
        self.metrics.step(took, wait)
        self._send_frames(lane, made, 0, wait)
        self._sent_at = time.perf_counter()
        self._turn = (self._turn + 1) % len(world.lanes)
        if self._turn == 0:
            # Counted from when an early step was due, so that early steps in a row gain time once
            self._earliest = max(started, self._due) + EARLY * self.period
            self._due = max(self._due + self.period, started + EARLY * self.period)
        if len(world.walk.branches) > branches or made.step % world.history.every == 0:
            self._tell_tree()
        if followed and not lane.script:
            self._play(False)
            self._tell_state()

    def _step_again(self) -> None:
        """Makes the last step again under the control that has changed, if frames of it are still
        to be shown when the new ones arrive."""
        world, lane = self.world, self.world.lanes[0]
        with self._lock:
            now, last, self._wants_again = self._inputs[0], self._samples[0], False
        if len(world.lanes) > 1 or lane.before is None or lane.script:
            return
        if world.driven_by == "prompt":  # nothing that has changed drives it
            return
        if now.held == last.held and now.taps == Control():  # only a tap has ended
            return
        first = self._seen(lane.step, len(lane.frames), time.perf_counter() + self._step_seconds)
        if first >= len(lane.frames):
            return
        taps = Control(now.taps.yaw or last.taps.yaw, now.taps.forward or last.taps.forward)
        sample = self._samples[0] = replace(now, taps=taps)
        with self._lock:
            if self._inputs[0] is now:
                self._inputs[0] = replace(now, taps=Control())
                self._changed = None
        started = time.perf_counter()
        made = world.again(lane, sample.control, first)
        self.metrics.redo(time.perf_counter() - started)
        self._send_frames(lane, made, protocol.REDO, first_shown=first)

    def _seen(self, step: int, count: int, at: float) -> int:
        """Estimates how many of the last step's `count` frames the page has shown at time `at`, in
        seconds of `time.perf_counter`. Assumes an even pace since the page's last message. Returns
        `count` if the page has sent none."""
        with self._lock:
            shown, shown_at = self._shown, self._shown_at
        if shown is None or shown.step > step:
            return count
        fps = self.world.generator.fps
        before = shown.frames - count * (step - shown.step)  # negative: frames of steps before
        seen = min(before + fps * (at - shown_at), fps * (at - self._sent_at))
        return min(max(0, round(seen)), count)

    def _play(self, on: bool) -> None:
        if on and not self._playing:
            self._due = time.perf_counter()
            self._turn %= max(1, len(self.world.lanes))  # after a pause the other lane goes on
        if not on:
            for lane in self.world.lanes:
                lane.script = []
        self._playing = on and bool(self.world.lanes) and self.ended is None

    def _telling(self, work: Generator[tuple[int, int], None, Made]) -> Generator:
        """Runs a seek step by step and tells how far it is. The value is what the seek returns,
        and the number of steps replayed."""
        total = 0
        while True:
            try:
                done, total = next(work)
            except StopIteration as stop:
                return stop.value, total
            if total > LONG_REPLAY and done % LONG_REPLAY == 0:
                self.send(protocol.Replaying(done=done, total=total))
            self.touched = time.monotonic()  # a visitor who waits is not idle
            yield

    # Messages.

    def _opened(self, made: Made, flags: int) -> None:
        world = self.world
        seed, prompt = world.walk.seed, world.prompt
        opened = protocol.Opened(branch=made.branch, step=made.step, seed=seed, prompt=prompt)
        self.send(opened)
        self._send_frames(world.lanes[0], made, flags)
        self._tell_tree()

    def _send_frames(
        self, lane: Lane, made: Made, flags: int, wait: float = 0.0, first_shown: int = 0
    ) -> None:
        number = self.world.lanes.index(lane)
        sample = self._samples[number]
        header = FrameHeader(
            branch=lane.branch,
            step=made.step,
            count=len(made.frames),
            lane=number,
            flags=flags,
            input=sample.sequence,
            prompt=self._prompt_sequence,
            time=sample.time,
            wait_ms=1e3 * wait,
            model_ms=1e3 * made.model_seconds,
            pixels_ms=1e3 * made.pixel_seconds,
            first_shown=first_shown,
            format=self._format,
        )
        if pose := self.world.walk.pose_at(lane.branch, made.step):
            poses = [
                [(x, y) if seen else None for x, y, seen in frame] for frame in pose.points.tolist()
            ]
            posed = protocol.Posed(lane=number, branch=lane.branch, step=made.step, poses=poses)
            self.send(posed)
        self._sender.send_frames(header, made.frames)

    def _tell_tree(self) -> None:
        walk, history = self.world.walk, self.world.history
        branches = [
            protocol.BranchFacts(
                id=number,
                parent=branch.parent,
                from_step=branch.start,
                to_step=branch.end,
                prompt=walk.prompt_at(number, branch.end),
            )
            for number, branch in enumerate(walk.branches)
        ]
        snapshots = [
            protocol.SnapshotFacts(branch=branch, step=step) for branch, step in history.places()
        ]
        self.send(
            protocol.Tree(
                branches=branches,
                snapshots=snapshots,
                bytes=history.bytes,
                budget=history.budget,
                replay_ms=1e3 * self._step_seconds,
            )
        )

    def _tell_state(self) -> None:
        following = any(lane.script for lane in self.world.lanes)
        branch, step = self.world.place()
        state = protocol.State(playing=self._playing, following=following, branch=branch, step=step)
        self.send(state)

    def _refuse(self, code: protocol.ErrorCode, message: str) -> None:
        self.metrics.errors.labels(code).inc()
        line = " ".join(message.split())
        self.send(protocol.Error(code=code, message=line, fatal=False))


def control_of(given: protocol.Deflections | protocol.Figure) -> Control | PoseGoal:
    """Returns the control that a visitor gives."""
    if isinstance(given, protocol.Figure):
        return goal_of(given.points, given.motion)
    return clamped(given.yaw, given.forward)
