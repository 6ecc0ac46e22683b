"""Images between visitors and worlds: uploads in, encoded video frames out."""

import io
import tempfile
from fractions import Fraction

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from ..media.image import fit_image, load_image

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]  # decoders that visitors may reach


class FrameEncoder:
    """Encodes the frames of one visitor as "jpeg", "webp" or "h264"."""

    def __init__(self, image_format: str, quality: int, height: int, width: int, fps: int):
        self.format, self.quality = image_format, quality
        self._video = H264Encoder(height, width, fps) if image_format == "h264" else None

    def encode(self, frames: np.ndarray) -> list[bytes]:
        """Encodes video frames, uint8 (F, H, W, 3), one image or access unit each."""
        if self._video:
            return self._video.encode(frames)
        return encode_frames(frames, self.format, self.quality)


class H264Encoder:
    """Encodes messages of frames as H.264 (Annex B), each an IDR picture and pictures that refer to
    the one before, so that a client may miss any message. Odd sides lose their last row or
    column."""

    def __init__(self, height: int, width: int, fps: int):
        context = av.CodecContext.create("libx264", "w")
        context.width, context.height, context.pix_fmt = width & ~1, height & ~1, "yuv420p"
        context.time_base = Fraction(1, fps)
        context.thread_count = 1
        context.options = {
            **{"preset": "ultrafast", "tune": "zerolatency", "crf": "20", "bf": "0"},
            **{"forced-idr": "1", "g": "1000", "profile": "main"},
        }
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._context, self._count = context, 0

    def encode(self, frames: np.ndarray) -> list[bytes]:
        """Encodes video frames, uint8 (F, H, W, 3), one access unit each."""
        units = []
        for index, frame in enumerate(frames):
            height, width = self._context.height, self._context.width
            cropped = np.ascontiguousarray(frame[:height, :width])
            picture = av.VideoFrame.from_ndarray(cropped, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709
            )
            picture.pts, picture.time_base = self._count, self._context.time_base
            picture.pict_type = PictureType.NONE if index else PictureType.I
            self._count += 1
            units += [bytes(packet) for packet in self._context.encode(picture)]
        return units


def encode_frames(frames: np.ndarray, image_format: str, quality: int) -> list[bytes]:
    """Encodes video frames, uint8 (F, H, W, 3), as "jpeg" or "webp"."""
    images = []
    for frame in frames:
        file = io.BytesIO()
        # 4:4:4: small frames have few pixels of colour to give away.
        options = {"subsampling": 0} if image_format == "jpeg" else {"method": 0}
        Image.fromarray(frame).save(file, image_format, quality=quality, **options)
        images.append(file.getvalue())
    return images


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes one image, uint8 (H, W, 3), without loss."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def decode_image(image: bytes) -> np.ndarray:
    """Decodes an image, uint8 (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def read_upload(data: bytes, pixels: int, height: int, width: int) -> np.ndarray:
    """Decodes an upload of at most `pixels` pixels into a first frame, uint8 (height, width, 3):
    upright, cropped around its centre. ValueError, in one line, for any other."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            columns, rows = image.size  # of the header; nothing is decompressed yet
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("image: expected a PNG, JPEG, WebP, GIF or BMP image") from None
    if columns * rows > pixels:
        raise ValueError(f"image: expected at most {pixels} pixels, got {columns} x {rows}")
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            return fit_image(load_image(file.name), height, width)[0]
    except ValueError:
        raise ValueError("image: expected a whole image, got one that cannot be decoded") from None
