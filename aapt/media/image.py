"""First frames from images of any format and almost any size."""

import io
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

MAX_PIXELS = 2**28  # 16384 x 16384, which takes 1.1 GB of memory
MAX_METADATA = 2**26  # bytes of one text or colour profile of a PNG; Pillow's own limit is 1 MiB
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode I, 32 bits in memory, holds 16 bits

_pillow = threading.Lock()  # held while the limits of Pillow, one for the process, are ours


def load_image(path: str | Path) -> Image.Image:
    """Read the image at `path` as RGB: upright (EXIF), in sRGB, transparency on white.

    Channels of 16 bits are scaled to 8. Raises ValueError, in one line, if there is no such file,
    or if it is not a regular file, not an image, broken, larger than MAX_PIXELS or deeper than 16
    bits.
    """
    with _reading(path):
        mode = Path(path).stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would be waited for without end
        raise ValueError(
            f"image: expected a PNG or JPEG file, got {path}: a pipe or a device; save it first"
        )
    with _reading(path), _wide_limits():
        image = Image.open(path)
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BITS):
        kind = "floats" if image.mode == "F" else "integers"
        raise ValueError(
            f"image: expected 8 or 16 bits per channel, got {path}: 32-bit {kind}; save it as PNG"
        )
    with _reading(path):
        image, profile = _flattened(_eight_bits(image)), image.info.get("icc_profile")
        image = _standard_colours(image, profile)
        return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Turn every error of reading the file at `path` into a ValueError of one line."""
    wanted = "image: expected a PNG or JPEG file, got"
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{wanted} {path}: no such file") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{wanted} {path}: not an image") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"image: expected at most {MAX_PIXELS} pixels, got more in {path}; make it smaller"
        ) from None
    except MemoryError:
        raise ValueError(f"image: cannot read {path}: not enough memory") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"image: cannot read {path}: {reason}") from None


@contextmanager
def _wide_limits() -> Iterator[None]:
    """Put our limits in place of Pillow's while one image is read, and silence its warnings."""
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
        # Pillow warns above MAX_IMAGE_PIXELS and refuses above twice as many.
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = MAX_PIXELS // 2, MAX_METADATA
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = before


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits of grey to 8; `convert` would clip them."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _flattened(image: Image.Image) -> Image.Image:
    """Lay an image with transparency on white."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _standard_colours(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert from an embedded ICC profile, such as a phone's Display P3, to sRGB.

    A profile that is broken, or of other channels than the image's, is ignored, as browsers do.
    """
    if not profile:
        return image
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).startswith("sRGB"):
            return image  # as it is: a conversion would round
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image


def fit_image(image: Image.Image, height: int, width: int) -> tuple[np.ndarray, str | None]:
    """Crop an image around its centre and resize it to uint8 (height, width, 3).

    The second value says what was done; None if the image had this size.
    """
    if image.size == (width, height):
        return np.array(image), None
    columns, rows = image.size
    scale = min(columns / width, rows / height)
    cropped = round(width * scale), round(height * scale)
    note = f"{columns} x {rows} image "
    if cropped != image.size:
        note += f"cropped to {cropped[0]} x {cropped[1]} and "
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.array(fitted), note + f"resized to {width} x {height}"
