"""Video files that tests of training data read."""

import io
from fractions import Fraction

import av
import numpy as np

# One code per picture: its grey level, which survives cropping, resizing and turning.
LEVEL_STEP = 2


def grey(count, height=32, width=48):
    """Picture n has level LEVEL_STEP * n."""
    levels = LEVEL_STEP * np.arange(count, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def numbers(frames):
    """Which pictures of `grey` frames (..., H, W, 3) show."""
    means = np.asarray(frames, np.float64).mean(axis=(-3, -2, -1))
    return np.rint(means / LEVEL_STEP).astype(int).tolist()


def video(
    frames, *, rate=24, times=None, container="matroska", codec="ffv1", rotation=None, aspect=None
):
    """A file in memory, lossless by default; `times` in ms replaces an even `rate`."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
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
    """The file's pictures with other times, in ms and in any order: what only a broken clock, or
    files that were joined, have."""
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


def sound():
    """A file with a sound and no video."""
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = np.zeros((1, 4096), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()
