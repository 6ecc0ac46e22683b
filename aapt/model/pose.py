"""Poses of a figure as keypoints, and as the drawn skeletons that a model is conditioned on.

Points and limbs are the first fourteen points of OpenPose's body, with the head's centre in place
of the nose. Left and right are the figure's own; a figure that faces the camera has its right hand
at the left of the image.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POINTS = (
    *("head", "neck"),
    *("right shoulder", "right elbow", "right wrist"),
    *("left shoulder", "left elbow", "left wrist"),
    *("right hip", "right knee", "right ankle"),
    *("left hip", "left knee", "left ankle"),
)
LIMBS = (  # pairs of points
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7)),
    *((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0)),
)
THICKNESS = 1 / 24  # of a limb, in image heights
HEAD = 1.6  # the head's dot in units of a limb's thickness
FAR = 1.0  # image sides that a keypoint may be outside the image


@dataclass(frozen=True, eq=False)
class Pose:
    """The keypoints of a figure in the video frames of one step.

    Attributes:
        points: float64 (frames, 14, 3) of (x, y, visible). x and y are shares of the image's width
            and height, from the top left corner; points may be outside by at most `FAR`. A point
            is drawn if visible is 1, and not if it is 0.

    ValueError for another shape, numbers that are not finite, places further outside, or a
    visibility that is neither 0 nor 1.
    """

    points: np.ndarray

    def __post_init__(self):
        points = np.array(self.points, np.float64)
        if points.ndim != 3 or points.shape[1:] != (len(POINTS), 3) or not len(points):
            raise ValueError(
                f"pose: expected (frames, {len(POINTS)}, 3) of (x, y, visible), got {points.shape}"
            )
        check_points(points)
        points.flags.writeable = False
        object.__setattr__(self, "points", points)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pose) and np.array_equal(self.points, other.points)

    def __hash__(self) -> int:
        return hash(self.points.tobytes())


def check_points(points: np.ndarray) -> None:
    """Checks keypoints (frames, points, 3) of (x, y, visible). ValueError names the first that is
    not finite, too far outside the image, or neither visible nor hidden."""
    for said, wrong in (
        ("finite numbers", ~np.isfinite(points).all(axis=-1)),
        (
            f"x and y in [{-FAR:g}, {1 + FAR:g}]",
            (points[..., :2] < -FAR).any(axis=-1) | (points[..., :2] > 1 + FAR).any(axis=-1),
        ),
        ("a visibility of 0 or 1", ~np.isin(points[..., 2], (0, 1))),
    ):
        if wrong.any():
            frame, point = np.argwhere(wrong)[0]
            got = ", ".join(f"{value:g}" for value in points[frame, point])
            raise ValueError(
                f"pose: expected {said}, got ({got}) for the {POINTS[point]} in video frame {frame}"
            )


def draw_skeletons(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draws keypoints (frames, 14, 3) as skeletons, uint8 (frames, height, width, 3), on black.

    Each limb has a colour of its own, as OpenPose draws it, and a dot marks the head. A limb that
    ends at a hidden point is not drawn. Edges are blended by the share of a pixel that they cover,
    so that motion of less than a pixel shows. Later limbs cover earlier ones.
    """
    image = np.zeros((len(points), height, width, 3), np.float32)
    x = np.arange(width, dtype=np.float32) + 0.5
    y = (np.arange(height, dtype=np.float32) + 0.5)[:, None]
    places = (points[..., :2] * (width, height)).astype(np.float32)
    radius = max(1.0, THICKNESS * height / 2)
    for frame, at, seen in zip(image, places, points[..., 2] > 0):
        for number, (a, b) in enumerate(LIMBS):
            if seen[a] and seen[b]:
                _stroke(frame, x, y, at[a], at[b], radius, limb_colour(number))
        if seen[0]:
            _stroke(frame, x, y, at[0], at[0], HEAD * radius, (255, 255, 255))
    return (image + 0.5).astype(np.uint8)


def limb_colour(number: int) -> tuple[int, int, int]:
    """Returns the colour of a limb, by its number in `LIMBS`."""
    red, green, blue = colorsys.hsv_to_rgb(number / len(LIMBS), 1.0, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _stroke(
    image: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    radius: float,
    colour: Sequence[int],
) -> None:
    """Paints a line with round ends on an image (height, width, 3), from pixel a to pixel b."""
    low = np.floor(np.minimum(a, b) - radius - 1).astype(int)
    high = np.ceil(np.maximum(a, b) + radius + 1).astype(int)
    columns = slice(max(0, low[0]), max(0, high[0]))
    rows = slice(max(0, low[1]), max(0, high[1]))
    dx, dy = x[columns] - a[0], y[rows] - a[1]
    along = b - a
    share = np.clip((dx * along[0] + dy * along[1]) / max(float(along @ along), 1e-6), 0, 1)
    away = np.hypot(dx - share * along[0], dy - share * along[1])
    cover = np.clip(radius - away + 0.5, 0, 1)[..., None]
    window = image[rows, columns]
    window += cover * (np.asarray(colour, np.float32) - window)
