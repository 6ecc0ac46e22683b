"""Aspect buckets: the sizes that clips are encoded at, and the crop of a video to a bucket."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Bucket(NamedTuple):
    """Size of clips in pixels, written 736x416 with the width first."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str, multiple: int = 1) -> "Bucket":
        """Read '736x416'. ValueError unless both sides are positive multiples of `multiple`."""
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
        if match is None:
            raise ValueError(f"bucket: expected WIDTHxHEIGHT such as 736x416, got {text!r}")
        bucket = cls(int(match[1]), int(match[2]))
        if bucket.width % multiple or bucket.height % multiple:
            raise ValueError(f"bucket: expected multiples of {multiple}, got {text}")
        return bucket

    @classmethod
    def parse_family(cls, text: str, multiple: int = 1) -> tuple["Bucket", ...]:
        """Read '736x416+1280x720', the sizes that one video is encoded at; errors of `parse`."""
        return tuple(cls.parse(part, multiple) for part in text.split("+"))


class Crop(NamedTuple):
    """A scaling of the upright source, and the place of the bucket in the scaled image.

    Pixels, keypoints and lens of a clip go through one crop, so that they stay together.

    Attributes:
        source: (columns, rows) before scaling.
        scaled: (columns, rows) after scaling.
        left, top: Pixels of the scaled image before the bucket.
        bucket: The part that is used.
    """

    source: tuple[int, int]
    scaled: tuple[int, int]
    left: int
    top: int
    bucket: Bucket

    def window(self, pixels: np.ndarray) -> np.ndarray:
        """Cut the bucket out of a scaled image (rows, columns, 3)."""
        rows = slice(self.top, self.top + self.bucket.height)
        return pixels[rows, self.left : self.left + self.bucket.width]

    def points(self, points: np.ndarray) -> np.ndarray:
        """Convert points (..., 2) of (x, y) from pixels of the source to pixels of the bucket."""
        return points * np.divide(self.scaled, self.source) - (self.left, self.top)

    def lens(self, lens: np.ndarray) -> np.ndarray:
        """Convert (fx, fy, cx, cy) from fractions of the source's sides to the bucket's."""
        scale = np.divide(self.scaled, self.bucket)
        focal, centre = lens[:2] * scale, lens[2:] * scale
        return np.concatenate([focal, centre - np.divide((self.left, self.top), self.bucket)])


def crop(columns: int, rows: int, bucket: Bucket, pixel_aspect: float = 1.0) -> Crop:
    """The largest centred part of an image that has the bucket's shape on the screen.

    pixel_aspect: width of a source pixel over its height.
    """
    scale = max(bucket.width / (columns * pixel_aspect), bucket.height / rows)
    width = max(bucket.width, round(columns * pixel_aspect * scale))
    height = max(bucket.height, round(rows * scale))
    left, top = (width - bucket.width) // 2, (height - bucket.height) // 2
    return Crop((columns, rows), (width, height), left, top, bucket)


def choose(
    families: Sequence[Sequence[Bucket]], columns: int, rows: int, pixel_aspect: float = 1.0
) -> list[Bucket]:
    """The buckets that an image goes into, all of one family.

    The family is that of the bucket that crops the least of the image. Among buckets of one shape,
    the largest that does not enlarge the image counts, or the smallest if all enlarge it. Of the
    family, all buckets are returned that do not enlarge the image, or the smallest if all do.
    """

    def enlarges(bucket: Bucket) -> bool:
        return crop(columns, rows, bucket, pixel_aspect).scaled[1] > rows

    def area(bucket: Bucket) -> int:
        return bucket.width * bucket.height

    def preference(bucket: Bucket):
        width, height = crop(columns, rows, bucket, pixel_aspect).scaled
        kept = round(area(bucket) / (width * height), 2)  # 1 % off is the same shape
        enlarged = enlarges(bucket)
        return kept, not enlarged, -area(bucket) if enlarged else area(bucket), bucket

    best = max((bucket for family in families for bucket in family), key=preference)
    family = next(family for family in families if best in family)
    fitting = [bucket for bucket in family if not enlarges(bucket)]
    return sorted(fitting) or [min(family, key=area)]
