"""Video files for tests of training data."""

import io
import struct
from fractions import Fraction

import av
import numpy as np

# A picture is told by its grey level, which survives cropping, resizing and turning.
LEVEL_STEP = 2


def grey(count, height=32, width=48):
    """Picture n has level LEVEL_STEP * n."""
    levels = LEVEL_STEP * np.arange(count, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def numbers(frames):
    """The numbers of the pictures of `grey` that frames (..., H, W, 3) show."""
    means = np.asarray(frames, np.float64).mean(axis=(-3, -2, -1))
    return np.rint(means / LEVEL_STEP).astype(int).tolist()


def video(
    frames,
    *,
    rate=24,
    times=None,
    container="matroska",
    codec="ffv1",
    rotation=None,
    aspect=None,
    muxer=None,
):
    """A file in memory, lossless by default; `times` in ms replaces an even `rate`."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=muxer or {}) as output:
        stream = output.add_stream(codec, rate=rate)
        context = stream.codec_context
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        context.thread_count = 1
        if aspect:
            context.sample_aspect_ratio = aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if times:
            context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def retimed(data, times, container="matroska"):
    """The file's pictures with other times, in ms and in any order, as in a file with a broken
    clock or in joined files."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(file, "w", container, options={"avoid_negative_ts": "disabled"}) as output,
    ):
        stream = output.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for number, (packet, time) in enumerate(zip(packets, times, strict=True)):
            packet.pts = round(time * Fraction(1, 1000) / packet.time_base)
            packet.dts = number - len(packets) - 2**14  # a muxer wants these to grow
            packet.stream = stream
            output.mux(packet)
    return file.getvalue()


# Display matrices (a, b, c, d) of an MP4: a stored pixel (x, y) is shown at (a x + c y, b x + d y),
# y down. Each with the corners of CORNERS as they are then seen: top left, top right, bottom left,
# bottom right.
ORIENTATIONS = {
    "upright": ((1, 0, 0, 1), "RGBW"),
    "turned by 90 degrees": ((0, 1, -1, 0), "BRWG"),
    "turned by 180 degrees": ((-1, 0, 0, -1), "WBGR"),
    "turned by 270 degrees": ((0, -1, 1, 0), "GWRB"),
    "left and right exchanged": ((-1, 0, 0, 1), "GRWB"),
    "top and bottom exchanged": ((1, 0, 0, -1), "BWRG"),
    "transposed": ((0, 1, 1, 0), "RBGW"),
    "transposed the other way": ((0, -1, -1, 0), "WGBR"),
}
COLOURS = {"R": (220, 30, 30), "G": (30, 220, 30), "B": (30, 30, 220), "W": (220, 220, 220)}


def corners(count, height=64, width=128):
    """Red and green above blue and white, each a quarter."""
    frames = np.empty((count, height, width, 3), np.uint8)
    top, left = slice(height // 2), slice(width // 2)
    frames[:] = COLOURS["W"]
    frames[:, top] = COLOURS["G"]
    frames[:, :, left] = COLOURS["B"]
    frames[:, top, left] = COLOURS["R"]
    return frames


def seen_corners(pixels):
    """The colours of the four quarters, as in ORIENTATIONS."""
    rows, columns = pixels.shape[:2]
    points = [(y, x) for y in (rows // 4, 3 * rows // 4) for x in (columns // 4, 3 * columns // 4)]
    names, values = list(COLOURS), np.array(list(COLOURS.values()))
    nearest = [np.abs(values - pixels[point]).sum(axis=1).argmin() for point in points]
    return "".join(names[number] for number in nearest)


def with_display_matrix(mp4, matrix):
    """The MP4 with the linear part of its track's display matrix replaced."""
    a, b, c, d = (value << 16 for value in matrix)
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    track = mp4.index(b"tkhd")
    place = mp4.index(identity, track)
    return mp4[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + mp4[place + 36 :]


def streams(container, *given):
    """A file with several video streams: (codec, frames, disposition) each."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        made = []
        for codec, frames, disposition in given:
            stream = output.add_stream(codec, rate=24)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = disposition
            made.append((stream, frames))
        for stream, frames in made:
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                output.mux(stream.encode(frame))
        for stream, _ in made:
            output.mux(stream.encode(None))
    return file.getvalue()


def plain(planes, count=5, size=(96, 64), form="yuv420p", codec="libx264", options=None, **tags):
    """A file of one colour, the values of its planes, with `tags` on every frame."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream(codec, rate=24, options=options or {"crf": "1"})
        stream.width, stream.height = size
        stream.pix_fmt = form
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for number in range(count):
            frame = av.VideoFrame(*size, form)
            frame.pts = number
            kind = np.uint16 if "10le" in form else np.uint8
            for plane, value in zip(frame.planes, planes):
                plane.update(np.full(plane.buffer_size // kind().nbytes, value, kind).tobytes())
            for name, value in tags.items():
                setattr(frame, name, value)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def sound():
    """A file with sound and no video."""
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = np.zeros((1, 4096), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()
