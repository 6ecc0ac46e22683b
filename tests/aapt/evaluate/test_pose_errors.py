"""Errors of keypoints and cameras, for motions whose errors are known by hand."""

import math

import pytest
import torch
from torch import nn

from aapt.commands.app import main
from aapt.data.tiny_world.world import relative_poses
from aapt.evaluate.pose_errors import (
    CameraErrors,
    KeypointErrors,
    camera_errors,
    keypoint_errors,
)
from aapt.evaluate.windows import WINDOWS
from aapt.evaluate.world_scenes import WorldScenes, held_out_starts
from aapt.streaming.generator import StreamingGenerator

from .test_evaluation import SMALL_DETECTOR, SMALL_PROBE, save_checkpoint
from .test_features import save

WINDOW = WINDOWS[0]
FRAMES = 1 + 4 * WINDOW.last


class Stub:
    """Scenes of a truth of `steps` latent frames, with these cameras."""

    def __init__(self, steps=WINDOW.last, cameras=None):
        self.steps, self._cameras = steps, cameras

    def cameras(self, window):
        return self._cameras


def turned(angle):
    """Cameras (F, 4, 4) at rest in one place that have turned by angles (F,) about y."""
    cameras = torch.eye(4, dtype=torch.float64).repeat(len(angle), 1, 1)
    cameras[:, 0, 0] = cameras[:, 2, 2] = angle.cos()
    cameras[:, 0, 2] = angle.sin()
    cameras[:, 2, 0] = -angle.sin()
    return cameras


def placed(positions):
    """Cameras (F, 4, 4) without rotation at positions (F, 3)."""
    cameras = torch.eye(4, dtype=torch.float64).repeat(len(positions), 1, 1)
    cameras[:, :3, 3] = positions
    return cameras


def walk(steps=9, seed=0):
    """Random cameras (1, F, 4, 4), each turned and moved a little from the one before."""
    random = torch.Generator().manual_seed(seed)
    cameras = [torch.eye(4, dtype=torch.float64)]
    for _ in range(steps):
        skew = 0.2 * torch.randn(3, 3, generator=random, dtype=torch.float64)
        step = torch.eye(4, dtype=torch.float64)
        step[:3, :3] = torch.linalg.matrix_exp(skew - skew.T)
        step[:3, 3] = torch.randn(3, generator=random, dtype=torch.float64)
        cameras.append(cameras[-1] @ step)
    return torch.stack(cameras)[None]


def test_a_camera_that_turns_half_again_as_far():
    """Frame i is off by half of its angle: 0.05 (0 + 1 + ... + 5)."""
    angles = 0.1 * torch.arange(6.0, dtype=torch.float64)
    found = camera_errors(turned(1.5 * angles)[None], turned(angles)[None])
    assert found["rotation_error"] == pytest.approx(0.05 * 15)
    assert found["translation_error"] == 0 and found["cameras_found"] == 1


def test_angles_up_to_half_a_turn():
    """An angle of pi is pi, and 1.5 pi is half a pi the other way."""
    found = camera_errors(
        turned(torch.tensor([0.0, math.pi, 1.5 * math.pi]))[None], turned(torch.zeros(3))[None]
    )
    assert found["rotation_error"] == pytest.approx(1.5 * math.pi, abs=1e-6)


def test_a_camera_that_walks_aside_instead_of_ahead():
    """At the share s of both ways the distance is s sqrt(2); both ways are scaled to length 1."""
    way = torch.arange(5.0, dtype=torch.float64)
    aside, ahead = torch.zeros(5, 3).double(), torch.zeros(5, 3).double()
    aside[:, 0], ahead[:, 2] = 3 * way, 0.5 * way
    found = camera_errors(placed(aside)[None], placed(ahead)[None])
    assert found["translation_error"] == pytest.approx(2 * sum((i / 4) ** 2 for i in range(5)))
    assert found["rotation_error"] == pytest.approx(0, abs=1e-6)


def test_an_estimators_world_and_unit_are_its_own():
    """A rigid motion of the world and another scale change nothing."""
    true = walk()
    other = walk(seed=1)[:, -1:]
    found = other @ true
    found[..., :3, 3] *= 7
    errors = camera_errors(found, true)
    assert errors["rotation_error"] == pytest.approx(0, abs=1e-5)
    assert errors["translation_error"] == pytest.approx(0, abs=1e-12)
    assert camera_errors(walk(seed=2), true)["translation_error"] > 0.1


def test_a_camera_that_rests_is_nowhere_else():
    """An estimator's noise is not blown up to length 1; a missed way has length 1."""
    still = placed(1e-9 * torch.randn(4, 3, dtype=torch.float64))[None]
    assert camera_errors(still, still.flip(1))["translation_error"] == 0
    ahead = placed(torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 0, 2]]).double())[None]
    assert camera_errors(still[:, :3], ahead)["translation_error"] == pytest.approx(0.25 + 1)


def test_clips_without_cameras_are_counted_and_left_out():
    """One clip of two is not found: half are, and the error is that of the other."""
    angles = torch.tensor([0.0, 0.2], dtype=torch.float64)
    true = turned(angles).repeat(2, 1, 1, 1)
    found = turned(2 * angles).repeat(2, 1, 1, 1)
    found[0, 1, 0, 3] = math.nan
    errors = camera_errors(found, true)
    assert errors["cameras_found"] == 0.5 and errors["rotation_error"] == pytest.approx(0.2)
    assert camera_errors(found[:1], true[:1]) == {"cameras_found": 0.0}


def test_keypoints_by_hand():
    """Distances 5 and 0, one keypoint missing, one that the truth does not have either."""
    real = torch.tensor([[[0.0, 0, 1], [10, 10, 0.9], [5, 5, 0.3], [7, 7, 0.1]]])
    made = torch.tensor([[[3.0, 4, 1], [10, 10, 0.5], [90, 90, 0.2], [0, 0, 1]]])
    found = keypoint_errors(made, real)
    assert found["akd_to_truth"] == pytest.approx(2.5)
    assert found["missing_keypoints"] == pytest.approx(1 / 3)


def test_no_keypoints_are_no_distance():
    nobody = torch.zeros(2, 4, 3)
    assert keypoint_errors(nobody, nobody) == {"akd_to_truth": None, "missing_keypoints": None}
    person = torch.ones(2, 4, 3)
    assert keypoint_errors(nobody, person) == {"akd_to_truth": None, "missing_keypoints": 1.0}


def test_the_worlds_cameras_are_those_of_its_poses(tmp_path):
    """Chained controls against the poses that the renderer was given, in two windows."""
    checkpoint = save_checkpoint(tmp_path / "a")
    generator = StreamingGenerator.from_pretrained(checkpoint)
    starts = held_out_starts(2, 40, seed=0)
    scenes = WorldScenes(starts, {checkpoint: generator}, SMALL_PROBE, tmp_path, SMALL_DETECTOR)
    for window in WINDOWS[:2]:
        found = scenes.cameras(window)
        for start, cameras in zip(starts, found, strict=True):
            camera, expected = torch.eye(4, dtype=torch.float64), []
            for step in relative_poses(start.poses[list(window.frames)]):
                expected.append(camera)
                camera = camera @ step
            expected.append(camera)
            torch.testing.assert_close(cameras, torch.stack(expected), rtol=0, atol=1e-5)
        assert found[..., :3, 3].norm(dim=-1).max() > 0.1


class Brightest(nn.Module):
    """Finds one keypoint: the brightest pixel of a frame, if it is bright."""

    def forward(self, frames: torch.Tensor):
        light = frames.float().sum(dim=1)
        best = light.flatten(1).max(dim=1)
        x = best.indices % light.shape[2]
        y = torch.div(best.indices, light.shape[2], rounding_mode="floor")
        return torch.stack([x.float(), y.float(), best.values / 765], dim=1)[:, None]


class RedTurns(nn.Module):
    """Reads a camera from the mean red of a frame, as a turn in hundredths of a radian."""

    def forward(self, clip: torch.Tensor):
        angle = clip[:, 0].mean(dim=(2, 3)) / 100
        zero, one = torch.zeros_like(angle), torch.ones_like(angle)
        rows = [angle.cos(), zero, angle.sin(), zero, zero, one, zero, zero]
        rows += [-angle.sin(), zero, angle.cos(), zero, zero, zero, zero, one]
        return torch.stack(rows, dim=-1).unflatten(-1, (4, 4))


class TooFew(RedTurns):
    def forward(self, clip: torch.Tensor):
        return torch.eye(4).repeat(1, 3, 1, 1)


class Flat(nn.Module):
    def forward(self, images: torch.Tensor):
        return images.float().flatten(1)


def test_keypoints_of_a_network(tmp_path):
    """A white pixel that is 3 to the right in every second frame."""
    network = KeypointErrors(save(tmp_path, Brightest()))
    truth = torch.zeros(2, FRAMES, 8, 12, 3, dtype=torch.uint8)
    made = truth.clone()
    truth[:, :, 4, 5] = 255
    made[:, ::2, 4, 8] = made[:, 1::2, 4, 5] = 255
    made[1, -1] = 0  # no one there
    found = network.measure(made, truth[:, 1:], Stub(), WINDOW)
    frames = FRAMES - 1
    assert found["akd_to_truth"] == pytest.approx(3 * (frames - 1) / (2 * frames - 1))
    assert found["missing_keypoints"] == pytest.approx(1 / (2 * frames))
    assert network.measure(made, truth[:, 1:], Stub(steps=WINDOW.last - 1), WINDOW) == {}


def test_cameras_of_a_network(tmp_path):
    """Red that grows by 2 a frame is a turn of 0.02, where 0.01 is asked for."""
    network = CameraErrors(save(tmp_path, RedTurns()), Stub(cameras=turned(torch.zeros(2))))
    video = torch.zeros(2, FRAMES, 4, 6, 3, dtype=torch.uint8)
    video[..., 0] = 2 * torch.arange(FRAMES)[:, None, None]
    asked = turned(0.01 * torch.arange(FRAMES)).repeat(2, 1, 1, 1)
    found = network.measure(video, video[:, 1:], Stub(cameras=asked), WINDOW)
    expected = 0.01 * sum(range(FRAMES))
    assert found["rotation_error"] == pytest.approx(expected, rel=1e-3)
    assert found["cameras_found"] == 1


def test_networks_that_do_not_fit_are_refused(tmp_path):
    video = torch.zeros(1, FRAMES, 4, 6, 3, dtype=torch.uint8)
    cameras = turned(torch.zeros(FRAMES))[None]
    asked = Stub(cameras=cameras), WINDOW
    flat = save(tmp_path, Flat())
    with pytest.raises(
        ValueError, match=r"keypoints: .* to return keypoints \(N, K, 3\), got \(32"
    ):
        KeypointErrors(flat).measure(video, video[:, 1:], *asked)
    with pytest.raises(
        ValueError, match=r"camera_poses: .* return cameras \(1, F, 4, 4\), got \(1"
    ):
        CameraErrors(flat, asked[0]).measure(video, video[:, 1:], *asked)
    few = CameraErrors(save(tmp_path, TooFew()), asked[0])
    with pytest.raises(ValueError, match=f"expected one camera per frame, {FRAMES}, got 3"):
        few.measure(video, video[:, 1:], *asked)
    with pytest.raises(ValueError, match="expected starts with camera motion, .*--motion camera"):
        CameraErrors(flat, Stub())


def test_the_command_measures_with_both(tmp_path, capsys, monkeypatch):
    """The truth has the estimator's own error, the checkpoint has all."""
    monkeypatch.setattr("aapt.evaluate.evaluation.ProbeConfig", lambda: SMALL_PROBE)
    monkeypatch.setattr("aapt.evaluate.evaluation.ObjectDetectorConfig", lambda: SMALL_DETECTOR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = save_checkpoint(tmp_path / "a")
    (tmp_path / "people").mkdir()
    options = ["--keypoints", save(tmp_path / "people", Brightest())]
    options += ["--camera-poses", save(tmp_path, RedTurns())]
    options += ["--starts", 2, "--seconds", 1.4, "--videos", 0, "--out", tmp_path / "out"]
    assert main([str(part) for part in ["eval", checkpoint, *options]]) == 0
    printed = capsys.readouterr().out
    for heading in ("AKD", "keypoints", "Rot", "Trans", "cameras"):
        assert heading in printed
    assert not (tmp_path / "out" / "videos").exists()
    assert main(["eval", str(checkpoint), "--keypoints", "no.pt", "--out", str(tmp_path)]) == 2
    assert "keypoints: expected a TorchScript file, got no.pt" in capsys.readouterr().err
