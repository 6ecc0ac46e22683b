"""Video files as upright RGB pictures at an even rate, whatever their codec, rate or clock."""

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from .sources import Skipped

# Exact on every processor, and with colours at the full resolution.
SCALING = Interpolation.LANCZOS | Interpolation.BITEXACT
SCALING |= Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class Picture:
    """One decoded picture of a file."""

    index: int  # in order of display
    time: float  # seconds after the file's first picture
    frame: av.VideoFrame
    stored_aspect: float  # width of a pixel over its height, before turning
    scaler: VideoReformatter  # of the file: keeps its filters from picture to picture

    @property
    def turns(self) -> int:
        """Quarter turns, anticlockwise, that put the picture upright."""
        return round(self.frame.rotation / 90) % 4

    @property
    def size(self) -> tuple[int, int]:
        """(columns, rows), upright."""
        size = self.frame.width, self.frame.height
        return size[::-1] if self.turns % 2 else size

    @property
    def pixel_aspect(self) -> float:
        """Width of a pixel over its height, upright."""
        return 1 / self.stored_aspect if self.turns % 2 else self.stored_aspect

    def pixels(self, columns: int, rows: int) -> np.ndarray:
        """uint8 (rows, columns, 3), upright, scaled to that size."""
        width, height = (rows, columns) if self.turns % 2 else (columns, rows)
        rgb = self.scaler.reformat(self.frame, width, height, "rgb24", interpolation=SCALING)
        return np.ascontiguousarray(np.rot90(rgb.to_ndarray(), self.turns))


def pictures(file: BinaryIO) -> Iterator[Picture]:
    """All pictures of the first video stream, in order and with growing times.

    Skipped when there is none, and where decoding fails: what came before is good.
    """
    start, last, scaler = 0.0, None, VideoReformatter()
    try:
        with av.open(file, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise Skipped("no video", "the file has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # videos are decoded in parallel, not parts
            aspect = float(stream.sample_aspect_ratio or 1)
            for index, frame in enumerate(container.decode(stream)):
                if frame.is_corrupt:
                    raise Skipped("cannot be decoded", f"{_after(last)}: a damaged picture")
                time = frame.time
                if time is None and stream.average_rate:  # a stream without a clock
                    time = float(index / stream.average_rate)
                if time is None:
                    raise Skipped("cannot be decoded", f"{_after(last)}: a picture without a time")
                if last is None:
                    start = time
                if last is None or time - start > last.time:
                    last = Picture(index, time - start, frame, aspect, scaler)
                    yield last
    except av.FFmpegError as error:
        raise Skipped("cannot be decoded", f"{_after(last)}: {error.strerror}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Not the disk: what the file says sent FFmpeg to before its start, as in an empty one.
        raise Skipped("cannot be decoded", f"{_after(last)}: {error.strerror}") from None
    if last is None:
        raise Skipped("no video", "the video stream has no pictures")


def _after(last: Picture | None) -> str:
    return "at once" if last is None else f"after {last.time:.3f} s"


def at_rate(
    source: Iterator[Picture], fps: int, start: float = 0.0, end: float = float("inf")
) -> Iterator[tuple[float, Picture]]:
    """(time, the picture nearest to it) at start, start + 1 / fps, ... up to `end` or the last
    picture; a picture is used again or left out as the rates demand."""
    number, before = 0, None
    half = 0.5 / fps

    def due() -> float:
        return start + number / fps

    for after in source:
        # A tie goes to the earlier picture; a microsecond is rounding of the file's clock.
        while before and due() <= end and due() - before.time <= after.time - due() + 1e-6:
            yield due(), before
            number += 1
        if due() > end:
            return
        before = after
    while before and due() <= min(end, before.time + half):
        yield due(), before
        number += 1
