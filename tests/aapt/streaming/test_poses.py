"""Poses: scripts, streams that follow them, snapshots and replays."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from aapt import Pose, StreamingGenerator
from aapt.model.pose import draw_skeletons
from aapt.model.world_model import WorldModel
from aapt.streaming.actions import Replay, Step, Walk, frames_crc, load_walk, make
from aapt.streaming.batch import step_together
from aapt.streaming.poses import PRESETS, PoseScript, load_poses
from aapt.streaming.snapshot_file import load_snapshot, read_file, write_snapshot
from aapt.vae import CausalVAE

from ..helpers import CONFIG, tiny_model
from .test_generator import HEIGHT, VAE, WIDTH

DANCE = load_poses("dance")


def build(**options):
    torch.manual_seed(1)
    model = WorldModel(replace(CONFIG, condition_channels=4), None)
    for name, parameter in model.named_parameters():  # so that every path matters
        if "modulation" in name or "video_out" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    vae = CausalVAE(VAE)
    return StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH, **{"poses": True, **options})


@pytest.fixture(scope="module")
def generator():
    return build()


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def dance(steps, skip=0):
    made = DANCE.steps(24, 4)
    return [pose for _, pose in zip(range(steps + skip), made)][skip:]


def play(stream, poses):
    return np.concatenate([stream.step(pose) for pose in poses])


def test_steps_see_what_the_whole_video_of_skeletons_gives(generator, picture):
    """The encoder has convolutions over time, so a lost state would show."""
    poses = dance(5)
    points = np.concatenate([DANCE.first.points, *(pose.points for pose in poses)])
    channels = generator.encode(draw_skeletons(points, HEIGHT, WIDTH))
    ready = generator.open(picture, "ab", seed=2)
    expected = play(ready, channels[:, 1:].unbind(1))
    stream = generator.open(picture, "ab", seed=2, pose=DANCE.first)
    found = play(stream, poses)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    other = play(generator.open(picture, "ab", seed=2, pose=DANCE.first), dance(5, skip=4))
    assert np.abs(found.astype(int) - other.astype(int)).max() > 1


def test_snapshots_forks_and_files_resume_the_skeletons(generator, picture):
    stream = generator.open(picture, "ab", seed=3, pose=DANCE.first)
    play(stream, dance(3))
    snapshot, twin = stream.snapshot(), stream.fork()
    states = sum(part.nbytes for part in snapshot.skeleton)
    assert states and stream.bytes == build(poses=False).open(picture, "ab").bytes + states
    assert snapshot.bytes == replace(snapshot, skeleton=()).bytes + states
    fresh = generator.open(picture, "ab", seed=9)
    file = write_snapshot(snapshot, {}, {})
    fresh.restore(load_snapshot(fresh.snapshot(), *read_file(file)))
    expected = play(stream, dance(3, skip=3))
    assert np.array_equal(play(twin, dance(3, skip=3)), expected)
    assert np.array_equal(play(fresh, dance(3, skip=3)), expected)
    stream.restore(snapshot)
    assert np.array_equal(play(stream, dance(3, skip=3)), expected)


def test_streams_in_one_pass_follow_their_own_poses(generator, picture):
    streams = [generator.open(picture, "ab", seed, pose=DANCE.first) for seed in (0, 1)]
    poses = dance(4), dance(4, skip=9)
    alone = [
        play(generator.open(picture, "ab", seed, pose=DANCE.first), poses[seed]) for seed in (0, 1)
    ]
    for step in range(4):
        together = step_together(streams, [poses[0][step], poses[1][step]])
        for seed, take in enumerate(together):
            expected = alone[seed][4 * step : 4 * step + 4].astype(int)
            assert np.abs(take().astype(int) - expected).max() <= 2


def test_a_walk_replays_its_poses_bit_for_bit(generator, picture):
    walk = Walk("small", "0", picture, "ab", 7, pose=DANCE.first)
    stream = generator.open(picture, "ab", 7, pose=DANCE.first)
    for number, pose in enumerate(dance(4)):
        frames = make(stream, Step(None, None, "ab", pose=pose))
        walk.append(0, number, Step(None, None, "ab", frames_crc(frames), pose=pose))
    read = load_walk(walk.lines("0"))
    assert read.pose == DANCE.first and read.path(0, 4) == walk.path(0, 4)
    replay = Replay(generator, read)
    for step in read.path(0, 4):
        replay.step(step)
    assert replay.differing == []
    changed = read.path(0, 4)[0]._replace(pose=dance(1, skip=8)[0])
    replay = Replay(generator, read)
    replay.step(changed)
    assert replay.differing == [1]


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"pose": [[0.5]]}, r"line 2: pose: "),
        ({"pose": [[[10**400, 0.5, 1]] * 14]}, "pose: int too large"),
        ({"pose": [[[0.5, 0.5, 2.0]] * 14]}, "pose: expected a visibility of 0 or 1"),
        ({"pose": [[[0.5, 0.5, 1]] * 14], "yaw": 0.0, "forward": 0.0}, "expected no yaw and forw"),
        (
            {"pose": [[[0.5, 0.5, 1]] * 14], "redone": [[0.0, 1.0, 2]]},
            r"redone: expected \[pose",
        ),
        ({"pose": [[[0.5, 0.5, 1]] * 14], "redone": [[[[0.5]], 2]]}, "line 2: pose: "),
    ],
)
def test_a_bad_pose_in_a_walk_is_named(picture, field, said):
    lines = list(Walk("small", "0", picture, "ab", 7).lines("0"))
    lines.append(json.dumps({"step": 1, **field}))
    with pytest.raises(ValueError, match=said):
        load_walk(lines)


def test_what_is_no_pose_is_refused_and_changes_nothing(generator, picture):
    stream = generator.open(picture, "ab", seed=0, pose=DANCE.first)
    with pytest.raises(ValueError, match="pose: expected 4 video frames, got 1"):
        stream.step(DANCE.first)
    with pytest.raises(ValueError, match="control: expected a Pose or condition channels"):
        stream.step(None)
    assert stream.steps == 0
    with pytest.raises(ValueError, match="pose: expected 1 video frames, got 4"):
        generator.open(picture, "ab", pose=dance(1)[0])
    unposed = build(poses=False)
    with pytest.raises(ValueError, match="pose: expected None, this model follows no poses"):
        unposed.open(picture, "ab", pose=DANCE.first)
    with pytest.raises(ValueError, match="control: expected condition channels"):
        unposed.open(picture, "ab").step(dance(1)[0])
    with pytest.raises(ValueError, match="poses: expected a model of one pass .* 4 condition"):
        StreamingGenerator(
            tiny_model().float(), CausalVAE(VAE), height=HEIGHT, width=WIDTH, poses=True
        )


def spoiled(place, value):
    points = np.full((2, 14, 3), 0.5)
    points[..., 2] = 1
    points[place] = value
    return points


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (np.zeros((14, 3)), r"expected \(frames, 14, 3\)"),
        (np.zeros((0, 14, 3)), r"expected \(frames, 14, 3\)"),
        (np.zeros((1, 13, 3)), r"got \(1, 13, 3\)"),
        (spoiled((1, 1, 0), np.nan), "finite numbers, got .* for the neck in video frame 1"),
        (spoiled((0, 0, 1), 2.5), "x and y in .* for the head in video frame 0"),
        (spoiled((0, 13, 2), 0.5), "a visibility of 0 or 1, got .* for the left ankle"),
    ],
)
def test_a_pose_says_what_is_wrong(points, said):
    with pytest.raises(ValueError, match=said):
        Pose(points)


def test_a_pose_cannot_be_changed_and_compares_by_its_points():
    points = spoiled((0, 0, 0), 0.4)
    pose, again = Pose(points), Pose(points.tolist())
    points[:] = 0
    assert pose == again and hash(pose) == hash(again) and pose != Pose(points)
    with pytest.raises(ValueError, match="read-only"):
        pose.points[0] = 1


def line(start, end, frames, fps=12.0):
    points = np.ones((frames, 14, 3))
    points[..., :2] = np.linspace(start, end, frames)[:, None, None]
    return PoseScript("line", fps, points)


def test_a_script_is_interpolated_and_goes_there_and_back():
    script = line(0.0, 1.0, 11, fps=10.0)  # one unit per second, for a second
    x = [script.at(seconds)[3, 0] for seconds in (0, 0.25, 1.0, 1.25, 2.0, 2.3)]
    assert np.allclose(x, [0, 0.25, 1.0, 0.75, 0.0, 0.3])
    made = [pose.points[:, 0, 0] for _, pose in zip(range(7), script.steps(20, 4))]
    time = np.arange(1, 29) / 20
    assert np.allclose(np.concatenate(made), np.where(time <= 1, time, 2 - time))
    script.points[5, 4, 2] = 0
    assert script.at(0.45)[4, 2] == 0 and script.at(0.45)[3, 2] == 1


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_in_the_image(name):
    points = load_poses(name).points
    assert 0 < points[..., :2].min() and points[..., :2].max() < 1


POINT = [0.5, 0.5]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1: expected JSON"),
        ("[]", 'expected {"fps": 24'),
        ('{"fps": 24}', 'expected {"fps": 24'),
        (json.dumps({"fps": 0, "keypoints": [[POINT] * 14] * 2}), r"fps: expected a number in"),
        (json.dumps({"fps": True, "keypoints": [[POINT] * 14] * 2}), "fps: .* got True"),
        (json.dumps({"fps": 24, "keypoints": [[POINT] * 14]}), "two video frames or more, got 1"),
        (json.dumps({"fps": 24, "keypoints": 3}), "two video frames or more, got 3"),
        (
            json.dumps({"fps": 24, "keypoints": [[POINT] * 14, [POINT] * 13]}),
            r"14 points \(head, neck, .* in video frame 1, got 13 points",
        ),
        (
            json.dumps({"fps": 24, "keypoints": [[POINT] * 13 + [[1]]] * 2}),
            "or null for the left ankle in video frame 0",
        ),
        (
            json.dumps({"fps": 24, "keypoints": [[POINT] * 13 + [[0, 10**400]]] * 2}),
            "finite numbers, got a whole number beyond float64",
        ),
        (
            '{"fps": 24, "keypoints": ' + json.dumps([[POINT] * 13 + [[0.5, np.nan]]] * 2) + "}",
            "finite numbers, got .*nan.* for the left ankle in video frame 0",
        ),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path, text, said):
    path = tmp_path / "poses.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        load_poses(path)
    assert str(path) in str(error.value)


def test_a_file_gives_its_points_and_hides_null(tmp_path):
    path = tmp_path / "poses.json"
    path.write_text(json.dumps({"fps": 30, "keypoints": [[None] + [[0.25, 0.5]] * 13] * 3}))
    script = load_poses(path)
    assert script.fps == 30 and script.points.shape == (3, 14, 3)
    assert (
        script.first.points[0, 0, 2] == 0 and (script.first.points[0, 1:] == [0.25, 0.5, 1]).all()
    )


def test_an_unknown_name_has_a_hint():
    with pytest.raises(ValueError, match="expected a file or one of .* did you mean dance"):
        load_poses("danse")
