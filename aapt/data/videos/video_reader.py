"""Video files as upright RGB at an even rate, whatever their codec, rate or clock.

A picture is a video frame as the file stores it. `pictures` gives the pictures of a file, and
`at_rate` chooses among them the video frames at an even rate.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, pairwise
from typing import BinaryIO

import av
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from .colours import check_colours
from .deinterlace import deinterlaced
from .picture import Orientation, Picture
from .sample import Skipped, path_errors

MAX_GAP = 0.2  # seconds from picture to picture; a slide show, below 5 fps, has no motion
DAY = 86400.0

# Streams beside the video: cover images, and covers in containers that have no flag for them.
STILL = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
IMAGE_CODECS = ("bmp", "gif", "mjpeg", "png", "webp")


def pictures(file: BinaryIO) -> Iterator[Picture]:
    """All pictures of the main video stream, progressive, in order and with growing times.

    A new take begins after a pause of more than MAX_GAP. A new take also begins if the clock jumps
    back, as in joined files, or ahead by more than a day; time then continues after MAX_GAP. A
    wrong time among right ones costs its picture alone. Skipped if the file has no picture or
    decoding fails; the pictures before are good.
    """
    time, take, last = 0.0, 0, None
    for picture in _without_wrong_times(_decoded(file)):
        if last:
            step = picture.time - last.time
            take += not _follows(last, picture)
            time += step if 0 < step <= DAY else MAX_GAP
        last = picture
        yield replace(picture, time=time, take=take)


def _follows(last: Picture, picture: Picture) -> bool:
    return 0 < picture.time - last.time <= MAX_GAP + 1e-6  # rounding of the file's clock


def _without_wrong_times(source: Iterator[Picture]) -> Iterator[Picture]:
    """Leave out pictures with wrong times: a single jump, a time that stands still, a small step
    back."""
    last = jumped = None
    for picture in source:
        if jumped and not _follows(last, picture):
            yield jumped
            last, jumped = jumped, None
        if last is None or _follows(last, picture):
            last, jumped = picture, None
            yield picture
        elif abs(picture.time - last.time) > MAX_GAP:
            jumped = picture
    if jumped:
        yield jumped


def _decoded(file: BinaryIO) -> Iterator[Picture]:
    """Progressive pictures at the times of the file's own clock."""
    last = None
    try:
        if not file.read(1):
            raise Skipped("cannot be decoded", "at once: the file is empty")
        file.seek(0)
        with av.open(file, metadata_errors="ignore") as container:
            for last in deinterlaced(_frames(main_stream(container))):
                yield last
    except av.FFmpegError as error:
        raise Skipped("cannot be decoded", f"{_after(last)}: {error.strerror}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Not the disk: FFmpeg was sent to a place before the file's start, by what the file says.
        raise Skipped("cannot be decoded", f"{_after(last)}: {error.strerror}") from None
    if last is None:
        raise Skipped("no video", "the video stream has no pictures")


def main_stream(container: av.container.InputContainer) -> VideoStream:
    """The stream that a player shows: the default one, then the largest, never a cover image.

    Skipped if there is none.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & STILL]
    streams = [stream for stream in streams if stream.codec_context]  # with a decoder
    if not streams:
        raise Skipped("no video", "the file has no video stream")

    def preference(stream: VideoStream) -> tuple[bool, bool, int]:
        context = stream.codec_context
        default = bool(stream.disposition & Disposition.default)
        return context.name not in IMAGE_CODECS, default, context.width * context.height

    return max(streams, key=preference)


def _frames(stream: VideoStream) -> Iterator[Picture]:
    """Pictures as stored."""
    start, last, scaler = 0.0, None, VideoReformatter()
    stream.codec_context.thread_count = 1  # videos are decoded in parallel, not parts
    aspect = float(stream.sample_aspect_ratio or 1)
    for index, frame in enumerate(stream.container.decode(stream)):
        if frame.is_corrupt:
            raise Skipped("cannot be decoded", f"{_after(last)}: a damaged picture")
        check_colours(frame)
        time = frame.time
        if time is None and stream.average_rate:  # no clock, or a hole in it
            time = start + last.time + float(1 / stream.average_rate) if last else 0.0
        if time is None:
            raise Skipped("cannot be decoded", f"{_after(last)}: a picture without a time")
        if last is None:
            start = time
        last = Picture(index, time - start, 0, frame, aspect, Orientation.of(frame), scaler)
        yield last


@contextmanager
def file_errors() -> Iterator[None]:
    """Turn every error of reading a file into Skipped, but for an OSError of the disk: all other
    files would fail with it."""
    try:
        with path_errors():
            try:
                yield
            except av.FFmpegError as error:  # may be an OSError too
                raise Skipped("cannot be decoded", f"{type(error).__name__}: {error}") from None
    except (Skipped, OSError):
        raise
    except Exception as error:  # whatever a strange file makes of a library
        raise Skipped("cannot be decoded", f"{type(error).__name__}: {error}") from None


def _after(last: Picture | None) -> str:
    return "at once" if last is None else f"after {last.time:.3f} s"


def at_rate(
    source: Iterator[Picture], fps: int, start: float = 0.0, end: float = float("inf")
) -> Iterator[tuple[float, Picture]]:
    """Pairs of a time and the picture nearest to it, at `start`, `start` + 1 / fps, ...

    Times end with `end` or with the last picture. A picture is repeated or left out if the rates
    demand it. Each take begins anew with its first picture.
    """
    origin, number, take = start, 0, None
    for picture, following in pairwise(chain(source, [None])):
        if picture.take != take:
            origin, number, take = max(start, picture.time), 0, picture.take
        if following and following.take == take:
            # A tie goes to the earlier picture; the clock of a file is rounded to microseconds.
            until = (picture.time + following.time + 1e-6) / 2
        else:
            until = picture.time + 0.5 / fps
        while (time := origin + number / fps) <= min(until, end):
            yield time, picture
            number += 1
        if time > end:
            return
