"""Poses of a figure that moves towards a goal: a pose to hold, or a preset motion that loops.

The poses of a step depend on the pose before, the goal and the number of the step alone. So a
stream that is restored, forked or replayed needs no other state of the figure than its last pose.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from ..model.pose import FAR, POINTS, Pose
from .poses import PoseScript, load_poses

TURN = 12.0  # radians per second, most of a limb; the puppet's fastest motions have 10 to 15
MOVE = 0.6  # image heights per second, most of the hips; the fastest jump of the puppet
DIGITS = 4  # of the points in a walk: a hundredth of a pixel in a small image
HIPS = (8, 11)
# The point by which each point hangs, -1 for the middle of the hips; a parent's index in ORDER is
# before that of its children.
PARENTS = (1, -1, 1, 2, 3, 1, 5, 6, -1, 8, 9, -1, 11, 12)
ORDER = (1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)


@dataclass(frozen=True)
class PoseGoal:
    """The goal of a figure: a pose of one video frame to take and hold, or the name of a preset
    motion to loop. Without either the figure holds the pose it has."""

    pose: Pose | None = None
    motion: str | None = None


@functools.cache
def _script(motion: str) -> PoseScript:
    return load_poses(motion)


def next_pose(
    before: np.ndarray, goal: PoseGoal, step: int, frames: int, fps: float, aspect: float
) -> Pose:
    """Returns the poses of the video frames of a step.

    Limbs keep their lengths on the way: each turns about the point by which it hangs, at most
    `TURN`, and the hips move at most `MOVE`. A pose to hold is reached in even parts, with the last
    frame of the step if these limits allow. The phase of a motion is the stream's time. Points stay
    within `FAR` of the image, as a pose must: long limbs are cut short there.

    Args:
        before: Points (14, 3) of the video frame before the step.
        step: Number of the step; 1 is the first.
        frames: Video frames per step.
        fps: Video frames per second.
        aspect: The image's width over its height.
    """
    points, found = before, []
    for frame in range(frames):
        share = 1.0
        if goal.motion:
            target = _script(goal.motion).at((frames * (step - 1) + 1 + frame) / fps)
        else:
            target = before if goal.pose is None else goal.pose.points[0]
            share = 1 / (frames - frame)
        points = approach(points, target, share, 1 / fps, aspect)
        found.append(points)
    return Pose(np.stack(found).round(DIGITS))


def approach(
    before: np.ndarray, target: np.ndarray, share: float, seconds: float, aspect: float
) -> np.ndarray:
    """Moves points (14, 3) by a share of the way to a target, within the limits of a time.

    If a point is hidden in either pose, the limbs have no angles: points that both poses show move
    on straight lines, and the others are those of the target.
    """
    both = (before[:, 2] > 0) & (target[:, 2] > 0)
    if not both.all():
        moved = target.copy()
        moved[both, :2] += (1 - share) * (before[both, :2] - target[both, :2])
        return moved
    (root, limbs), (to, turned) = _limbs(before, aspect), _limbs(target, aspect)
    away = share * (to - root)
    root = root + away * min(1.0, MOVE * seconds / max(float(np.hypot(*away)), 1e-9))
    length, angle = np.hypot(*limbs.T), np.arctan2(*limbs.T)
    turn = np.remainder(np.arctan2(*turned.T) - angle + math.pi, 2 * math.pi) - math.pi
    angle = angle + np.clip(share * turn, -TURN * seconds, TURN * seconds)
    length = length + share * (np.hypot(*turned.T) - length)
    return _points(
        root, length[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=-1), aspect
    )


def _limbs(points: np.ndarray, aspect: float) -> tuple[np.ndarray, np.ndarray]:
    """The middle of the hips (2,), and each point from its parent (14, 2), in image heights."""
    places = points[:, :2] * (aspect, 1.0)
    root = places[HIPS, :].mean(axis=0)
    return root, places - np.concatenate([places, root[None]])[list(PARENTS)]


def _points(root: np.ndarray, limbs: np.ndarray, aspect: float) -> np.ndarray:
    """The inverse of `_limbs`: points (14, 3), all visible, at most `FAR` outside the image."""
    places = np.empty((len(POINTS) + 1, 2))
    places[-1] = root
    for point in ORDER:
        places[point] = places[PARENTS[point]] + limbs[point]
    shares = (places[:-1] / (aspect, 1.0)).clip(-FAR, 1 + FAR)
    return np.concatenate([shares, np.ones((len(POINTS), 1))], axis=1)
