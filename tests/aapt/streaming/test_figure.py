"""A figure that moves towards a goal: smooth, at a limited speed, without a state of its own."""

import numpy as np
import pytest

from aapt import Pose
from aapt.model.pose import FAR, LIMBS
from aapt.streaming.figure import MOVE, TURN, PoseGoal, next_pose
from aapt.streaming.poses import PRESETS, load_poses

STILL = load_poses("still").first.points[0]
ROUNDED = 1e-4  # twice what rounding changes
WRIST, ELBOW, SHOULDER = 4, 3, 2


def moved(point, x, y, base=STILL):
    points = base.copy()
    points[point, :2] += x, y
    return points


def play(goal, steps, before=STILL, fps=24, aspect=1.0, first=1):
    """All frames of some steps, and the pose after them."""
    made = []
    for step in range(first, first + steps):
        pose = next_pose(before, goal, step, 4, fps, aspect)
        made.append(pose.points)
        before = pose.points[-1]
    return np.concatenate(made), before


def lengths(points, aspect=1.0):
    places = points[..., :2] * (aspect, 1)
    return np.stack(
        [np.linalg.norm(places[..., b, :] - places[..., a, :], axis=-1) for a, b in LIMBS]
    )


def test_a_pose_that_is_near_is_reached_in_even_parts_with_the_last_frame():
    target = moved(WRIST, -0.02, -0.01)
    frames, _ = play(PoseGoal(Pose(target[None])), 1)
    for number, points in enumerate(frames, start=1):
        straight = STILL + number / 4 * (target - STILL)
        assert np.abs(points - straight).max() < 5e-4  # an arc of a few hundredths of a radian
    assert np.abs(frames[-1] - target).max() < ROUNDED
    rest, _ = play(PoseGoal(Pose(target[None])), 2, before=frames[-1])
    assert np.abs(rest - target).max() < ROUNDED


def test_without_a_goal_the_figure_holds_the_pose_it_has():
    frames, _ = play(PoseGoal(), 3)
    assert (frames == STILL).all()


@pytest.mark.parametrize("aspect", [1.0, 1.6])
def test_limbs_keep_their_lengths_and_turn_at_a_limited_speed(aspect):
    """The arm is thrown from one side to the other: on straight lines it would shrink."""
    target = STILL.copy()
    arm = (target[[ELBOW, WRIST]] - target[SHOULDER]) * (-1, -1, 0)
    target[[ELBOW, WRIST], :2] = target[SHOULDER, :2] + arm[:, :2]
    frames, _ = play(PoseGoal(Pose(target[None])), 3, aspect=aspect)
    assert np.abs(frames[-1] - target).max() < ROUNDED
    assert np.abs(lengths(frames, aspect) - lengths(STILL, aspect)[:, None]).max() < 3 * ROUNDED
    upper = (frames[:, ELBOW, :2] - frames[:, SHOULDER, :2]) * (aspect, 1)
    angles = np.unwrap(np.arctan2(*upper.T))
    assert np.abs(np.diff(angles)).max() < TURN / 24 + 5e-3
    assert abs(angles[-1] - np.arctan2(*((STILL[ELBOW] - STILL[SHOULDER])[:2] * (aspect, 1)))) > 3


def test_the_whole_figure_moves_at_a_limited_speed():
    target = STILL.copy()
    target[:, 0] += 0.3
    frames, end = play(PoseGoal(Pose(target[None])), 1)
    assert np.allclose(frames[:, 8, 0] - STILL[8, 0], np.arange(1, 5) * MOVE / 24, atol=ROUNDED)
    frames, _ = play(PoseGoal(Pose(target[None])), 4, before=end)
    assert np.abs(frames[-1] - target).max() < ROUNDED


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("fps", [24, 240])
def test_a_motion_is_that_of_its_file_once_the_figure_has_caught_up(name, fps):
    """Two seconds are enough from any pose; the phase is the stream's time."""
    steps, first = fps, 8
    frames, _ = play(PoseGoal(motion=name), steps, fps=fps, first=first)
    script = load_poses(name)
    times = (4 * (first - 1) + 1 + np.arange(len(frames))) / fps
    expected = np.stack([script.at(time) for time in times])
    late = np.abs(frames - expected).max(axis=(1, 2)) > ROUNDED
    assert not late[fps:].any()


def test_long_limbs_that_swing_out_of_the_image_stay_within_the_limits_of_a_pose():
    """All points are in corners of the image, so that arms are longer than it."""
    corners, before, furthest = np.random.default_rng(0), STILL, 0.0
    for _ in range(30):
        target = np.ones((14, 3))
        target[:, :2] = corners.integers(0, 2, (14, 2))
        frames, before = play(PoseGoal(Pose(target[None])), 1, before=before)
        furthest = max(furthest, np.abs(frames[..., :2] - 0.5).max())
    assert furthest == 0.5 + FAR
    frames, _ = play(PoseGoal(motion="walk"), 12, before=before)
    assert np.abs(frames[-1] - load_poses("walk").at(48 / 24)).max() < ROUNDED


def test_a_step_needs_the_last_pose_alone():
    """Played in one go, and resumed in the middle from its last pose."""
    frames, _ = play(PoseGoal(motion="dance"), 20)
    _, middle = play(PoseGoal(motion="dance"), 11)
    rest, _ = play(PoseGoal(motion="dance"), 9, before=middle, first=12)
    assert np.array_equal(rest, frames[44:])


def test_hidden_points_are_those_of_the_target():
    target = moved(WRIST, 0.02, 0.0)
    target[ELBOW] = 0
    frames, _ = play(PoseGoal(Pose(target[None])), 1)
    assert (frames[:, ELBOW] == 0).all() and (frames[:, WRIST, 2] == 1).all()
    assert np.allclose(frames[:, WRIST, 0] - STILL[WRIST, 0], [0.005, 0.01, 0.015, 0.02], atol=1e-4)
    back, _ = play(PoseGoal(Pose(STILL[None])), 1, before=frames[-1])
    assert np.abs(back[:, ELBOW] - STILL[ELBOW]).max() < ROUNDED  # seen again in its place
