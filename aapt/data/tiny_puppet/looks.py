"""Looks of the puppet: colours, clothes and the strokes that make hats and faces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

Colour = tuple[int, int, int]
INK = (44, 34, 54)  # of outlines, eyes and mouths
WHITE = (250, 250, 246)


class Mark(NamedTuple):
    """A stroke with round ends in the frame of a part of the body.

    a, b: ends (across to the right of the image, along). On the head the unit is its radius and
    along is upwards, from its centre; on the chest it is the torso's length and along is downwards,
    from the neck. radii: at both ends, in the same unit.
    """

    a: tuple[float, float]
    b: tuple[float, float]
    radii: tuple[float, float]
    colour: Colour


def dot(x: float, y: float, radius: float, colour: Colour) -> Mark:
    """Return a round mark."""
    return Mark((x, y), (x, y), (radius, radius), colour)


EYES = (
    dot(-0.38, -0.08, 0.16, INK),
    dot(0.38, -0.08, 0.16, INK),
    Mark((-0.24, -0.44), (0, -0.56), (0.07, 0.07), (190, 72, 72)),
    Mark((0, -0.56), (0.24, -0.44), (0.07, 0.07), (190, 72, 72)),
)
CHEEKS = (dot(-0.6, -0.36, 0.16, (246, 150, 130)), dot(0.6, -0.36, 0.16, (246, 150, 130)))


@dataclass(frozen=True)
class Look:
    """One character.

    Attributes:
        name: ASCII word of at most 9 bytes, for prompts.
        skin, coat, sleeves, trousers, shoes: Colours of head and hands, torso, arms, legs and feet.
        hands: Colour of the hands; None for the skin's.
        behind: Marks on the chest that are painted before the figure, such as a backpack.
        chest: Marks on the chest.
        face: Marks on the head.
        hat: Marks on the head, outlined, above face and hair.
        hair: Marks on the head that are painted before it, outlined.
        girth: Thickness of torso and limbs, 1 for the usual one.
        skirt: Width of the coat at the hips, relative to the shoulders.
    """

    name: str
    skin: Colour
    coat: Colour
    sleeves: Colour
    trousers: Colour
    shoes: Colour
    hands: Colour | None = None
    behind: tuple[Mark, ...] = ()
    chest: tuple[Mark, ...] = ()
    face: tuple[Mark, ...] = EYES + CHEEKS
    hat: tuple[Mark, ...] = ()
    hair: tuple[Mark, ...] = ()
    girth: float = 1.0
    skirt: float = 0.85


LOOKS: tuple[Look, ...] = (
    Look(
        name="wizard",
        skin=(246, 208, 176),
        coat=(112, 74, 190),
        sleeves=(132, 92, 210),
        trousers=(74, 52, 134),
        shoes=(58, 40, 96),
        chest=(Mark((-0.3, 0.78), (0.3, 0.78), (0.07, 0.07), (250, 208, 84)),),
        face=EYES[:2] + (Mark((0, -0.62), (0, -1.25), (0.55, 0.12), WHITE),),
        hat=(
            Mark((0, 0.85), (0.14, 2.0), (0.7, 0.1), (96, 58, 176)),
            Mark((-1.1, 0.62), (1.1, 0.62), (0.18, 0.18), (132, 92, 210)),
            dot(-0.05, 1.15, 0.2, (250, 208, 84)),
        ),
        skirt=1.25,
    ),
    Look(
        name="pirate",
        skin=(244, 196, 158),
        coat=(206, 58, 58),
        sleeves=(248, 244, 232),
        trousers=(58, 66, 98),
        shoes=(52, 42, 44),
        chest=(
            Mark((0, 0.08), (0, 0.62), (0.13, 0.13), (248, 244, 232)),
            Mark((-0.3, 0.8), (0.3, 0.8), (0.08, 0.08), (60, 44, 40)),
        ),
        face=(
            Mark((-0.85, 0.25), (0.85, -0.2), (0.06, 0.06), INK),
            dot(-0.36, -0.02, 0.27, INK),
            EYES[1],
            Mark((-0.15, -0.55), (0.3, -0.48), (0.07, 0.07), (150, 60, 60)),
        ),
        hat=(
            Mark((0, 0.95), (0, 1.15), (0.6, 0.4), (64, 56, 80)),
            Mark((-1.15, 0.9), (0, 0.72), (0.18, 0.28), (64, 56, 80)),
            Mark((0, 0.72), (1.15, 0.9), (0.28, 0.18), (64, 56, 80)),
            dot(0, 1.05, 0.24, WHITE),
        ),
    ),
    Look(
        name="gardener",
        skin=(250, 212, 178),
        coat=(86, 150, 222),
        sleeves=(246, 222, 110),
        trousers=(70, 124, 194),
        shoes=(150, 96, 58),
        chest=(
            Mark((-0.26, 0.05), (-0.2, 0.4), (0.07, 0.07), (56, 100, 164)),
            Mark((0.26, 0.05), (0.2, 0.4), (0.07, 0.07), (56, 100, 164)),
            dot(-0.2, 0.42, 0.08, (250, 214, 92)),
            dot(0.2, 0.42, 0.08, (250, 214, 92)),
        ),
        hair=(
            Mark((-0.75, 0.1), (-0.95, -0.9), (0.35, 0.2), (214, 104, 48)),
            Mark((0.75, 0.1), (0.95, -0.9), (0.35, 0.2), (214, 104, 48)),
        ),
        hat=(
            Mark((0, 0.8), (0, 1.05), (0.66, 0.56), (248, 216, 130)),
            Mark((-0.6, 0.74), (0.6, 0.74), (0.14, 0.14), (222, 90, 74)),
            Mark((-1.3, 0.6), (1.3, 0.6), (0.16, 0.16), (240, 202, 112)),
        ),
    ),
    Look(
        name="astronaut",
        skin=(240, 244, 250),
        coat=(232, 236, 244),
        sleeves=(232, 236, 244),
        trousers=(222, 228, 238),
        shoes=(250, 138, 60),
        hands=(250, 138, 60),
        behind=(
            Mark((-0.2, 0.2), (-0.2, 0.55), (0.36, 0.36), (146, 156, 176)),
            Mark((0.2, 0.2), (0.2, 0.55), (0.36, 0.36), (146, 156, 176)),
        ),
        chest=(
            Mark((-0.16, 0.42), (0.16, 0.42), (0.15, 0.15), (110, 126, 160)),
            dot(-0.14, 0.42, 0.07, (250, 90, 80)),
            dot(0.14, 0.42, 0.07, (110, 230, 140)),
        ),
        face=(
            Mark((-0.3, 0.0), (0.3, 0.0), (0.62, 0.62), (30, 44, 92)),
            Mark((-0.3, 0.24), (0.0, 0.32), (0.14, 0.1), (150, 200, 250)),
        ),
        hat=(dot(0.98, 0.0, 0.22, (250, 138, 60)), dot(-0.98, 0.0, 0.22, (250, 138, 60))),
        girth=1.2,
    ),
    Look(
        name="robot",
        skin=(120, 196, 198),
        coat=(94, 172, 176),
        sleeves=(176, 196, 204),
        trousers=(176, 196, 204),
        shoes=(72, 92, 112),
        hands=(250, 196, 76),
        chest=(
            Mark((-0.18, 0.42), (0.18, 0.42), (0.2, 0.2), (240, 246, 240)),
            dot(-0.16, 0.42, 0.1, (244, 92, 84)),
            dot(0.16, 0.42, 0.1, (250, 196, 76)),
        ),
        face=(
            Mark((-0.38, 0.08), (0.38, 0.08), (0.42, 0.42), (30, 54, 76)),
            dot(-0.34, 0.08, 0.19, (112, 250, 226)),
            dot(0.34, 0.08, 0.19, (112, 250, 226)),
            Mark((-0.28, -0.66), (0.28, -0.66), (0.08, 0.08), (48, 96, 108)),
        ),
        hat=(
            Mark((0, 0.95), (0, 1.45), (0.1, 0.1), (72, 92, 112)),
            dot(0, 1.6, 0.26, (244, 92, 84)),
            Mark((-0.98, -0.15), (-0.98, 0.15), (0.2, 0.2), (250, 196, 76)),
            Mark((0.98, -0.15), (0.98, 0.15), (0.2, 0.2), (250, 196, 76)),
        ),
        girth=1.1,
    ),
    Look(
        name="jester",
        skin=(252, 224, 202),
        coat=(240, 92, 130),
        sleeves=(74, 190, 170),
        trousers=(250, 206, 82),
        shoes=(214, 62, 96),
        chest=(
            dot(0, 0.25, 0.09, WHITE),
            dot(0, 0.5, 0.09, WHITE),
            dot(0, 0.75, 0.09, WHITE),
        ),
        face=EYES + CHEEKS + (dot(0, -0.22, 0.17, (236, 70, 70)),),
        hat=(
            Mark((-0.35, 0.85), (-1.05, 1.4), (0.5, 0.16), (240, 92, 130)),
            Mark((0.35, 0.85), (1.05, 1.4), (0.5, 0.16), (74, 190, 170)),
            Mark((-0.7, 0.6), (0.7, 0.6), (0.17, 0.17), (250, 206, 82)),
            dot(-1.2, 1.4, 0.24, (250, 206, 82)),
            dot(1.2, 1.4, 0.24, (250, 206, 82)),
        ),
    ),
)
