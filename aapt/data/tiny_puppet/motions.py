"""Motions of the puppet: joint angles over time, and the keypoints of a body that follows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...model.pose import POINTS

# Joints, one column each. Lengths are in image heights, angles in radians: of the torso and the
# head from the upright, to the right of the image; of arms and legs from hanging down, outwards.
# Elbows and knees turn the lower limb further outwards. Shares shorten a thigh that points at the
# camera.
SWAY, LIFT, LEAN, NOD = range(4)
ARMS = ((4, 5), (6, 7))  # (shoulder, elbow) of the right and of the left arm
LEGS = ((8, 9, 10), (11, 12, 13))  # (hip, knee, shortening of the thigh)
JOINTS = 14
SIDES = (-1, 1)  # of the image: the figure faces the camera, its right is at the left
GROUND = 0.9  # height in the image of the soles of a figure that stands
FADE = 0.5  # seconds from one motion to the next
SECONDS = (1.6, 3.4)  # of a motion


@dataclass(frozen=True)
class Body:
    """Proportions of a figure, in image heights; `head` is a radius, `hips` and `shoulders` are
    half widths."""

    head: float = 0.112
    neck: float = 0.126  # from the neck to the head's centre
    shoulders: float = 0.076
    torso: float = 0.168
    hips: float = 0.047
    arm: float = 0.106  # of the upper arm; the forearm has 0.95 of it
    leg: float = 0.116  # of the thigh, and of the shin


def sample_body(rng: np.random.Generator) -> Body:
    """Draw proportions near the usual ones."""
    usual = Body()
    size = rng.uniform(0.92, 1.04)
    lengths = {
        name: size * getattr(usual, name) * rng.uniform(0.93, 1.07)
        for name in ("head", "neck", "shoulders", "torso", "hips", "arm", "leg")
    }
    return Body(**lengths)


def keypoints(joints: np.ndarray, body: Body, aspect: float) -> np.ndarray:
    """Place the points of a body, (frames, 14, 2) in shares of the image's width and height.

    joints: (frames, JOINTS). aspect: the image's width over its height. The lower foot stands on
    the ground, `LIFT` above it.
    """
    count = len(joints)
    found = np.zeros((count, len(POINTS), 2))

    def along(angle: np.ndarray, length: np.ndarray | float) -> np.ndarray:
        return np.stack([np.sin(angle), np.cos(angle)], axis=-1) * np.reshape(length, (-1, 1))

    lean, nod = joints[:, LEAN], joints[:, NOD]
    up = -along(-lean, 1.0)  # of the torso
    across = np.stack([-up[:, 1], up[:, 0]], axis=-1)
    found[:, 1] = body.torso * up
    found[:, 0] = found[:, 1] - along(-(lean + nod), body.neck)
    for side, arm, leg, first, hip in zip(SIDES, ARMS, LEGS, (2, 5), (8, 11)):
        shoulder, elbow = joints[:, arm[0]], joints[:, arm[1]]
        found[:, first] = found[:, 1] + side * body.shoulders * across - 0.018 * up
        found[:, first + 1] = found[:, first] + along(side * shoulder, body.arm)
        lower = along(side * (shoulder + elbow), 0.95 * body.arm)
        found[:, first + 2] = found[:, first + 1] + lower
        thigh, knee, share = (joints[:, column] for column in leg)
        found[:, hip] = side * body.hips * across
        found[:, hip + 1] = found[:, hip] + along(side * thigh, body.leg * share)
        found[:, hip + 2] = found[:, hip + 1] + along(side * (thigh + knee), body.leg)
    lowest = np.maximum(found[:, 10, 1], found[:, 13, 1])
    found[..., 1] += (GROUND - 0.026 - joints[:, LIFT] - lowest)[:, None]
    found[..., 0] = 0.5 + (found[..., 0] + joints[:, SWAY, None]) / aspect
    return found


def _rest(t: np.ndarray) -> np.ndarray:
    """A figure that stands with its arms a little away from the body."""
    joints = np.zeros((len(t), JOINTS))
    for shoulder, elbow in ARMS:
        joints[:, shoulder], joints[:, elbow] = 0.3, -0.1
    for hip, _, share in LEGS:
        joints[:, hip], joints[:, share] = 0.06, 1.0
    return joints


def _still(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stands and breathes."""
    joints, phase = _rest(t), rng.uniform(0, 2 * math.pi)
    breath = np.sin(2 * math.pi * 0.4 * t + phase)
    joints[:, SWAY], joints[:, NOD] = 0.006 * breath, 0.05 * breath
    for shoulder, _ in ARMS:
        joints[:, shoulder] += 0.04 * breath
    return joints


def _walk(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Walks in place: knees and opposite arms in turn."""
    joints, rate = _rest(t), rng.uniform(0.8, 1.3)
    beat = 2 * math.pi * (rate * t + rng.uniform())
    high, swing = rng.uniform(0.3, 0.55), rng.uniform(0.25, 0.5)
    for side, (hip, knee, share), (shoulder, elbow) in zip(SIDES, LEGS, ARMS):
        step = np.maximum(0, side * np.sin(beat)) ** 0.8
        joints[:, share] -= high * step
        joints[:, hip] += 0.12 * step
        joints[:, knee] -= 0.16 * step
        joints[:, shoulder] += 0.1 - swing * 0.5 * side * np.sin(beat)
        joints[:, elbow] += 0.3 + swing * np.maximum(0, -side * np.sin(beat))
    joints[:, SWAY] = 0.012 * np.sin(beat)
    joints[:, LEAN] = 0.05 * np.sin(beat)
    return joints


def _wave(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Waves with one hand, or with both."""
    joints, rate = _still(t, rng), rng.uniform(1.2, 2.0)
    both, chosen = rng.uniform() < 0.25, int(rng.integers(2))
    high, phase = rng.uniform(1.7, 2.3), rng.uniform(0, 2 * math.pi)
    for number, (shoulder, elbow) in enumerate(ARMS):
        if both or number == chosen:
            joints[:, shoulder] = high
            joints[:, elbow] = 0.55 + 0.6 * np.sin(2 * math.pi * rate * t + phase)
    joints[:, NOD] += 0.12 * SIDES[chosen]
    return joints


def _dance(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bends its knees to a beat, swings its hips and throws its arms about."""
    joints, rate = _rest(t), rng.uniform(0.8, 1.1)
    beat = 2 * math.pi * (rate * t + rng.uniform())
    low, wide = rng.uniform(0.25, 0.5), rng.uniform(0.9, 1.5)
    together = 1 if rng.uniform() < 0.5 else -1
    joints[:, SWAY] = 0.045 * np.sin(beat)
    joints[:, LEAN] = -0.16 * np.sin(beat)
    joints[:, NOD] = 0.22 * np.sin(beat)
    dip = 0.5 - 0.5 * np.cos(2 * beat)
    for side, (hip, knee, _), (shoulder, elbow) in zip(SIDES, LEGS, ARMS):
        turn = side if together < 0 else 1
        joints[:, hip] += low * (0.5 + dip)
        joints[:, knee] -= 1.6 * low * (0.5 + dip)
        joints[:, shoulder] = 1.3 + 0.6 * wide * turn * np.sin(beat)
        joints[:, elbow] = 0.7 * turn * np.sin(beat + 0.6)
    return joints


def _jump(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crouches and jumps, again and again, with its arms thrown up."""
    joints, rate = _rest(t), rng.uniform(0.65, 0.9)
    place = (rate * t + rng.uniform()) % 1.0
    high, spread = rng.uniform(0.06, 0.1), rng.uniform(0.0, 0.6)
    flight = np.clip((place - 0.4) / 0.5, 0, 1)
    air = 4 * flight * (1 - flight)
    throw = np.sin(math.pi * np.clip((place - 0.25) / 0.75, 0, 1)) ** 2
    crouch = np.sin(math.pi * np.clip(place / 0.45, 0, 1)) ** 2
    joints[:, LIFT] = high * air
    for (hip, knee, _), (shoulder, elbow) in zip(LEGS, ARMS):
        joints[:, hip] += 0.6 * crouch + spread * air
        joints[:, knee] -= 1.2 * crouch
        joints[:, shoulder] += 2.1 * throw
        joints[:, elbow] += 0.4 * crouch
    return joints


def _reach(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stretches an arm towards one place after the other, and leans after it."""
    joints, chosen = _still(t, rng), int(rng.integers(2))
    shoulder, elbow = ARMS[chosen]
    joints[:, shoulder] = 1.5 + 0.9 * _wander(t, rng, 0.45)
    joints[:, elbow] = 0.25 * _wander(t, rng, 0.6)
    joints[:, LEAN] = SIDES[chosen] * (0.13 + 0.1 * _wander(t, rng, 0.4))
    hip, knee, _ = LEGS[1 - chosen]
    joints[:, hip] += 0.12
    hip, knee, _ = LEGS[chosen]
    joints[:, hip] += 0.3
    joints[:, knee] -= 0.4
    return joints


def _free(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves every joint smoothly and at random."""
    joints = _rest(t)
    joints[:, SWAY] = 0.05 * _wander(t, rng, 0.5)
    joints[:, LEAN] = 0.15 * _wander(t, rng, 0.5)
    joints[:, NOD] = 0.2 * _wander(t, rng, 0.6)
    for (hip, knee, _), (shoulder, elbow) in zip(LEGS, ARMS):
        joints[:, shoulder] = 1.35 + 1.2 * _wander(t, rng, 0.5)
        joints[:, elbow] = 1.1 * _wander(t, rng, 0.7)
        joints[:, hip] = 0.28 + 0.25 * _wander(t, rng, 0.5)
        joints[:, knee] = -0.3 + 0.3 * _wander(t, rng, 0.5)
    return joints


def _wander(t: np.ndarray, rng: np.random.Generator, rate: float) -> np.ndarray:
    """A smooth random path in about [-1, 1] with frequencies around `rate` per second."""
    waves = [
        np.sin(2 * math.pi * (rate * factor * t + rng.uniform())) for factor in (0.6, 1.0, 1.5)
    ]
    return np.sum(waves, axis=0) / 2


MOTIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "still": _still,
    "walk": _walk,
    "wave": _wave,
    "dance": _dance,
    "jump": _jump,
    "reach": _reach,
    "free": _free,
}
CHANCES = (0.05, 0.19, 0.16, 0.19, 0.14, 0.12, 0.15)  # of MOTIONS, in their order


def sample_joints(
    seconds: np.ndarray, rng: np.random.Generator, motion: str | None = None
) -> np.ndarray:
    """Draw motions one after the other, each faded into the next: (frames, JOINTS).

    seconds: rising times of the video frames. motion: one of MOTIONS for all of them; None for
    random ones. The start of a sequence is independent of its length.
    """
    names, joints, at = list(MOTIONS), None, 0.0
    while joints is None or at < seconds[-1]:
        name = motion or names[int(rng.choice(len(names), p=CHANCES))]
        made = MOTIONS[name](seconds, rng)
        if joints is None:
            joints = made
        else:
            share = np.clip((seconds - at) / FADE, 0, 1)[:, None]
            joints += (share * share * (3 - 2 * share)) * (made - joints)
        at += rng.uniform(*SECONDS)
    return joints
