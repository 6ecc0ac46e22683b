"""RealEstate10K trajectories: reading, interpolation, their poses and rays."""

import math

import pytest
import torch

from aapt.data.tiny_world import world
from aapt.data.videos.sample import Skipped
from aapt.data.videos.trajectories import parse_trajectory, rotation_vectors, rotations
from aapt.model.conditioning import camera_rays, relative_poses, through_lens, trajectory_poses
from aapt.model.config import CameraConfig

LENS = (0.8, 1.4, 0.5, 0.5)


def line(seconds, camera_to_world, lens=LENS):
    """The line of one video frame, its matrix inverted by `torch.linalg`."""
    matrix = torch.linalg.inv(camera_to_world)[:3].flatten().tolist()
    return " ".join(map(repr, [round(seconds * 1e6), *lens, 0.0, 0.0, *matrix]))


def trajectory(cameras, fps=24, lens=LENS):
    lines = [line(n / fps, camera, lens) for n, camera in enumerate(cameras)]
    return "\n".join(["https://video", *lines, ""])


def yawed(angle, position=(0.0, 0.0, 0.0)):
    """Camera-to-world of a camera that has turned right by `angle`."""
    camera = torch.eye(4, dtype=torch.float64)
    camera[0, 0] = camera[2, 2] = math.cos(angle)
    camera[0, 2], camera[2, 0] = math.sin(angle), -math.sin(angle)
    camera[:3, 3] = torch.tensor(position)
    return camera


def controlled(frames):
    """Cameras moved by controls, and the pose of each camera relative to the camera before."""
    config = CameraConfig(world.FIELD_OF_VIEW, world.YAW_STEP, world.FORWARD_STEP, 1.0, 1.0)
    controls = torch.rand(frames, 2, dtype=torch.float64) * 2 - 1
    steps = relative_poses(controls, config)
    cameras = [yawed(0.7, (3.0, -1.0, 2.0))]
    for step in steps:
        cameras.append(cameras[-1] @ step)
    return cameras, steps


def test_a_trajectory_made_by_controls_gives_their_poses_back():
    cameras, steps = controlled(8)
    read = parse_trajectory(trajectory(cameras))
    times = torch.arange(9, dtype=torch.float64) / 24  # the file has them in whole microseconds
    poses = trajectory_poses(read.at(times))
    torch.testing.assert_close(poses, steps, atol=1e-5, rtol=0)
    torch.testing.assert_close(trajectory_poses(read.at(read.times)), steps, atol=1e-12, rtol=0)


def test_between_lines_the_camera_turns_and_moves_evenly():
    axis = torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64)
    cameras = [torch.eye(4, dtype=torch.float64) for _ in range(2)]
    cameras[1][:3, :3] = rotations(axis)
    cameras[1][:3, 3] = torch.tensor([2.0, 0.0, 4.0])
    read = parse_trajectory(trajectory(cameras, fps=4))
    between = read.at(torch.tensor([-1.0, 0.0, 0.0625, 0.125, 0.25, 9.0], dtype=torch.float64))
    for camera, share in zip(between, (0, 0, 0.25, 0.5, 1, 1)):
        torch.testing.assert_close(camera[:3, :3], torch.linalg.matrix_exp(share * cross(axis)))
        torch.testing.assert_close(camera[:3, 3], share * cameras[1][:3, 3])


def cross(vector):
    x, y, z = vector.tolist()
    return torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)


@pytest.mark.parametrize("angle", [0.0, 1e-14, 1e-7, 0.5, 1.5, 3.1])
def test_rotation_vectors_undo_rotations(angle):
    vector = torch.tensor([[0.6, 0.0, -0.8], [0.0, 1.0, 0.0]], dtype=torch.float64) * angle
    turned = rotations(vector)
    torch.testing.assert_close(rotation_vectors(turned), vector, atol=1e-13, rtol=1e-12)
    assert (turned.det() - 1).abs().max() < 1e-13


def test_rays_of_a_lens_by_hand():
    """One pixel of a clip of 640 x 320 whose lens is off its centre, in latents of 4 x 2."""
    fx, fy, cx, cy = lens = torch.tensor([0.8, 1.25, 0.45, 0.6], dtype=torch.float64)
    angle, position = 0.05, (0.02, -0.01, 0.03)
    pose = yawed(angle, position)
    camera = CameraConfig(1.1, 0.0, 0.0, 0.5, 0.25)  # the model's own lens must not matter
    poses = through_lens(pose.expand(1, 4, 4, 4), lens, camera, 2, 4)[None]
    rays = camera_rays(poses, camera, 2, 4)
    assert rays.shape == (1, 24, 1, 2, 4)
    column, row = 3, 0
    x, y = ((column + 0.5) / 4 - cx) / fx, ((row + 0.5) / 2 - cy) / fy  # at depth 1
    turned = [x * math.cos(angle) + math.sin(angle), y, -x * math.sin(angle) + math.cos(angle)]
    expected = [p / 0.5 for p in position]
    expected += [(a - b) / 0.25 for a, b in zip(turned, (x, y, 1.0))]
    for frame in range(4):
        got = rays[0, 6 * frame : 6 * frame + 6, 0, row, column]
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_the_models_own_lens_changes_nothing():
    camera = CameraConfig(1.2, 0.0, 0.0, 1.0, 1.0)
    fx = 0.5 / math.tan(0.6)
    lens = torch.tensor([fx, fx * 6 / 4, 0.5, 0.5], dtype=torch.float64)
    poses = torch.stack([yawed(0.1, (1.0, 2.0, 3.0)), yawed(-0.2)])
    torch.testing.assert_close(through_lens(poses, lens, camera, 4, 6), poses)


GOOD = trajectory([yawed(0.0), yawed(0.1), yawed(0.2)]).splitlines()


def replaced(number, index, word):
    words = GOOD[number].split()
    words[index] = word
    return [*GOOD[:number], " ".join(words), *GOOD[number + 1 :]]


BAD = [
    ([], "expected a title and two video frames or more, got 0"),
    (GOOD[:2], "expected a title and two video frames or more, got 1"),
    ([*GOOD, "1 2 3"], "line 5: expected 19 numbers, got 3"),
    (replaced(1, 3, "x"), "expected numbers: could not convert"),
    (replaced(2, 8, "nan"), "line 3: expected finite numbers"),
    (replaced(3, 0, "41667"), "line 4: expected a later timestamp than the line before"),
    (replaced(1, 1, "0"), "line 2: expected focal lengths above 0"),
    (replaced(2, 5, "0.1"), "line 3: expected no lens distortion"),
    (replaced(3, 2, "1.5"), "line 4: expected the lens of the first line"),
    (replaced(2, 7, "0.9"), "line 3: expected a rotation in the matrix"),
    (replaced(1, 7, "-1.0"), "line 2: expected a rotation in the matrix"),  # a mirror
    (
        trajectory([yawed(0.0), yawed(1.6)]).splitlines(),
        "line 3: expected a turn below 90 degrees since the line before",
    ),
]


@pytest.mark.parametrize("lines, expected", BAD)
def test_a_bad_file_says_which_line(lines, expected):
    with pytest.raises(Skipped) as skipped:
        parse_trajectory("\n".join(lines))
    assert skipped.value.reason == "bad camera" and skipped.value.detail.startswith(expected)


def test_a_file_without_a_title_keeps_its_first_line():
    read = parse_trajectory("\n".join(GOOD[1:]))
    assert read.times.tolist() == [0, 0.041667, 0.083333]
    with pytest.raises(Skipped, match="expected a title and two video frames or more, got 1"):
        parse_trajectory(GOOD[1])


@pytest.mark.parametrize("title", ["a", "1 2 3", " ".join(["word"] * 19)])
def test_every_other_first_line_is_a_title(title):
    assert len(parse_trajectory("\n".join([title, *GOOD[1:]])).times) == 3


def test_blank_lines_and_the_lens():
    read = parse_trajectory("\n\n".join(GOOD))
    assert read.times.tolist() == [0, 0.041667, 0.083333] and read.lens.tolist() == list(LENS)
