"""Video out: every frame is written as soon as it is made.

A writer takes uint8 (frames, height, width, 3) at any time. Whatever stops it, the output holds
whole frames only, and `frames` is their number.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import GifImagePlugin, Image

Kind = Literal["mp4", "gif", "png", "raw"]


def output_kind(out: str) -> Kind:
    """Return what is written to the path the user gave.

    `-` is raw rgb24 on standard output. A path that ends in a slash, is a folder, or is new and has
    no suffix, is a folder of PNG files. The suffixes .mp4 and .gif stand for themselves. ValueError
    if nothing can be written there.
    """
    if out == "-":
        if sys.stdout is None:
            raise ValueError("out: expected an open standard output for -, got a closed one")
        if sys.stdout.isatty():
            raise ValueError("out: expected a pipe or a file for -, got a terminal; add | or >")
        return "raw"
    try:
        return _file_kind(out)
    except OSError as error:  # a name too long, a folder that may not be entered
        raise ValueError(f"out: cannot write {out}: {error.strerror or error}") from None


def _file_kind(out: str) -> Kind:
    if not out:
        raise ValueError("out: expected a path, got an empty one; ./ is this folder")
    path = Path(out)
    kind: Kind
    if out.endswith("/") or path.is_dir() or (not path.suffix and not path.exists()):
        kind = "png"
        if path.is_dir() and next(path.glob("frame_*.png"), None):
            raise ValueError(f"out: expected a folder without frames, got {out}: has frame_*.png")
    elif path.suffix.lower() in (".mp4", ".gif"):
        kind = "mp4" if path.suffix.lower() == ".mp4" else "gif"
        if path.exists() and not path.is_file():
            raise ValueError(
                f"out: expected a file, got {out}: a pipe or a device; - writes a pipe"
            )
    else:
        raise ValueError(f"out: expected a .mp4 or .gif file, a folder ending in / or -, got {out}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"out: expected a path in a folder that exists, got {out}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"out: expected a path that can be written, got {out}")
    return kind


def default_scale(kind: Kind, height: int) -> int:
    """Return how many times small frames are enlarged to be watched.

    The least number that gives 320 rows in an mp4, or 160 in a gif, whose files are far larger. PNG
    and raw frames are for programs: 1.
    """
    rows = {"mp4": 320, "gif": 160, "png": 1, "raw": 1}[kind]
    return max(1, -(-rows // height))


class WholeFile(io.FileIO):
    """An unbuffered file that writes all the bytes it is given, or raises and keeps the error.

    After an error it accepts bytes and drops them: FFmpeg writes more while it closes, which must
    not damage what is in the file.
    """

    error: OSError | None = None

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest and self.error is None:
            try:
                rest = rest[self._write_some(rest) :]
            except OSError as error:
                self.error = error
                raise
        return len(data)

    def _write_some(self, data: memoryview) -> int | None:
        return super().write(data)


class VideoWriter:
    """The part that all writers share: enlarge, count, and close at the end of a `with`.

    `write` and `close` raise OSError if the output is full; it then holds whole frames only.

    Attributes:
        out: The path, or "standard output".
        height, width: Of the video, enlarged, in pixels.
        frames: Video frames written so far.
    """

    def __init__(self, out: str, height: int, width: int, fps: int, scale: int):
        self.out, self.fps, self.scale = out, fps, scale
        self.height, self.width = height * scale, width * scale
        self.frames = 0

    def write(self, frames: np.ndarray) -> None:
        for frame in frames:
            self._write(frame)
            self.frames += 1

    def _write(self, frame: np.ndarray) -> None:
        raise NotImplementedError

    def _enlarged(self, frame: np.ndarray) -> Image.Image:
        image = Image.fromarray(frame)
        if self.scale == 1:
            return image
        return image.resize((self.width, self.height), Image.Resampling.LANCZOS)

    def close(self) -> None:
        """Finish the output. Safe to call twice."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Mp4Writer(VideoWriter):
    """H.264 in fragments of one second, so that the file on the disk plays at any moment.

    `close` turns it into a plain mp4 (FFmpeg's hybrid_fragmented) with its index in front.
    """

    def __init__(self, out: str, height: int, width: int, fps: int, scale: int):
        super().__init__(out, height, width, fps, scale)
        self.file = WholeFile(out, "w+")
        flags = "hybrid_fragmented+frag_keyframe+empty_moov"
        self.container = av.open(self.file, "w", format="mp4", options={"movflags": flags})
        options = {"preset": "veryfast", "crf": "18", "bf": "0", "g": str(fps)}
        self.stream = self.container.add_stream("libx264", rate=fps, options=options)
        context = self.stream.codec_context
        # yuv420p has one colour sample per 2 x 2 pixels: sides must be even.
        context.width, context.height = self.width + self.width % 2, self.height + self.height % 2
        context.pix_fmt = "yuv420p"
        context.thread_count = 1  # small frames: leave the cores to the model
        context.time_base = Fraction(1, fps)
        context.colorspace = Colorspace.ITU709
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        context.color_range = ColorRange.MPEG

    def _write(self, frame: np.ndarray) -> None:
        context = self.stream.codec_context
        converted = av.VideoFrame.from_ndarray(
            np.ascontiguousarray(frame), format="rgb24"
        ).reformat(
            context.width,
            context.height,
            "yuv420p",
            dst_colorspace=Colorspace.ITU709,
            interpolation=Interpolation.LANCZOS,
        )
        converted.pts, converted.time_base = self.frames, context.time_base
        self.container.mux(self.stream.encode(converted))

    def close(self) -> None:
        if self.file.closed:
            return
        failed_before = self.file.error is not None
        try:
            if not failed_before:
                self.container.mux(self.stream.encode(None))
            self.container.close()
        except (OSError, av.FFmpegError):
            if self.file.error is None:
                raise
        finally:
            if self.file.error is not None:
                self.file.truncate(_end_of_fragments(self.file))
            self.file.close()
        if self.file.error is not None:
            self.frames = _count_frames(self.out)
            if not self.frames:
                os.unlink(self.out)
            if not failed_before:
                raise self.file.error
        else:
            _index_first(os.path.realpath(self.out))


def _index_first(path: str) -> None:
    """Move the index of a finished mp4 before its frames: a browser then plays while it loads.

    FFmpeg writes the file once more, beside the first; if the disk has no room, the first stays.
    """
    with (
        contextlib.suppress(OSError, av.FFmpegError),
        tempfile.TemporaryDirectory(dir=os.path.dirname(path), prefix=".aapt-") as beside,
    ):
        copy = os.path.join(beside, "indexed.mp4")
        with (
            av.open(path) as source,
            av.open(copy, "w", format="mp4", options={"movflags": "faststart"}) as target,
        ):
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
        shutil.copymode(path, copy)
        os.replace(copy, path)


def _end_of_fragments(file: io.FileIO) -> int:
    """Return the bytes up to the end of the last whole fragment of an mp4 (a moof and its mdat)."""
    size = file.seek(0, os.SEEK_END)
    position = end = 0
    while position + 8 <= size:
        file.seek(position)
        header = file.read(8)
        position += int.from_bytes(header[:4], "big")
        if header[4:] == b"mdat" and position <= size:
            end = position
    return end


def _count_frames(path: str) -> int:
    if not os.path.getsize(path):
        return 0
    with av.open(path) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


class GifWriter(VideoWriter):
    """A GIF that loops without end; each frame is whole and has its own 256 colours."""

    def __init__(self, out: str, height: int, width: int, fps: int, scale: int):
        super().__init__(out, height, width, fps, scale)
        self.file = WholeFile(out, "w")
        self.end = 0  # of the last whole frame

    def _write(self, frame: np.ndarray) -> None:
        colours = Image.fromarray(frame).quantize(256)  # before enlarging: a tenth of the time
        image = self._enlarged(frame).quantize(palette=colours, dither=Image.Dither.NONE)
        # Delays count in 1/100 s: 24 fps is 4, 4, 5 in turn, never off by more than half of one.
        start, end = (round(100 * n / self.fps) for n in (self.frames, self.frames + 1))
        blocks = GifImagePlugin.getdata(
            image, duration=10 * (end - start), include_color_table=True
        )
        if not self.frames:
            blocks = GifImagePlugin.getheader(image, info={"loop": 0})[0] + blocks
        self.file.write(b"".join(blocks))
        self.end = self.file.tell()

    def close(self) -> None:
        if self.file.closed:
            return
        self.file.truncate(self.end)  # drop half a frame
        self.file.seek(self.end)
        error, self.file.error = self.file.error, None
        try:
            self.file.write(b";")
        except OSError:
            if error is None:
                raise
        finally:
            self.file.close()
            if not self.frames:
                os.unlink(self.out)


class PngWriter(VideoWriter):
    """Files frame_00000.png, frame_00001.png, ... in a folder, which is made if it is missing."""

    def __init__(self, out: str, height: int, width: int, fps: int, scale: int):
        super().__init__(out, height, width, fps, scale)
        self.folder = Path(out)
        self.folder.mkdir(exist_ok=True)

    def _write(self, frame: np.ndarray) -> None:
        path = self.folder / f"frame_{self.frames:05d}.png"
        try:
            self._enlarged(frame).save(path)
        except OSError:
            path.unlink(missing_ok=True)
            raise


class RawWriter(VideoWriter):
    """Pixels as rgb24 on standard output: frame after frame, nothing between."""

    def __init__(self, out: str, height: int, width: int, fps: int, scale: int):
        super().__init__("standard output", height, width, fps, scale)
        self.file = WholeFile(1, "w", closefd=False)

    def _write(self, frame: np.ndarray) -> None:
        self.file.write(self._enlarged(frame).tobytes())


WRITERS = {"mp4": Mp4Writer, "gif": GifWriter, "png": PngWriter, "raw": RawWriter}


def open_video(
    out: str, height: int, width: int, fps: int, scale: int | None = None
) -> VideoWriter:
    """Open the writer of `output_kind(out)` for frames of `height` x `width` pixels.

    scale: times that frames are enlarged; None for `default_scale`. Raises ValueError for a path
    that `output_kind` refuses, OSError for one that cannot be opened.
    """
    kind = output_kind(out)
    return WRITERS[kind](out, height, width, fps, scale or default_scale(kind, height))
