"""Skeletons drawn from whole-body keypoints."""

import numpy as np

from aapt.data.videos.skeletons import draw_skeletons

from .test_keypoints import person


def draw(*people, size=(96, 64)):
    return draw_skeletons(people, *size, min_score=0.3).astype(int)


def test_a_limb_has_its_colour_and_its_place():
    """The right upper arm, COCO 6 to 8, is OpenPose's third limb: orange, dimmed to 0.6."""
    image = draw(person({6: (20, 16), 8: (20, 48)}))
    assert image.shape == (64, 96, 3)
    assert abs(image[32, 20] - (153, 102, 0)).max() <= 2
    assert abs(image[16, 20] - (255, 170, 0)).max() < 60  # the shoulder's dot is orange too
    lit = np.argwhere(image.any(axis=2))
    assert lit.min(axis=0).tolist() >= [14, 17] and lit.max(axis=0).tolist() <= [50, 22]


def test_the_neck_lies_between_the_shoulders():
    image = draw(person({5: (60, 20), 6: (40, 20)}))
    assert image[20, 42:58].any(axis=1).all()
    left = person({5: (60, 20)})
    left[6] = (40, 20, 0.1)  # unsure: no neck, no collar bone
    assert not draw(left)[20, 42:58].any()


def test_faces_are_white_and_hands_are_coloured():
    face = draw(person({30: (20, 20), 60: (30, 30)}))
    assert face[20, 20].min() > 0 and np.ptp(face, axis=2).max() == 0
    for wrist in (91, 112):
        hand = draw(person({wrist: (50, 30), wrist + 1: (50, 50)}), size=(96, 320))
        assert hand[40, 48:52].sum() > 0 and (hand[..., 0] >= hand[..., 2]).all()


def test_unsure_points_are_left_out():
    points = {6: (20, 16), 8: (20, 48)}
    assert not draw(person(points, score=0.29)).any() and draw(person(points, score=0.31)).any()


def test_nobody_is_black():
    assert draw().shape == (64, 96, 3) and not draw().any()


def test_people_past_the_edge_are_drawn_as_far_as_they_are_seen():
    image = draw(person({6: (20, 16), 8: (20, 90)}))
    assert image[60, 19:21].any()
    wild = draw(person({6: (20, 16), 8: (1e30, -1e30)}))
    assert wild[16, 20].any() and not wild[:, 40:].any()


def test_later_people_are_drawn_over_earlier():
    across, down = person({6: (10, 32), 8: (80, 32)}), person({13: (40, 5), 15: (40, 60)})
    assert abs(draw(across, down)[32, 40] - draw(down)[32, 40]).max() == 0
    assert abs(draw(down, across)[32, 40] - draw(across)[32, 40]).max() == 0
