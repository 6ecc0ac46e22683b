"""Interlaced pictures made progressive, by FFmpeg's filter bwdif."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import av

from .picture import Picture
from .sample import Skipped


def deinterlaced(source: Iterator[Picture]) -> Iterator[Picture]:
    """All pictures of `source` in order. An interlaced picture keeps the field that was recorded
    first; the rows of the other field are replaced.

    An error of `source` is raised after the pictures that came before it.
    """
    bwdif, error = None, None
    try:
        for picture in source:
            if bwdif is None and not picture.frame.interlaced_frame:
                yield picture
                continue
            if bwdif and not bwdif.takes(picture.frame):
                yield from bwdif.push(None)
                bwdif = None
            bwdif = bwdif or Bwdif(picture.frame)
            yield from bwdif.push(picture)
    except (Skipped, av.FFmpegError) as stopped:
        error = stopped
    if bwdif:
        yield from bwdif.push(None)
    if error:
        raise error


class Bwdif:
    """The filter for frames of one size and format. A frame leaves when the next one has come."""

    def __init__(self, frame: av.VideoFrame):
        self.form = _form(frame)
        self.waiting: deque[Picture] = deque()
        self.graph = av.filter.Graph()
        self.graph.threads = 1
        self.time_base = Fraction(1, 24)  # any: pictures keep the times that they came with
        source = self.graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=self.time_base
        )
        # One frame out per frame in; progressive ones pass unchanged.
        bwdif = self.graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
        self.graph.link_nodes(source, bwdif, self.graph.add("buffersink")).configure()
        self.pushed = 0

    def takes(self, frame: av.VideoFrame) -> bool:
        return _form(frame) == self.form

    def push(self, picture: Picture | None) -> Iterator[Picture]:
        """Pictures that are ready after this one; all that are left after None, the end."""
        if picture is not None:
            picture.frame.pts, picture.frame.time_base = self.pushed, self.time_base
            self.pushed += 1
            self.waiting.append(picture)
        self.graph.push(picture and picture.frame)
        while self.waiting:
            try:
                frame = self.graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            yield replace(self.waiting.popleft(), frame=frame)


def _form(frame: av.VideoFrame) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name
