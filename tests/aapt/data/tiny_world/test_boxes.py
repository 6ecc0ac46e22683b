"""Boxes of objects, against the projection of a pinhole camera by hand."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from aapt.data.tiny_world.boxes import CLASSES, object_boxes
from aapt.data.tiny_world.world import CELL, Object, World

HEIGHT, WIDTH = 80, 128
FOCAL, EYE = 64, 0.6  # of a right angle over 128 columns, and of the camera over the ground
SOFT = 1.5  # pixels: edges cover pixels in part
AHEAD = torch.zeros(3, dtype=torch.float64)  # at the origin, along x; y grows to the right


@dataclass(frozen=True)
class Placed(World):
    """A world with the given objects alone."""

    placed: tuple[Object, ...] = ()

    def objects(self, low, high):
        return iter(self.placed)


def block(x, y, half=0.5, height=1.2):
    return Object(x, y, half, half, height, False, (int(x // CELL), int(y // CELL)))


def column(x, y, radius=0.4, height=1.4):
    return Object(x, y, radius, radius, height, True, (int(x // CELL), int(y // CELL)))


def boxes(*placed, pose=AHEAD, theme=1):
    world = Placed(seed=0, theme=theme, tint=np.ones(3), placed=placed)
    return object_boxes(world, pose, HEIGHT, WIDTH)


def projected(near, left, right, top):
    """Corners of a face at the depth `near`, from `left` to `right`, up to the height `top`."""
    across = [WIDTH / 2 + FOCAL * side / near for side in (left, right)]
    rows = [HEIGHT / 2 + FOCAL * (EYE - height) / near for height in (top, 0)]
    return torch.tensor([across[0], rows[0], across[1], rows[1]])


def test_a_block_straight_ahead():
    found = boxes(block(4, 0))
    expected = projected(3.5, -0.5, 0.5, 1.2)
    assert found.corners.shape == (1, 4) and [CLASSES[c] for c in found.classes] == ["block"]
    assert (found.corners[0] - expected).abs().max() <= SOFT


def test_right_is_right_and_turning_moves_the_box():
    (right,) = boxes(block(4, 1)).corners
    # Its left side is in view: the box begins at the corner behind.
    expected = torch.stack([projected(4.5, 0.5, 1.5, 1.2)[0], *projected(3.5, 0.5, 1.5, 1.2)[1:]])
    assert (right - expected).abs().max() <= SOFT
    turned = torch.tensor([0, 0, np.pi / 2], dtype=torch.float64)
    (moved,) = boxes(block(-1, 4), pose=turned).corners
    assert torch.equal(moved, right)


def test_every_theme_has_round_objects():
    for theme in range(6):
        found = boxes(column(4, 0), theme=theme)
        assert [CLASSES[c] for c in found.classes] == ["round"], theme
        left, top, right, bottom = found.corners[0].tolist()
        assert abs(left + right - WIDTH) <= SOFT and bottom > HEIGHT / 2 > top


def test_what_another_object_hides_is_outside():
    near, far = block(2.6, 0, half=0.6), block(6, 1.8, half=0.5, height=1.0)
    (alone,) = boxes(far).corners
    found = boxes(near, far)
    assert len(found.corners) == 2
    visible = min(found.corners.tolist(), key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    edge = projected(2.0, -0.6, 0.6, 1.2)[2]
    assert abs(visible[0] - edge) <= SOFT and abs(visible[2] - alone[2]) <= SOFT
    behind = block(6, 0, half=0.5, height=0.9)
    assert len(boxes(near, behind).corners) == 1


@pytest.mark.parametrize(
    "away", [block(11, 0, half=1.0, height=1.9), block(-4, 0), block(4, 9), column(9.9, 0, 0.2)]
)
def test_objects_far_behind_beside_and_small_have_no_box(away):
    found = boxes(away)
    assert found.corners.shape == (0, 4) and found.classes.shape == (0,)


def test_an_empty_world():
    assert boxes().corners.shape == (0, 4)
