"""First frames from images of any size and format."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def load_image(path: str | Path) -> Image.Image:
    """The picture at `path`, upright (EXIF), transparency laid on white, as RGB.

    Raises ValueError, in one line, if there is none or it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a large picture is fine here; a bomb still raises
            image = ImageOps.exif_transpose(Image.open(path))
            if image.mode.startswith("I;16"):  # convert() would clip 16 bits, not scale them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"image: expected a PNG or JPEG file, got {path}: no such file") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"image: expected a PNG or JPEG file, got {path}: not a picture") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"image: cannot read {path}: {reason}") from None


def fit_image(image: Image.Image, height: int, width: int) -> tuple[np.ndarray, str | None]:
    """`image` cropped around its centre and resized to uint8 (height, width, 3).

    The second value says what was done, or is None where nothing was.
    """
    if image.size == (width, height):
        return np.array(image), None
    columns, rows = image.size
    scale = min(columns / width, rows / height)
    cropped = round(width * scale), round(height * scale)
    note = f"{columns} x {rows} picture "
    if cropped != image.size:
        note += f"cropped to {cropped[0]} x {cropped[1]} and "
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.array(fitted), note + f"resized to {width} x {height}"
