"""Pictures in, video out: a first frame from any picture, and frames written as they are made.

Every writer takes uint8 (frames, height, width, 3) at any time and leaves only whole frames behind,
whatever stops it: `frames` is how many a reader will find.
"""

import io
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import GifImagePlugin, Image

Kind = Literal["mp4", "gif", "png", "raw"]


def output_kind(out: str) -> Kind:
    """What to write for the path the user gave; ValueError where nothing could be written.

    `-` is raw rgb24 on standard output; a path that ends in a slash, is a folder or has no suffix
    is a folder of PNG files; the rest goes by its suffix, .mp4 or .gif.
    """
    path = Path(out)
    kind: Kind
    if out == "-":
        if sys.stdout.isatty():
            raise ValueError("out: expected a pipe or a file behind -, got a terminal")
        return "raw"
    if out.endswith("/") or path.is_dir() or (not path.suffix and not path.exists()):
        kind = "png"
        if path.is_dir() and next(path.glob("frame_*.png"), None):
            raise ValueError(f"out: expected a folder without frames, got {out}: has frame_*.png")
    elif path.suffix.lower() in (".mp4", ".gif"):
        kind = "mp4" if path.suffix.lower() == ".mp4" else "gif"
    else:
        raise ValueError(f"out: expected a .mp4 or .gif file, a folder ending in / or -, got {out}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"out: expected a path in a folder that exists, got {out}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"out: expected a path that can be written, got {out}")
    return kind


def default_scale(kind: Kind, height: int) -> int:
    """Enlargement that makes small frames watchable: to 320 rows (mp4) or 160 (gif, far less
    compressed); PNG and raw frames are for programs and stay as they are."""
    rows = {"mp4": 320, "gif": 160, "png": 1, "raw": 1}[kind]
    return max(1, -(-rows // height))


class WholeFile(io.FileIO):
    """An unbuffered file that writes all of what it is given or raises, and remembers that it did.

    After a failure it takes everything and keeps nothing: FFmpeg goes on writing while it closes,
    and must not damage what is there.
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
    """Common to all: enlarging, counting, and closing on the way out of a `with`.

    `write` and `close` raise OSError when the output cannot take more; what is there then is whole.
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
    """H.264 in fragments of one second, so that what is on the disk plays at any moment; closing
    turns it into a plain mp4 with an index (FFmpeg's hybrid_fragmented)."""

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
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
            context.width,
            context.height,
            "yuv420p",
            dst_colorspace=Colorspace.ITU709,
            interpolation=Interpolation.LANCZOS,
        )
        picture.pts, picture.time_base = self.frames, context.time_base
        self.container.mux(self.stream.encode(picture))

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


def _end_of_fragments(file: io.FileIO) -> int:
    """Bytes up to the end of the last mp4 fragment (a moof and its mdat) that is all there."""
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
    """A GIF of whole frames, each with its own 256 colours, that loops for ever."""

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
        self.file.truncate(self.end)  # drops half a frame
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
    """frame_00000.png, frame_00001.png, ... in a folder, which is made if need be."""

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
    """rgb24 on standard output, frame after frame, nothing between."""

    def __init__(self, out: str, height: int, width: int, fps: int, scale: int):
        super().__init__("standard output", height, width, fps, scale)
        self.file = WholeFile(1, "w", closefd=False)

    def _write(self, frame: np.ndarray) -> None:
        self.file.write(self._enlarged(frame).tobytes())


WRITERS = {"mp4": Mp4Writer, "gif": GifWriter, "png": PngWriter, "raw": RawWriter}


def open_video(
    out: str, height: int, width: int, fps: int, scale: int | None = None
) -> VideoWriter:
    """A writer of what `output_kind` says for frames of `height` x `width`, enlarged `scale` times.

    Raises ValueError for a path that cannot be, OSError for one that cannot be opened.
    """
    kind = output_kind(out)
    return WRITERS[kind](out, height, width, fps, scale or default_scale(kind, height))
