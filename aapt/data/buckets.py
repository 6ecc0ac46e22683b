"""Aspect buckets: the few sizes clips are encoded at, and the crop that brings a video to one."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image


class Bucket(NamedTuple):
    """A size of clips in pixels; written 736x416, width first."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str, multiple: int = 1) -> "Bucket":
        """'736x416'; ValueError unless both sides are positive multiples of `multiple`."""
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
        if match is None:
            raise ValueError(f"bucket: expected WIDTHxHEIGHT such as 736x416, got {text!r}")
        bucket = cls(int(match[1]), int(match[2]))
        if bucket.width % multiple or bucket.height % multiple:
            raise ValueError(f"bucket: expected multiples of {multiple}, got {text}")
        return bucket


class Crop(NamedTuple):
    """The part of a source picture (columns, rows) that is kept, and the size it is brought to.

    Pictures, keypoints and lenses go through the same crop, so they stay together.
    """

    source: tuple[int, int]
    left: float  # in pixels of the source, like the next three
    top: float
    width: float
    height: float
    bucket: Bucket

    def picture(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (rows, columns, 3) -> (bucket.height, bucket.width, 3)."""
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        image = Image.fromarray(pixels).resize(self.bucket, Image.Resampling.LANCZOS, box=box)
        return np.asarray(image)

    def points(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) of (x, y) in pixels of the source -> pixels of the bucket."""
        scale = self.bucket.width / self.width, self.bucket.height / self.height
        return (points - (self.left, self.top)) * scale

    def lens(self, lens: np.ndarray) -> np.ndarray:
        """(fx, fy, cx, cy) in shares of the source's width and height -> of the bucket's."""
        fx, fy, cx, cy = lens
        columns, rows = self.source
        return np.array(
            [
                fx * columns / self.width,
                fy * rows / self.height,
                (cx * columns - self.left) / self.width,
                (cy * rows - self.top) / self.height,
            ]
        )


def crop(columns: int, rows: int, bucket: Bucket, pixel_aspect: float = 1.0) -> Crop:
    """The largest centred part of a picture that has the bucket's shape on the screen.

    `pixel_aspect` is the width of a source pixel over its height.
    """
    aspect = bucket.width / bucket.height / pixel_aspect  # in source pixels
    width, height = min(columns, rows * aspect), min(rows, columns / aspect)
    left, top = (columns - width) / 2, (rows - height) / 2
    return Crop((columns, rows), left, top, width, height, bucket)


def choose(buckets: Sequence[Bucket], columns: int, rows: int, pixel_aspect: float = 1.0) -> Bucket:
    """The bucket that loses least of the picture; of several of that shape the largest that does
    not enlarge it, else the smallest."""

    def preference(bucket: Bucket):
        part = crop(columns, rows, bucket, pixel_aspect)
        kept = round(part.width * part.height / (columns * rows), 2)  # 1 % off is the same shape
        enlarged = bucket.height > part.height
        area = bucket.width * bucket.height
        return kept, not enlarged, -area if enlarged else area, bucket

    return max(buckets, key=preference)
