"""A procedural first-person world: places, controls and camera poses.

The world is an endless plane with chunky objects on a hash grid, deterministic in (seed, theme).
World axes are x, y on the ground and z down; a heading h looks along (cos h, sin h), and a
growing heading turns right. A control (yaw, forward) in [-1, 1] drives four video frames: in each
the heading grows by `YAW_STEP * yaw` and the camera then moves `FORWARD_STEP * forward` units
along the new heading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ...clock import FRAMES_PER_LATENT
from .themes import THEMES

FIELD_OF_VIEW = math.pi / 2  # of the camera, horizontal, radians
YAW_STEP = 0.026  # radians per video frame at yaw 1
FORWARD_STEP = 0.05  # units per video frame at forward 1
BACKWARD_LIMIT = 0.4  # the fastest way back in sampled clips
CLEARANCE = 0.55  # sampled clips keep this far from the surface of every object
CELL = 3.6  # side of a grid cell; an object stays at least MARGIN inside its cell
MARGIN = 0.3
DENSITY = 0.62  # share of the cells with an object


@dataclass(frozen=True)
class Object:
    """One block or round object.

    Attributes:
        x, y: Centre on the ground, in units.
        half_x, half_y: Half the sides of a block; both are the radius of a round object.
        height: Height in units.
        is_round: True for a round object.
        cell: Grid cell (i, j) that contains the object.
    """

    x: float
    y: float
    half_x: float
    half_y: float
    height: float
    is_round: bool
    cell: tuple[int, int]

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Distance of points from the surface, zero inside."""
        if self.is_round:
            return np.maximum(np.hypot(x - self.x, y - self.y) - self.half_x, 0)
        return np.hypot(
            np.maximum(np.abs(x - self.x) - self.half_x, 0),
            np.maximum(np.abs(y - self.y) - self.half_y, 0),
        )


@dataclass(frozen=True)
class World:
    """An endless world.

    Attributes:
        seed: Decides the objects.
        theme: Index into THEMES, decides the look.
        tint: (3,) gain of red, green and blue, close to 1, different from world to world.
        cell_size: Side of a grid cell in units.
    """

    seed: int
    theme: int
    tint: np.ndarray
    cell_size: float = CELL

    def objects(self, low: np.ndarray, high: np.ndarray) -> Iterator[Object]:
        """The objects of all grid cells that touch the rectangle from `low` to `high`."""
        first, last = np.floor(np.asarray(low) / CELL), np.floor(np.asarray(high) / CELL)
        for i in range(int(first[0]), int(last[0]) + 1):
            for j in range(int(first[1]), int(last[1]) + 1):
                found = _object(self.seed, i, j)
                if found is not None:
                    yield found

    def clearance(self, poses: np.ndarray) -> np.ndarray:
        """Distance of poses (frames, 2 or 3) from the nearest object, at most 3 units."""
        x, y = poses[:, 0], poses[:, 1]
        nearest = np.full(len(poses), 3.0)
        for item in self.objects(poses[:, :2].min(0) - 3, poses[:, :2].max(0) + 3):
            nearest = np.minimum(nearest, item.distance(x, y))
        return nearest


def _mix(value: int) -> int:
    """One round of SplitMix64, which gives equal numbers on every platform."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


@lru_cache(maxsize=4096)
def _object(seed: int, i: int, j: int) -> Object | None:
    state = _mix(_mix(_mix(seed & 0xFFFFFFFF) ^ (i & 0xFFFFFFFF)) ^ (j & 0xFFFFFFFF))

    def uniform(low: float = 0.0, high: float = 1.0) -> float:
        nonlocal state
        state = _mix(state)
        return low + (high - low) * (state >> 11) / 2**53

    if uniform() > DENSITY:
        return None
    is_round = uniform() < 0.55
    if is_round:
        half_x = half_y = uniform(0.34, 0.5)
        height = uniform(1.0, 1.6)
    else:
        long, short = uniform(0.6, 1.15), uniform(0.45, 0.7)
        half_x, half_y = (long, short) if uniform() < 0.5 else (short, long)
        height = uniform(1.0, 1.9)
    x = (i + 0.5) * CELL + uniform(-1, 1) * (CELL / 2 - MARGIN - half_x)
    y = (j + 0.5) * CELL + uniform(-1, 1) * (CELL / 2 - MARGIN - half_y)
    return Object(x, y, half_x, half_y, height, is_round, (i, j))


def make_world(seed: int, theme: int) -> World:
    """The world of a seed (any int >= 0) with the look of ``THEMES[theme]``. ValueError for other
    numbers."""
    if not 0 <= theme < len(THEMES):
        raise ValueError(f"theme: expected 0 to {len(THEMES) - 1}, got {theme}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    tint = np.random.default_rng([seed, theme]).uniform(0.98, 1.0, 3)
    return World(seed, theme, tint)


def checked_rows(value: torch.Tensor, name: str, columns: int) -> np.ndarray:
    """Convert `value` to float64 (n, columns). ValueError for another shape, NaN or infinity."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != columns:
        raise ValueError(f"{name}: expected shape (n, {columns}), got {tuple(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got {array}")
    return array


def integrate(
    controls: torch.Tensor, start_pose: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> torch.Tensor:
    """Poses of video frames driven by controls (n, 2), rows (yaw, forward).

    Returns float64 (1 + 4 n, 3), rows (x, y, heading); row 0 is `start_pose`, and control row i
    moves the rows 4 i + 1 to 4 i + 4. The heading is not wrapped.
    """
    steps = np.repeat(checked_rows(controls, "controls", 2), FRAMES_PER_LATENT, axis=0)
    if np.abs(steps).max(initial=0) > 1:
        raise ValueError(f"controls: expected numbers in [-1, 1], got {np.abs(steps).max()}")
    x, y, heading = (float(value) for value in start_pose)
    headings = heading + np.cumsum(steps[:, 0]) * YAW_STEP
    forward = steps[:, 1] * FORWARD_STEP
    poses = np.empty((len(steps) + 1, 3))
    poses[0] = x, y, heading
    poses[1:, 0] = x + np.cumsum(forward * np.cos(headings))
    poses[1:, 1] = y + np.cumsum(forward * np.sin(headings))
    poses[1:, 2] = headings
    return torch.from_numpy(poses)


def relative_poses(poses: torch.Tensor) -> torch.Tensor:
    """Camera motion of poses (frames, 3) from frame to frame.

    Returns float64 (frames - 1, 4, 4); entry f maps points in the axes of camera f + 1 to the
    axes of camera f, both OpenCV (x right, y down, z forward; `docs/method.md#10`).
    """
    pose = torch.from_numpy(checked_rows(poses, "poses", 3))
    step = pose[1:] - pose[:-1]
    cosine, sine = torch.cos(pose[:-1, 2]), torch.sin(pose[:-1, 2])
    motion = torch.eye(4, dtype=torch.float64).repeat(len(step), 1, 1)
    motion[:, 0, 0] = motion[:, 2, 2] = torch.cos(step[:, 2])
    motion[:, 0, 2] = torch.sin(step[:, 2])
    motion[:, 2, 0] = -torch.sin(step[:, 2])
    motion[:, 0, 3] = step[:, 1] * cosine - step[:, 0] * sine
    motion[:, 2, 3] = step[:, 0] * cosine + step[:, 1] * sine
    return motion


def sample_trajectory(
    world: World, steps: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random walk of piecewise constant controls that stops before every object.

    Returns controls float32 (steps, 2) and poses float64 (1 + 4 steps, 3). The poses are exactly
    those of the controls, because objects are avoided by the choice of controls alone.
    """
    pose = np.append(rng.uniform(-40, 40, 2), rng.uniform(-math.pi, math.pi))
    while world.clearance(pose[None])[0] < CLEARANCE:
        pose[:2] = rng.uniform(-40, 40, 2)
    start, rows, plan = tuple(pose), [], []
    while len(rows) < steps:
        if not plan:
            plan = _approach(world, pose, rng) if rng.random() < 0.35 else [_piece(rng)]
        yaw, forward, length = plan.pop(0)
        piece = np.tile(np.array([yaw, forward], np.float32), (length, 1))
        path = integrate(piece, tuple(pose)).numpy()
        blocked = world.clearance(path[1:]).reshape(length, -1).min(1) < CLEARANCE
        free = int(blocked.argmax()) if blocked.any() else length
        rows.extend(piece[:free])
        pose = path[FRAMES_PER_LATENT * free]
        if free < length:
            plan = _leave(world, pose, rng)
    controls = torch.from_numpy(np.array(rows[:steps], np.float32).reshape(-1, 2))
    return controls, integrate(controls, start)


def _piece(rng: np.random.Generator) -> tuple[float, float, int]:
    """Draw (yaw, forward, latent frames): walking, turning, both, or standing still."""
    length = int(rng.integers(3, 13))
    yaw, forward = rng.uniform(-1, 1), rng.uniform(-BACKWARD_LIMIT, 1)
    kind = rng.random()
    if kind < 0.08:
        return 0.0, 0.0, min(length, 5)
    if kind < 0.30:
        return 0.0, rng.choice([1.0, max(forward, 0.3)]), length
    if kind < 0.40:
        return rng.choice([-1.0, 1.0, yaw]), 0.0, length
    if kind < 0.65:
        return yaw, 1.0, length
    return yaw, forward, length


def _turn(angle: float, speed: float, rng: np.random.Generator) -> tuple[float, float, int]:
    """Turn by `angle` (wrapped) in whole latent frames while walking at `speed`."""
    angle = (angle + math.pi) % (2 * math.pi) - math.pi
    full = YAW_STEP * FRAMES_PER_LATENT
    length = max(1, math.ceil(abs(angle) / (full * rng.uniform(0.6, 1))))
    return angle / (full * length), speed, length


def _leave(
    world: World, pose: np.ndarray, rng: np.random.Generator
) -> list[tuple[float, float, int]]:
    """Leave an obstacle: stop or step back, turn to an open way, walk."""
    pieces = []
    kind = rng.random()
    if kind < 0.15:
        pieces.append((0.0, 0.0, 3))
    elif kind < 0.4:
        pieces.append((rng.uniform(-1, 1), -rng.uniform(0.1, BACKWARD_LIMIT), 4))
    steps = np.linspace(0.1, 1.8, 8)[:, None]
    for _ in range(8):
        angle = rng.uniform(0.4, 1.8) * rng.choice([-1.0, 1.0])
        way = pose[2] + angle
        path = pose[:2] + steps * np.array([math.cos(way), math.sin(way)])
        if world.clearance(path).min() > CLEARANCE:
            break
    pieces.append(_turn(angle, 0.0, rng))
    pieces.append((0.0, rng.uniform(0.5, 1), int(rng.integers(4, 10))))
    return pieces


def _approach(
    world: World, pose: np.ndarray, rng: np.random.Generator
) -> list[tuple[float, float, int]]:
    """Turn to an object in front, then walk up to the object or closely past it."""
    near = []
    for item in world.objects(pose[:2] - 6, pose[:2] + 6):
        away = math.hypot(item.x - pose[0], item.y - pose[1])
        angle = math.atan2(item.y - pose[1], item.x - pose[0]) - pose[2]
        if 2 < away < 6 and math.cos(angle) > 0.6:
            near.append((item, away, angle))
    if not near:
        return [_piece(rng)]
    item, away, angle = near[int(rng.integers(len(near)))]
    beside = max(item.half_x, item.half_y) + CLEARANCE + 0.2
    angle += rng.choice([0.0, -1.0, 1.0]) * math.atan2(beside, away)
    speed = rng.uniform(0.6, 1)
    walk = away / (speed * FORWARD_STEP * FRAMES_PER_LATENT)
    return [_turn(angle, 0.0, rng), (0.0, speed, int(np.clip(walk, 3, 18)))]
