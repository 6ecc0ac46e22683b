"""Renders the puppet: smooth-shaded strokes with an ink outline in a place of the tiny world.

The camera rests, so the place is rendered once per clip. Every part of the figure is a stroke with
round ends and two radii. Its shade follows the normal of a rounded surface, and its edges are
blended by the share of a pixel that they cover.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..tiny_world.render import render_frames
from ..tiny_world.themes import THEMES
from ..tiny_world.world import World, make_world
from .looks import INK, LOOKS, Look, Mark
from .motions import GROUND, Body

CHUNK = 8  # frames painted together
OUTLINE = 0.0105  # of the figure, in image heights
LIGHT = np.array([-0.45, -0.62, 0.64], np.float32)  # direction to the light: left, up, near
PLACES = (
    "in a meadow",
    "in the desert",
    "in a neon city",
    "in the snow",
    "by a lagoon",
    "in candy land",
)  # of THEMES, in their order
VIEWS = 12  # of a world, among which a free one is chosen


class Stroke(NamedTuple):
    """A part of the figure in pixels, in each of the frames.

    a, b: ends (frames, 2) of (x, y). radii: at both ends. colour: (3,) in [0, 255].
    """

    a: np.ndarray
    b: np.ndarray
    radii: tuple[float, float]
    colour: Sequence[float]


def backdrop(seed: int, place: int, height: int, width: int) -> np.ndarray:
    """Render a place without the figure, float32 (height, width, 3) in [0, 255].

    Of some random views of a world, the one that has most room in front of the camera.
    """
    world, rng = make_world(seed, place), np.random.default_rng([seed, place])
    views = rng.uniform((-20, -20, -np.pi), (20, 20, np.pi), (VIEWS, 3))
    chosen = views[np.argmax([_room(world, view) for view in views])]
    return render_frames(world, chosen[None], height, width)[0].astype(np.float32)


def _room(world: World, view: np.ndarray) -> float:
    """Distance of the first three units before a camera from the nearest object."""
    ahead = np.linspace(0, 3, 7)[:, None] * (np.cos(view[2]), np.sin(view[2])) + view[:2]
    return float(world.clearance(ahead).min())


def render_puppet(
    points: np.ndarray, body: Body, look: int, tint: np.ndarray, place: np.ndarray, theme: int
) -> np.ndarray:
    """Render a figure, uint8 (frames, height, width, 3).

    Args:
        points: Keypoints (frames, 14, 2) in shares of the image's width and height.
        look: Index into LOOKS.
        tint: (3,) gain of the figure's colours.
        place: The `backdrop`, whose size the video has; its theme gives the shadow's colour.
    """
    height, width, _ = place.shape
    at = (points * (width, height)).astype(np.float32)
    video = np.empty((len(at), height, width, 3), np.uint8)
    for start in range(0, len(at), CHUNK):
        chunk = at[start : start + CHUNK]
        image = np.broadcast_to(place, (len(chunk), height, width, 3)).copy()
        _shadow(image, chunk, THEMES[theme].shadow)
        for strokes, outlined in _figure(chunk, body, LOOKS[look], height):
            _paint(image, strokes, tint, OUTLINE * height if outlined else 0.0)
        image += 0.5
        np.clip(image, 0, 255, out=image)
        video[start : start + CHUNK] = image.astype(np.uint8)
    return video


def _figure(
    at: np.ndarray, body: Body, look: Look, height: int
) -> Iterable[tuple[list[Stroke], bool]]:
    """Yield groups of strokes from back to front, and whether a group has an outline."""
    unit, girth = float(height), look.girth
    neck, hip = at[:, 1], (at[:, 8] + at[:, 11]) / 2
    down = hip - neck
    across = np.stack([-down[:, 1], down[:, 0]], axis=-1) * -1
    chest = (neck, across, down)
    up = at[:, 0] - neck
    up = up / np.maximum(np.linalg.norm(up, axis=1, keepdims=True), 1e-6) * (body.head * unit)
    head = (at[:, 0], np.stack([-up[:, 1], up[:, 0]], axis=-1), up)

    yield _marks(look.behind, chest), True
    for hip_point in (8, 11):
        thick = 0.037 * girth * unit
        knee, ankle = at[:, hip_point + 1], at[:, hip_point + 2]
        toe = ankle + np.float32((-0.016 if hip_point == 8 else 0.016, 0.004)) * unit
        yield (
            [
                Stroke(ankle, toe, (0.034 * unit, 0.032 * unit), look.shoes),
                Stroke(at[:, hip_point], knee, (thick, 0.9 * thick), look.trousers),
                Stroke(knee, ankle, (0.9 * thick, 0.75 * thick), look.trousers),
            ],
            True,
        )
    yield _marks(look.hair, head), True
    wide = 0.8 * body.shoulders * girth * unit
    low = hip - 0.12 * down
    yield [Stroke(neck + 0.24 * down, low, (wide, look.skirt * wide), look.coat)], True
    yield _marks(look.chest, chest), False
    yield [Stroke(at[:, 0], at[:, 0], (body.head * unit,) * 2, look.skin)], True
    yield _marks(look.face, head), False
    yield _marks(look.hat, head), True
    for shoulder in (2, 5):
        thick, hand = 0.031 * girth * unit, look.hands or look.skin
        elbow, wrist = at[:, shoulder + 1], at[:, shoulder + 2]
        yield (
            [
                Stroke(at[:, shoulder], elbow, (thick, 0.92 * thick), look.sleeves),
                Stroke(elbow, wrist, (0.92 * thick, 0.85 * thick), look.sleeves),
                Stroke(wrist, wrist, (0.035 * unit, 0.035 * unit), hand),
            ],
            True,
        )


def _marks(marks: Iterable[Mark], frame: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[Stroke]:
    """Place marks in the frame of a part of the body: (origin, across, along), (frames, 2) each."""
    origin, across, along = frame
    size = float(np.linalg.norm(along, axis=1).mean())

    def place(point: tuple[float, float]) -> np.ndarray:
        return origin + point[0] * across + point[1] * along

    return [
        Stroke(place(m.a), place(m.b), (m.radii[0] * size, m.radii[1] * size), m.colour)
        for m in marks
    ]


def _paint(image: np.ndarray, strokes: Sequence[Stroke], tint: np.ndarray, outline: float) -> None:
    """Paint strokes on images (frames, height, width, 3), first the outline of all of them."""
    found = [(stroke, _nearness(image, stroke, outline + 1)) for stroke in strokes]
    if outline:
        for _, (window, inside, _, _) in found:
            _blend(image[window], np.clip(inside + outline + 0.5, 0, 1), np.float32(INK))
    for stroke, (window, inside, normal_x, normal_y) in found:
        if outline:
            depth = np.sqrt(np.maximum(0, 1 - normal_x * normal_x - normal_y * normal_y))
            lit = LIGHT[0] * normal_x + LIGHT[1] * normal_y + LIGHT[2] * depth
            shade = (0.72 + 0.42 * np.maximum(0, lit))[..., None]
        else:
            shade = np.float32(1)
        colour = np.float32(stroke.colour) * np.float32(tint) * shade
        _blend(image[window], np.clip(inside + 0.5, 0, 1), colour)


def _nearness(image: np.ndarray, stroke: Stroke, margin: float):
    """Window of the images that a stroke touches; in it, how far pixels are inside, in pixels, and
    where they are across the stroke, as shares (x, y) of its radius."""
    height, width = image.shape[1:3]
    reach = max(stroke.radii) + margin
    ends = np.stack([stroke.a, stroke.b])
    left, top = np.maximum(np.floor(ends.min(axis=(0, 1)) - reach), 0).astype(int)
    right, bottom = np.maximum(np.ceil(ends.max(axis=(0, 1)) + reach), 0).astype(int)
    window = (slice(None), slice(top, bottom), slice(left, right))
    x = np.arange(left, min(right, width), dtype=np.float32) + 0.5
    y = (np.arange(top, min(bottom, height), dtype=np.float32) + 0.5)[:, None]
    (ax, ay), (bx, by) = stroke.a.T[..., None, None], stroke.b.T[..., None, None]
    dx, dy, along_x, along_y = x - ax, y - ay, bx - ax, by - ay
    length = np.maximum(along_x * along_x + along_y * along_y, 1e-6)
    share = np.clip((dx * along_x + dy * along_y) / length, 0, 1)
    dx, dy = dx - share * along_x, dy - share * along_y
    radius = np.float32(stroke.radii[0]) + share * np.float32(stroke.radii[1] - stroke.radii[0])
    return window, radius - np.hypot(dx, dy), dx / radius, dy / radius


def _shadow(image: np.ndarray, at: np.ndarray, colour: Sequence[int]) -> None:
    """Darken the ground under the figure, the less the higher it is."""
    height, width = image.shape[1:3]
    x = np.arange(width, dtype=np.float32) + 0.5
    y = (np.arange(height, dtype=np.float32) + 0.5)[:, None]
    feet = at[:, [10, 13]]
    above = np.maximum(0, GROUND * height - feet[..., 1].max(axis=1)) / height
    middle = feet[..., 0].mean(axis=1)[:, None, None]
    wide = (0.13 * height + np.abs(feet[:, 0, 0] - feet[:, 1, 0]) / 2)[:, None, None]
    away = np.hypot((x - middle) / wide, (y - GROUND * height) / (0.035 * height))
    cover = np.clip(1.15 - away, 0, 1) * np.maximum(0.2, 0.6 - 3 * above)[:, None, None]
    _blend(image, cover, np.float32(colour))


def _blend(image: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> None:
    """Mix a colour into images (frames, h, w, 3), by a share (frames, h, w)."""
    image += cover[..., None] * (colour - image)
