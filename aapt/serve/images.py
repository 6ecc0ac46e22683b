"""Images between visitors and worlds: uploads in, encoded video frames out."""

import io
import tempfile

import numpy as np
from PIL import Image

from ..media.image import fit_image, load_image

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]  # decoders that visitors may reach


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
