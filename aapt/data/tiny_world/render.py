"""Renders the tiny world: analytic coverage, no textures, no polygons to clip.

The camera is a pinhole that never tilts, so the horizon divides the image. Above is a panorama that
depends on the heading alone, below is the ground plane. An object is a set of columns, each with a
top, a bottom and a colour. Objects are painted from far to near. Edges are blended by the fraction
of a pixel that they cover, because a small video autoencoder reproduces soft edges better.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from .solids import EYE, Parts, focal_length, fog_share, paint_parts, rgb, visible_parts
from .themes import THEMES, Theme
from .world import World, checked_rows

CHUNK = 16  # frames rendered together: the working set stays in the cache


def render_frames(world: World, poses: np.ndarray, height: int, width: int) -> np.ndarray:
    """Render poses (frames, 3) as uint8 (frames, height, width, 3)."""
    video = np.empty((len(poses), height, width, 3), np.uint8)
    parts = visible_parts(world, poses)
    for start in range(0, len(poses), CHUNK):
        chunk = poses[start : start + CHUNK]
        image = _background(world, parts, chunk, height, width)
        paint_parts(image, world, parts, chunk)
        image *= (255 * world.tint).astype(np.float32)[:, None, None]
        image += 0.5
        np.clip(image, 0, 255, out=image)
        video[start : start + CHUNK] = image.astype(np.uint8).transpose(0, 2, 3, 1)
    return video


def _smooth(edge: np.ndarray) -> np.ndarray:
    return np.clip(edge + 0.5, 0, 1)


# The panorama: everything too far away to move when walking.


def _skyline(kind: str, heading: np.ndarray, layer: int) -> np.ndarray:
    """Height of a silhouette over the horizon, as the tangent of its elevation."""
    waves = sum(
        np.sin(frequency * heading + phase + 2.1 * layer) / weight
        for frequency, phase, weight in ((3, 0.3, 1.0), (5, 1.9, 1.4), (8, 4.0, 2.2))
    )
    scale = 1.0 if layer else 1.5
    if kind == "hills":
        return scale * (0.075 + 0.026 * waves)
    if kind == "mesas":
        return scale * (0.07 + 0.045 * np.tanh(5 * waves))
    if kind == "towers":
        index = np.floor(heading / (2 * math.pi) * (44 + 10 * layer)) + 17 * layer
        rough = np.modf(np.abs(np.sin(index * 12.9898) * 43758.5453))[0]
        return scale * (0.04 + 0.15 * rough**1.5)
    if kind == "peaks":
        ridge = np.abs(np.sin(4.5 * heading + 1.3 * layer)) + 0.45 * np.abs(
            np.sin(8.5 * heading + 0.8 + layer)
        )
        return scale * (0.20 - 0.125 * ridge)
    raise ValueError(f"unknown skyline {kind!r}")


def _clouds(heading: np.ndarray, height: np.ndarray, pixel: float) -> np.ndarray:
    """Coverage by nine clouds, each of four puffs with a flat base."""
    rng = np.random.default_rng(7)
    coverage = np.zeros(np.broadcast_shapes(heading.shape, height.shape), np.float32)
    for cloud in range(9):
        centre = 2 * math.pi * (cloud + 0.5 * rng.random()) / 9
        base = 0.26 + 0.24 * rng.random()
        size = 0.8 + 0.5 * rng.random()
        near = np.abs(_wrap(heading[:, 0] - centre)) < 0.5
        dx = _wrap(heading[near] - centre)
        flat = _smooth((height - base) / (2 * pixel))
        for offset, radius in ((-0.13, 0.05), (-0.04, 0.085), (0.06, 0.07), (0.14, 0.04)):
            away = np.hypot(dx - offset * size, (height - base) * 1.1)
            puff = _smooth((radius * size - away) / (2.5 * pixel)) * flat
            coverage[near] = np.maximum(coverage[near], puff)
    return coverage


def _wrap(angle: np.ndarray) -> np.ndarray:
    return (angle + math.pi) % (2 * math.pi) - math.pi


@lru_cache(maxsize=16)
def _panorama(theme: Theme, columns: int, rows: int, top: float) -> np.ndarray:
    """Sky and silhouettes (3, columns, rows); rows go from the horizon up to tangent `top`."""
    heading = (np.arange(columns, dtype=np.float32)[:, None] + 0.5) * (2 * math.pi / columns)
    height = (np.arange(rows, dtype=np.float32)[None] + 0.5) * (top / rows)
    pixel = 1.0 / 64  # softness of edges: a pixel of an image 128 pixels wide
    pixel = min(pixel, max(4 * top / rows, 1.0 / 512))

    low, middle, high = (rgb(c)[:, None, None] for c in theme.sky)
    level = np.clip(height / 0.62, 0, 1)[None]
    sky = low + (middle - low) * np.clip(level * 2, 0, 1)
    sky = sky + (high - middle) * np.clip(level * 2 - 1, 0, 1)
    sky = np.broadcast_to(sky, (3, columns, rows)).copy()

    away = np.hypot(_wrap(heading - theme.sun_heading), height - theme.sun_height)
    sun = rgb(theme.sun)[:, None, None]
    sky += (sun - sky) * (0.55 * np.exp(-away / (1.3 * theme.sun_radius + 0.05)))
    sky += (sun - sky) * _smooth((theme.sun_radius - away) / (1.5 * pixel))
    if theme.cloud is not None:
        shade = 0.80 + 0.2 * np.clip((height - 0.25) / 0.25, 0, 1)
        cloud = rgb(theme.cloud)[:, None, None] * shade
        sky += (cloud - sky) * (0.92 * _clouds(heading, height, pixel))

    for layer, colour in enumerate((theme.far, theme.near)):
        ridge = np.maximum(_skyline(theme.skyline, heading, layer), 0.012)
        if theme.skyline == "towers":
            width = max(1, round(columns * pixel / (2 * math.pi)))
            ring = np.concatenate([ridge[-width:], ridge, ridge[:width]])[:, 0]
            ridge = np.convolve(ring, np.ones(2 * width + 1) / (2 * width + 1), "valid")[:, None]
        rock = rgb(colour)[:, None, None]
        if theme.skyline == "peaks":
            snow = _smooth((height - 0.6 * ridge) / (2 * pixel))
            rock = rock + (rgb((246, 250, 255))[:, None, None] - rock) * snow
        mist = 0.65 * np.exp(-height / 0.05)
        rock = rock + (low - rock) * mist
        sky += (rock - sky) * _smooth((ridge - height) / (1.5 * pixel))
    return sky


# The ground.


def _pattern(kind: str, x: np.ndarray, y: np.ndarray, blur: np.ndarray) -> np.ndarray:
    """Share of the second ground colour at (x, y); `blur` is the size of a pixel there."""
    if kind == "grid":
        period = 1.5
        line = np.maximum(np.cos(2 * math.pi / period * x), np.cos(2 * math.pi / period * y))
        return _smooth((line - 0.86) / (0.25 + 2.5 * blur)) / (1 + 2.5 * blur)
    if kind == "checker":
        wave = np.sin(math.pi / 1.2 * x) * np.sin(math.pi / 1.2 * y)
    elif kind == "diamonds":
        wave = np.sin(2.0 * (x + y)) * np.sin(2.0 * (x - y))
    elif kind == "dunes":
        wave = np.sin(2.1 * x + 1.3 * np.sin(0.9 * y)) + 0.3 * np.sin(1.3 * y)
    elif kind == "ripples":
        k = 2.4
        wave = 0.55 * (
            np.cos(k * x) + np.cos(k * (0.5 * x + 0.866 * y)) + np.cos(k * (0.5 * x - 0.866 * y))
        )
    else:
        raise ValueError(f"unknown ground pattern {kind!r}")
    soft = 0.25 if kind in ("dunes", "ripples") else 0.02
    contrast = np.exp(-((blur / 0.55) ** 2))
    return 0.5 + 0.5 * contrast * wave / np.sqrt(wave**2 + soft + (3 * blur) ** 2)


def _background(
    world: World, parts: Parts, poses: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Sky and ground with the shadows of the objects: (frames, 3, height, width) in [0, 1]."""
    theme = THEMES[world.theme]
    focal = focal_length(width)
    across = ((np.arange(width) + 0.5 - width / 2) / focal).astype(np.float32)
    down = (np.arange(height) + 0.5 - height / 2) / focal
    sky_rows = int((down < 0).sum())
    image = np.empty((len(poses), 3, height, width), np.float32)

    top = height / 2 / focal
    columns = min(round(2 * math.pi * focal) * 4, 4096)
    rows = min(2 * height, 768)
    panorama = _panorama(theme, columns, rows, top).reshape(3, -1)
    angle = np.arctan(across)
    column = (poses[:, 2:] + angle) % (2 * math.pi) * (columns / (2 * math.pi))
    row = -down[:sky_rows, None] * np.cos(angle) * (rows / top)
    index = np.minimum(column.astype(np.int32), columns - 1)[:, None] * rows
    index = index + np.clip(row, 0, rows - 1).astype(np.int32)
    for channel in range(3):
        image[:, channel, :sky_rows] = panorama[channel].take(index)

    # A middle row on the horizon itself, where the plane is infinitely far, takes its lower half.
    distance = EYE / np.maximum(down[sky_rows:], 0.25 / focal)
    distance = distance.astype(np.float32)[:, None]
    sine, cosine = np.sin(poses[:, 2]), np.cos(poses[:, 2])
    ray_x = (cosine[:, None] - sine[:, None] * across).astype(np.float32)[:, None]
    ray_y = (sine[:, None] + cosine[:, None] * across).astype(np.float32)[:, None]
    # float32 places the pattern to a thousandth of a unit for thousands of units of walking.
    x = distance * ray_x + poses[:, 0].astype(np.float32)[:, None, None]
    y = distance * ray_y + poses[:, 1].astype(np.float32)[:, None, None]
    share = _pattern(theme.pattern, x, y, distance**2 / (EYE * focal))
    fog = fog_share(distance)
    shadow = _shadows(world, parts, poses, x, y, distance[:, 0], focal)
    first, second, haze, dark = (rgb(c) for c in (*theme.ground, theme.sky[0], theme.shadow))
    for channel in range(3):
        ground = share * (second[channel] - first[channel])
        ground += first[channel]
        ground += (dark[channel] - ground) * shadow
        ground += (haze[channel] - ground) * fog
        image[:, channel, sky_rows:] = ground
    return image


def _shadows(
    world: World,
    parts: Parts,
    poses: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    distance: np.ndarray,
    focal: float,
) -> np.ndarray:
    """Share of shadow on the ground (frames, rows, width): soft pools next to the objects."""
    theme = THEMES[world.theme]
    light = np.ones_like(x)
    rows, width = x.shape[1:]
    offset_x = -0.35 * math.cos(theme.sun_heading)
    offset_y = -0.35 * math.sin(theme.sun_heading)
    solid = np.flatnonzero(parts.casts)
    reach = np.maximum(parts.half_x, parts.half_y)[solid] + 1.1
    centre_x = parts.x[solid] + offset_x
    centre_y = parts.y[solid] + offset_y
    for f, (px, py, heading) in enumerate(poses):
        dx, dy = centre_x - px, centre_y - py
        z = dx * math.cos(heading) + dy * math.sin(heading)
        u = dy * math.cos(heading) - dx * math.sin(heading)
        near, far = z - reach, z + reach
        seen = (far > 0.5) & (near < 8) & (np.abs(u) - reach < far)
        for k in np.flatnonzero(seen):
            start = int(np.searchsorted(-distance, -far[k]))
            stop = int(np.searchsorted(-distance, -near[k]))
            depth = max(near[k], 0.4)
            left = min((u[k] - reach[k]) / depth, (u[k] - reach[k]) / far[k])
            right = max((u[k] + reach[k]) / depth, (u[k] + reach[k]) / far[k])
            left = max(0, int(width / 2 + focal * left))
            right = min(width, int(width / 2 + focal * right) + 1)
            if start >= stop or left >= right:
                continue
            window = (f, slice(start, stop), slice(left, right))
            i = solid[k]
            out_x = np.maximum(np.abs(x[window] - centre_x[k]) - parts.half_x[i], 0)
            out_y = np.maximum(np.abs(y[window] - centre_y[k]) - parts.half_y[i], 0)
            away = np.clip(1 - (out_x * out_x + out_y * out_y) * 1.6, 0, 1)
            light[window] *= 1 - 0.6 * away * away
    return 1 - light


def render(world: World, poses: torch.Tensor, height: int = 80, width: int = 128) -> torch.Tensor:
    """Render poses (frames, 3), rows (x, y, heading), as uint8 (frames, height, width, 3).

    ValueError for a size below 1, no poses, or poses of another shape.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height, width: expected 1 or more, got {height} and {width}")
    poses = checked_rows(poses, "poses", 3)
    if len(poses) == 0:
        raise ValueError("poses: expected 1 row or more, got 0")
    return torch.from_numpy(render_frames(world, poses, height, width))
