"""One decoded picture of a video: upright, with square or oblong pixels, in colours of BT.709."""

from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from .colours import matrix_of, with_primaries_of_bt709

# Exact on every processor, and with colours at the full resolution.
SCALING = Interpolation.LANCZOS | Interpolation.BITEXACT
SCALING |= Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class Orientation(NamedTuple):
    """One of the eight ways to put a stored picture upright: exchange rows with columns, then
    mirror the columns, then mirror the rows."""

    transposed: bool = False
    mirrored: bool = False  # left and right
    flipped: bool = False  # top and bottom

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "Orientation":
        """The nearest orientation to the frame's display matrix, upright without one."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return cls()
        # A stored pixel (x, y) is shown at (a x + c y, b x + d y), with y down.
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(float)
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, c < 0, b < 0)
        return cls(False, a < 0, d < 0)

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """(rows, columns, 3) as stored -> (rows, columns, 3) upright, contiguous."""
        if self.transposed:
            pixels = pixels.swapaxes(0, 1)
        if self.mirrored:
            pixels = pixels[:, ::-1]
        if self.flipped:
            pixels = pixels[::-1]
        return np.ascontiguousarray(pixels)


@dataclass(frozen=True)
class Picture:
    """One decoded picture of a file.

    Attributes:
        index: Number of the picture, in order of display.
        time: Seconds after the file's first picture.
        take: Number of breaks before the picture; pictures of one take follow each other within
            MAX_GAP.
        frame: The picture as stored, progressive.
        stored_aspect: Width of a stored pixel over its height.
        orientation: The way to put `frame` upright.
        scaler: The file's own, which keeps its filters from picture to picture.
    """

    index: int
    time: float
    take: int
    frame: av.VideoFrame
    stored_aspect: float
    orientation: Orientation
    scaler: VideoReformatter

    @property
    def size(self) -> tuple[int, int]:
        """(columns, rows), upright."""
        size = self.frame.width, self.frame.height
        return size[::-1] if self.orientation.transposed else size

    @property
    def pixel_aspect(self) -> float:
        """Width of a pixel over its height, upright."""
        return 1 / self.stored_aspect if self.orientation.transposed else self.stored_aspect

    def pixels(self, columns: int, rows: int) -> np.ndarray:
        """uint8 RGB (rows, columns, 3), upright, scaled to this size."""
        width, height = (rows, columns) if self.orientation.transposed else (columns, rows)
        rgb = self.scaler.reformat(
            self.frame,
            width,
            height,
            "rgb24",
            src_colorspace=matrix_of(self.frame),
            interpolation=SCALING,
        )
        stored = with_primaries_of_bt709(rgb.to_ndarray(), self.frame.color_primaries)
        return self.orientation.upright(stored)
