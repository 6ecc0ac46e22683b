"""Objects of the tiny world as columns of pixels.

The camera does not tilt, so an upright box, cylinder, cone or ball covers one interval of rows in
each column of pixels. `paint_parts` computes the intervals of all solids and all columns at once,
and blends them into the image from far to near.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .themes import THEMES, Colour, Theme
from .world import FIELD_OF_VIEW, Object, World

EYE = 0.6  # height of the camera over the ground
VIEW_DISTANCE = 12.0
FOG_DISTANCE = 13.5
NEAR = 0.05
PANEL = 0.9  # width of a light and a dark panel on a wall

BOX, CYLINDER, DOME, CONE, BALL = range(5)


def focal_length(width: int) -> float:
    """Focal length in pixels of an image `width` pixels wide."""
    return width / 2 / math.tan(FIELD_OF_VIEW / 2)


def rgb(colour: Colour) -> np.ndarray:
    """A colour as float32 (3,) in [0, 1]."""
    return np.array(colour, np.float32) / 255


def fog_share(distance: np.ndarray) -> np.ndarray:
    """Share of the haze in the colour of an object at `distance`."""
    return 1 - np.exp(-((distance / FOG_DISTANCE) ** 2))


@dataclass(frozen=True)
class Parts:
    """Simple solids, one or two per object; every field has one entry (row) per solid.

    Attributes:
        trim, trim_from, trim_soft: Colour above the height `trim_from`; the change takes
            `trim_soft` units of height.
        casts: True for solids that cast a shadow.
        cell: (n, 2), grid cell of the object.
    """

    x: np.ndarray
    y: np.ndarray
    half_x: np.ndarray
    half_y: np.ndarray
    bottom: np.ndarray
    top: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    trim: np.ndarray
    trim_from: np.ndarray
    trim_soft: np.ndarray
    casts: np.ndarray
    cell: np.ndarray


class Solid(NamedTuple):
    """One solid of an object, around its axis."""

    shape: int
    half_x: float
    half_y: float
    bottom: float
    top: float
    colour: Colour
    trim: Colour
    trim_from: float
    trim_soft: float = 0.0


def _solids(theme: Theme, item: Object) -> Iterator[Solid]:
    """The solids of one object, the lower one first."""
    r, h = item.half_x, item.height
    colours = theme.round, theme.round_trim
    stem = Solid(CYLINDER, 0.3 * r, 0.3 * r, 0, h, theme.trunk, theme.trunk, math.inf)
    if not item.is_round:
        yield Solid(BOX, r, item.half_y, 0, h, theme.block, theme.block_trim, 0.7 * h)
    elif theme.shape == "cactus":
        yield Solid(DOME, 0.8 * r, 0.8 * r, 0, 1.1 * h, *colours, 0.2 * h, 1.2 * h)
    elif theme.shape == "column":
        yield Solid(CYLINDER, r, r, 0, h, *colours, 0.76 * h)
    elif theme.shape == "pine":
        top = 1.35 * h
        yield stem._replace(top=0.5)
        yield Solid(CONE, 1.2 * r, 1.2 * r, 0.28, top, *colours, 0.62 * top)
    else:
        low, high = h - r, h + 1.2 * r
        dark = tuple(int(0.72 * c) for c in theme.round)
        yield stem
        yield Solid(BALL, 1.1 * r, 1.1 * r, low, high, dark, theme.round, h, 1.4 * r)


def visible_parts(world: World, poses: np.ndarray) -> Parts:
    """The solids that can be seen from any of the poses (frames, 3)."""
    theme = THEMES[world.theme]
    low = poses[:, :2].min(0) - VIEW_DISTANCE
    high = poses[:, :2].max(0) + VIEW_DISTANCE
    pairs = [(item, s) for item in world.objects(low, high) for s in _solids(theme, item)]

    def numbers(name: str) -> np.ndarray:
        return np.array([getattr(solid, name) for _, solid in pairs], np.float64)

    def colours(name: str) -> np.ndarray:
        rows = [getattr(solid, name) for _, solid in pairs]
        return np.array(rows, np.float32).reshape(-1, 3) / 255

    return Parts(
        x=np.array([item.x for item, _ in pairs], np.float64),
        y=np.array([item.y for item, _ in pairs], np.float64),
        half_x=numbers("half_x"),
        half_y=numbers("half_y"),
        bottom=numbers("bottom"),
        top=numbers("top"),
        shape=numbers("shape"),
        colour=colours("colour"),
        trim=colours("trim"),
        trim_from=numbers("trim_from"),
        trim_soft=numbers("trim_soft"),
        casts=numbers("bottom") == 0,
        cell=np.array([item.cell for item, _ in pairs], np.int64).reshape(-1, 2),
    )


def paint_parts(image: np.ndarray, world: World, parts: Parts, poses: np.ndarray) -> None:
    """Paint the solids into image (frames, 3, height, width), float32, in place."""
    if len(parts.x) == 0:
        return
    height, width = image.shape[2:]
    focal = focal_length(width)
    theme = THEMES[world.theme]

    # Sorted from far to near by the distance in grid cells: no object leaves its cell, so this
    # order is right for every size.
    dx = parts.x - poses[:, :1]
    dy = parts.y - poses[:, 1:2]
    cosine, sine = np.cos(poses[:, 2:]), np.sin(poses[:, 2:])
    z = dx * cosine + dy * sine
    u = dy * cosine - dx * sine
    extent = np.hypot(parts.half_x, parts.half_y)
    half = FIELD_OF_VIEW / 2
    outside = np.abs(u) * math.cos(half) - z * math.sin(half)
    seen = (outside < extent) & (z > -extent) & (z < VIEW_DISTANCE)
    cells = np.floor(poses[:, None, :2] / world.cell_size)
    nearness = -np.abs(parts.cell - cells).sum(-1) * len(parts.x) * 2 + np.arange(len(parts.x))
    count = int(seen.sum(1).max())
    if count == 0:
        return
    order = np.argsort(np.where(seen, nearness, np.inf), axis=1)[:, :count]
    seen = np.take_along_axis(seen, order, 1)
    z = np.take_along_axis(z, order, 1)[..., None].astype(np.float32)
    u = np.take_along_axis(u, order, 1)[..., None].astype(np.float32)

    alpha, slope_top, slope_bottom, dark, panel = _columns(
        parts, order, z, u, poses, width, focal, theme
    )
    alpha *= (seen[..., None] * np.clip((VIEW_DISTANCE - z) / 2, 0, 1)).astype(np.float32)

    fog = fog_share(np.maximum(z, 0))[..., None]
    haze = rgb(theme.sky[0])[:, None]
    shadow = rgb(theme.shadow)[:, None]
    trim = parts.trim[order][..., None]
    trim = trim + (shadow - trim) * dark[:, :, None]
    trim = (trim + (haze - trim) * fog).astype(np.float32)
    colour = parts.colour[order][..., None]
    colour = colour + (shadow - colour) * (dark + panel)[:, :, None]
    colour = (colour + (haze - colour) * fog).astype(np.float32)
    trim -= colour

    horizon = height / 2
    top = horizon - slope_top[0] * focal
    bottom = horizon - slope_bottom * focal
    edge = horizon - slope_top[1] * focal
    soft = np.maximum(slope_top[2] * focal, 1)
    steep = np.clip(np.abs(np.gradient(top, axis=-1)), 1, 3) if width > 1 else np.ones_like(top)
    covered = alpha > 0
    left = covered.argmax(-1)
    right = width - covered[..., ::-1].argmax(-1)
    row = np.arange(height, dtype=np.float32)[:, None] + 0.5
    for f, k in zip(*np.nonzero(covered.any(-1)), strict=True):
        across = slice(left[f, k], right[f, k])
        t, b = top[f, k, across], bottom[f, k, across]
        start = max(0, int(t.min()) - 2)
        stop = min(height, int(b.max()) + 3)
        if start >= stop:
            continue
        rows = row[start:stop]
        mask = np.clip((rows - t) / steep[f, k, across] + 0.5, 0, 1)
        mask *= np.clip(b - rows + 0.5, 0, 1)
        mask *= alpha[f, k, across]
        paint = colour[f, k, :, None, across]
        if parts.trim_from[order[f, k]] < parts.top[order[f, k]]:
            share = np.clip((edge[f, k, across] - rows) / soft[f, k, across] + 0.5, 0, 1)
            paint = paint + trim[f, k, :, None, across] * share
        window = image[f, :, start:stop, across]
        window += (paint - window) * mask


def _columns(
    parts: Parts,
    order: np.ndarray,
    z: np.ndarray,
    u: np.ndarray,
    poses: np.ndarray,
    width: int,
    focal: float,
    theme: Theme,
) -> tuple[np.ndarray, ...]:
    """Coverage, heights over the horizon and shade of each solid in each column.

    Args:
        order: (F, K), the solids of each frame.
        z, u: (F, K, 1), their depths and their offsets to the right.

    Returns:
        Coverage (F, K, W); slopes (3, F, K, W) of the top, the start of the trim and its softness;
        slopes (F, K, W) of the bottom; share of the shadow colour (F, K, W); and the panels'
        addition to this share (F, K, W). A slope is height over the eye / depth.
    """
    half_x, half_y, top, bottom, trim_from, trim_soft = (
        value[order][..., None].astype(np.float32)
        for value in (
            *(parts.half_x, parts.half_y, parts.top, parts.bottom),
            *(parts.trim_from, parts.trim_soft),
        )
    )
    shape = parts.shape[order][..., None]
    across = ((np.arange(width) + 0.5 - width / 2) / focal).astype(np.float32)
    angle = np.arctan(across)
    cosine, sine = np.cos(angle), np.sin(angle)

    # Upright round solids: the ray of a column passes the axis at a distance `off`.
    along = z * cosine + u * sine
    off = u * cosine - z * sine
    radius = half_x
    chord = np.sqrt(np.maximum(radius**2 - off**2, 0))
    pixel = np.maximum(along, NEAR) * cosine**2 / focal
    alpha = np.clip((radius - np.abs(off)) / pixel + 0.5, 0, 1) * (along > 0)
    axis = 1 / np.maximum(along * cosine, NEAR)
    surface = 1 / np.maximum((along - chord) * cosine, NEAR)
    bulge = chord / radius
    turn = poses[:, 2, None, None].astype(np.float32) + angle - theme.sun_heading
    facing = (off * np.sin(turn) - chord * np.cos(turn)) / radius

    ball = shape == BALL
    middle = (top + bottom) / 2
    high = np.where(shape == DOME, top - radius + chord, top)
    high = np.where(shape == CONE, bottom + (top - bottom) * (1 - np.abs(off) / radius), high)
    high = np.where(ball, middle + (top - middle) * bulge, high)
    low = np.where(ball, middle - (middle - bottom) * bulge, bottom)
    near_top = np.where(shape == CYLINDER, surface, axis)
    near_bottom = np.where(ball, axis, surface)

    box = shape == BOX
    box_alpha, box_near, box_dark, panel = _box(half_x, half_y, z, u, poses, width, focal, theme)
    alpha = np.where(box, box_alpha, alpha).astype(np.float32)
    near_top = np.where(box, box_near, near_top)
    near_bottom = np.where(box, box_near, near_bottom)
    high = np.where(box, top, high)
    dark = np.where(box, box_dark, theme.shade * (0.5 - 0.5 * facing))

    slopes = np.stack([(high - EYE) * near_top, (trim_from - EYE) * near_top, trim_soft * near_top])
    bottoms = ((low - EYE) * near_bottom).astype(np.float32)
    return alpha, slopes.astype(np.float32), bottoms, dark, np.where(box, panel, 0)


def _box(
    half_x: np.ndarray,
    half_y: np.ndarray,
    z: np.ndarray,
    u: np.ndarray,
    poses: np.ndarray,
    width: int,
    focal: float,
    theme: Theme,
) -> tuple[np.ndarray, ...]:
    """Coverage, inverse depth, shade and panels of boxes, over the one or two sides in view.

    Coverage adds up over both sides, so nothing shines through their common edge.
    """
    heading = poses[:, 2, None, None].astype(np.float32)
    cosine, sine = np.cos(heading), np.sin(heading)
    # Centre of the box from the camera along the axes of the world.
    dx, dy = z * cosine - u * sine, z * sine + u * cosine
    total, near, dark, panel = 0.0, 0.0, 0.0, 0.0
    left = np.arange(width, dtype=np.float32)
    for side in ("x", "y"):
        if side == "x":
            outward = np.where(dx < -half_x, 1.0, np.where(dx > half_x, -1.0, 0.0))
            ends = [(dx + outward * half_x, dy + sign * half_y) for sign in (-1, 1)]
            lit = outward * math.cos(theme.sun_heading)
            half = half_y
        else:
            outward = np.where(dy < -half_y, 1.0, np.where(dy > half_y, -1.0, 0.0))
            ends = [(dx + sign * half_x, dy + outward * half_y) for sign in (-1, 1)]
            lit = outward * math.sin(theme.sun_heading) - 0.3
            half = half_x
        (z0, u0), (z1, u1) = ((x * cosine + y * sine, y * cosine - x * sine) for x, y in ends)
        # Cut off the part behind the camera.
        share0 = np.clip((NEAR - z0) / np.where(z1 == z0, 1, z1 - z0), 0, 1) * (z0 < NEAR)
        share1 = np.clip((NEAR - z1) / np.where(z1 == z0, 1, z0 - z1), 0, 1) * (z1 < NEAR)
        front = (outward != 0) & ((z0 > NEAR) | (z1 > NEAR))
        (z0, u0), (z1, u1) = (
            (np.maximum(z0 + (z1 - z0) * share0, NEAR), u0 + (u1 - u0) * share0),
            (np.maximum(z1 + (z0 - z1) * share1, NEAR), u1 + (u0 - u1) * share1),
        )
        s0, s1 = u0 / z0 * focal + width / 2, u1 / z1 * focal + width / 2
        first, last = np.minimum(s0, s1), np.maximum(s0, s1)
        cover = np.clip(np.minimum(left + 1, last) - np.maximum(left, first), 0, 1) * front
        # Inverse depth is linear across the image.
        position = (np.clip(left + 0.5, first, last) - s0) / np.where(s1 == s0, 1, s1 - s0)
        inverse = 1 / z0 + (1 / z1 - 1 / z0) * position
        # Upright panels; they fade if a pixel is not small beside a panel.
        begin, end = half * (2 * share0 - 1) / z0, half * (1 - 2 * share1) / z1
        place = (begin + (end - begin) * position) / inverse
        wave = np.cos(2 * math.pi / PANEL * place)
        visible = theme.panels * np.exp(-((8 / (inverse * focal * PANEL)) ** 2))
        total, near = total + cover, near + cover * inverse
        dark = dark + cover * theme.shade * (0.5 - 0.5 * lit)
        panel = panel + cover * visible * (0.5 + 0.5 * wave / np.sqrt(wave * wave + 0.04))
    weight = np.maximum(total, 1e-6)
    return np.minimum(total, 1), near / weight, dark / weight, panel / weight
