"""Boxes around the objects that a picture of the tiny world shows."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .solids import BOX, VIEW_DISTANCE, Parts, paint_parts, visible_parts
from .world import World, checked_rows

CLASSES = ("block", "round")
VISIBLE = 0.06  # least change of a pixel by an object, of the range of a colour
FARTHEST = VIEW_DISTANCE - 2  # units: objects beyond fade out
SMALLEST = 6  # pixels: boxes with a shorter side are no objects yet
CANVAS = -1.0  # darker than every object, so that no background hides one


class Boxes(NamedTuple):
    """Boxes of objects in one picture."""

    corners: Tensor  # (n, 4): left, top, right, bottom, in pixels; right and bottom are outside
    classes: Tensor  # (n,), indices into CLASSES


def object_boxes(world: World, pose: Tensor, height: int, width: int) -> Boxes:
    """Return the boxes around what each object changes in the picture from `pose` (3,).

    An object changes the pixels in which the picture with it differs from the picture without it. A
    part that another object hides is therefore outside the box.
    """
    poses = checked_rows(pose[None], "pose", 3)
    parts = visible_parts(world, poses)
    whole = _painted(world, parts, poses, height, width)
    corners, classes = [], []
    for cell in np.unique(parts.cell[_in_view(parts, poses[0])], axis=0):
        own = (parts.cell == cell).all(axis=1)
        rest = Parts(**{name: value[~own] for name, value in vars(parts).items()})
        changed = np.abs(whole - _painted(world, rest, poses, height, width)).max(axis=0) >= VISIBLE
        if not changed.any():
            continue
        (top, bottom), (left, right) = (_span(changed.any(axis=axis)) for axis in (1, 0))
        if min(bottom - top, right - left) >= SMALLEST:
            corners.append((left, top, right, bottom))
            classes.append(int(parts.shape[own][0] != BOX))
    return Boxes(
        torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(classes, dtype=torch.int64),
    )


def _painted(world: World, parts: Parts, poses: np.ndarray, height: int, width: int) -> np.ndarray:
    """Paint objects alone, from one pose: (3, height, width)."""
    image = np.full((1, 3, height, width), CANVAS, np.float32)
    paint_parts(image, world, parts, poses)
    return image[0]


def _in_view(parts: Parts, pose: np.ndarray) -> np.ndarray:
    """Return which solids may be in view: in front of the camera, near, not beyond its sides."""
    dx, dy = parts.x - pose[0], parts.y - pose[1]
    depth = dx * np.cos(pose[2]) + dy * np.sin(pose[2])
    aside = np.abs(dy * np.cos(pose[2]) - dx * np.sin(pose[2]))
    reach = np.hypot(parts.half_x, parts.half_y)
    # The field of view is a right angle.
    return (depth > -reach) & (depth < FARTHEST) & (aside < depth + 2 * reach)


def _span(marked: np.ndarray) -> tuple[int, int]:
    """Return the first marked index, and the one after the last."""
    indices = np.flatnonzero(marked)
    return int(indices[0]), int(indices[-1]) + 1
