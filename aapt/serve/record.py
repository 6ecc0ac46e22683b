"""Recordings: a part of a walk, made again as it was shown, as MP4."""

import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from ..media.video import open_video
from ..streaming.actions import Walk, make, make_as_seen
from ..streaming.generator import StreamingGenerator
from ..streaming.history import History
from .scheduler import Scheduler


class Recording:
    """Makes the video of steps `first` to `last` of a walk, as a flow of the scheduler: between the
    steps of the worlds being played.

    With `first` 0 the first frame is in it. The generator thread calls `done` at the end, with the
    MP4 or an error, unless the recording is cancelled.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        generator: StreamingGenerator,
        walk: Walk,
        branch: int,
        first: int,
        last: int,
        history: History | None,
        done: Callable[[bytes | Exception], None],
    ):
        self.generator, self.walk, self.branch, self.history = generator, walk, branch, history
        self.first, self.last, self.done = first, last, done
        self.over = False
        self._cancelled = False
        self._work = self._write()
        self._scheduler = scheduler
        scheduler.add(self)

    def cancel(self) -> None:
        """Ends the work before its next step; called from any thread."""
        self._cancelled = True

    def due(self) -> float | None:
        return None if self.over else 0.0

    def is_step(self) -> bool:
        return False

    def run(self) -> None:
        try:
            next(self._work)
        except StopIteration as stop:
            self._end(stop.value)

    def fail(self, error: Exception) -> None:
        self._end(error)

    def _end(self, made: bytes | Exception) -> None:
        self.over = True
        self._scheduler.remove(self)
        if not self._cancelled:
            self.done(made)

    def _write(self) -> Generator[None, None, bytes]:
        with tempfile.TemporaryDirectory(prefix="aapt-") as folder:
            out = Path(folder) / "walk.mp4"
            yield from self._write_file(out)
            return b"" if self._cancelled else out.read_bytes()

    def _write_file(self, out: Path) -> Iterator[None]:
        generator, walk = self.generator, self.walk
        path = walk.path(self.branch, self.last)
        before = max(self.first - 1, 0)
        nearest = self.history.nearest(self.branch, before) if self.history else None
        with (
            generator.open(walk.first_frame, walk.prompt, walk.seed, pose=walk.pose) as stream,
            open_video(str(out), generator.height, generator.width, generator.fps) as video,
        ):
            start = nearest.step if nearest else 0
            if nearest:
                stream.restore(nearest.snapshot)
            if self.first == 0:
                video.write(stream.first_frame)
            for number in range(start, self.last):
                yield
                if self._cancelled:
                    return
                if number < before:
                    make(stream, path[number])
                else:
                    video.write(make_as_seen(stream, path[number])[1])
