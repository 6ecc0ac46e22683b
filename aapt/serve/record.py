"""Recordings: a part of a walk, made again as it was shown, as MP4."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ..media.video import open_video
from ..streaming.actions import Walk, make, make_as_seen
from ..streaming.generator import StreamingGenerator
from ..streaming.history import History


class Recording:
    """Writes the video of steps `first` to `last` of a walk to a file, as a flow of the scheduler.

    With `first` 0 the first frame is in it. The generator thread calls `done` at the end, with an
    error if there was one.
    """

    def __init__(
        self,
        generator: StreamingGenerator,
        walk: Walk,
        branch: int,
        first: int,
        last: int,
        history: History | None,
        out: Path,
        done: Callable[[Exception | None], None],
    ):
        self.generator, self.walk, self.branch, self.history = generator, walk, branch, history
        self.first, self.last, self.out, self.done = first, last, out, done
        self.cancelled = threading.Event()
        self._work = self._write()
        self._over = False

    def due(self) -> float | None:
        return None if self._over else 0.0

    def run(self) -> None:
        try:
            next(self._work)
        except StopIteration:
            self._over = True
            self.done(None)

    def fail(self, error: Exception) -> None:
        self._over = True
        self.done(error)

    def _write(self) -> Iterator[None]:
        generator, walk = self.generator, self.walk
        path = walk.path(self.branch, self.last)
        before = max(self.first - 1, 0)
        nearest = self.history.nearest(self.branch, before) if self.history else None
        with (
            generator.open(walk.first_frame, walk.prompt, walk.seed) as stream,
            open_video(str(self.out), generator.height, generator.width, generator.fps) as video,
        ):
            start = nearest.step if nearest else 0
            if nearest:
                stream.restore(nearest.snapshot)
            if self.first == 0:
                video.write(stream.first_frame)
            for number in range(start, self.last):
                yield
                if self.cancelled.is_set():
                    return
                if number < before:
                    make(stream, path[number])
                else:
                    video.write(make_as_seen(stream, path[number])[1])
