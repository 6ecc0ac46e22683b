"""COCO-WholeBody keypoints drawn as skeletons, in the style of OpenPose."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .keypoints import BODY, FACE, LEFT_HAND, RIGHT_HAND

LIMBS = (  # pairs of points of BODY; limb n and point n have colour n
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10)),
    *((1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
FINGERS = tuple(  # from the wrist (0) along each finger
    (0 if joint == 0 else 4 * finger + joint, 4 * finger + joint + 1)
    for finger in range(5)
    for joint in range(4)
)


def draw_skeletons(
    people: Sequence[np.ndarray], width: int, height: int, min_score: float
) -> np.ndarray:
    """Draw people, each (133, 3) of (x, y, score) in pixels, as uint8 (height, width, 3) on black.

    Points with a score below `min_score` are not drawn, nor are limbs that end at one. A person is
    drawn over the people before.
    """
    detail = 2  # drawn larger and then averaged, so that thin lines move by parts of a pixel
    image = Image.new("RGB", (width * detail, height * detail))
    pen = ImageDraw.Draw(image)
    thickness = detail * max(1.0, height / 100)

    def dot(point: np.ndarray, colour, size: float) -> None:
        x, y = point[:2]
        pen.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=colour)

    def line(a: np.ndarray, b: np.ndarray, colour, size: float) -> None:
        pen.line((*a[:2], *b[:2]), fill=colour, width=max(1, round(size)))

    for person in people:
        person = person * (detail, detail, 1)
        far = (np.abs(person[:, :2] - np.divide(image.size, 2)) > image.size).any(axis=1)
        person[far, 2] = -np.inf  # a wild guess, further away than Pillow can draw
        body = np.stack([_neck(person) if i == "neck" else person[i] for i in BODY])
        seen = body[:, 2] >= min_score
        for number, (a, b) in enumerate(LIMBS):
            if seen[a] and seen[b]:
                line(body[a], body[b], _hue(number / len(BODY), 0.6), thickness)
        for number, point in enumerate(body):
            if seen[number]:
                dot(point, _hue(number / len(BODY)), thickness)
        for hand in (person[LEFT_HAND], person[RIGHT_HAND]):
            for number, (a, b) in enumerate(FINGERS):
                if min(hand[a, 2], hand[b, 2]) >= min_score:
                    line(hand[a], hand[b], _hue(number / len(FINGERS)), thickness / 3)
        for point in person[FACE]:
            if point[2] >= min_score:
                dot(point, (255, 255, 255), thickness / 2)
    return np.asarray(image.reduce(detail))


def _neck(person: np.ndarray) -> np.ndarray:
    """(x, y, score) of the middle between the shoulders, with the lower of their scores."""
    left, right = person[5], person[6]
    return np.append((left[:2] + right[:2]) / 2, min(left[2], right[2]))


def _hue(hue: float, value: float = 1.0) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, 1.0, value)
    return round(255 * red), round(255 * green), round(255 * blue)
