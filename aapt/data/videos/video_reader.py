"""Video files as upright RGB pictures at an even rate, whatever their codec, rate or clock."""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from .sources import Skipped

MAX_GAP = 0.2  # seconds from picture to picture: below 5 fps nothing moves
DAY = 86400.0

# Exact on every processor, and with colours at the full resolution.
SCALING = Interpolation.LANCZOS | Interpolation.BITEXACT
SCALING |= Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class Picture:
    """One decoded picture of a file."""

    index: int  # in order of display
    time: float  # seconds after the file's first picture
    take: int  # breaks before it: pictures of one take follow each other within MAX_GAP
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

    A new take begins where nothing is shown for more than MAX_GAP, and where the clock jumps back,
    as in files that were joined, or ahead by more than a day: time then goes on after MAX_GAP. A
    wrong time among right ones costs that picture alone. Skipped when there is no picture, and
    where decoding fails: what came before is good.
    """
    time, take, last = 0.0, 0, None
    for picture in _without_wrong_times(_decoded(file)):
        if last:
            step = picture.time - last.time
            take += not _goes_on(last, picture)
            time += step if 0 < step <= DAY else MAX_GAP
        last = picture
        yield replace(picture, time=time, take=take)


def _goes_on(last: Picture, picture: Picture) -> bool:
    return 0 < picture.time - last.time <= MAX_GAP + 1e-6  # rounding of the file's clock


def _without_wrong_times(source: Iterator[Picture]) -> Iterator[Picture]:
    """Leaves out a picture that jumps when the next one goes on from before it, and pictures whose
    time stands still or falls back a little."""
    last = jumped = None
    for picture in source:
        if jumped and not _goes_on(last, picture):
            yield jumped
            last, jumped = jumped, None
        if last is None or _goes_on(last, picture):
            last, jumped = picture, None
            yield picture
        elif abs(picture.time - last.time) > MAX_GAP:
            jumped = picture
    if jumped:
        yield jumped


def _decoded(file: BinaryIO) -> Iterator[Picture]:
    """Pictures as the file has them, by its own clock."""
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
                if time is None and stream.average_rate:  # no clock, or a hole in it
                    time = start + last.time + float(1 / stream.average_rate) if last else 0.0
                if time is None:
                    raise Skipped("cannot be decoded", f"{_after(last)}: a picture without a time")
                if last is None:
                    start = time
                last = Picture(index, time - start, 0, frame, aspect, scaler)
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
    picture; a picture is used again or left out as the rates demand. Each take begins anew with its
    first picture."""
    origin, number, take = start, 0, None
    for picture, following in pairwise(chain(source, [None])):
        if picture.take != take:
            origin, number, take = max(start, picture.time), 0, picture.take
        if following and following.take == take:
            # A tie goes to the earlier picture; a microsecond is rounding of the file's clock.
            until = (picture.time + following.time + 1e-6) / 2
        else:
            until = picture.time + 0.5 / fps
        while (time := origin + number / fps) <= min(until, end):
            yield time, picture
            number += 1
        if time > end:
            return
