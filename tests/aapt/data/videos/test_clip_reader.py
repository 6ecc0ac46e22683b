"""Clips cut out of samples: their frames, their motion, and reasons to skip."""

import dataclasses
import errno
import io
import json
import math
import os

import av
import numpy as np
import pytest
import torch

from aapt.data.videos import clip_reader
from aapt.data.videos.buckets import Bucket
from aapt.data.videos.clip_reader import CutConfig, read_clips
from aapt.data.videos.sample import Skipped
from aapt.data.videos.sources import find_samples
from aapt.data.videos.trajectories import parse_trajectory
from aapt.model.conditioning import trajectory_poses

from .test_keypoints import entry, person
from .test_trajectories import controlled, trajectory, yawed
from .videos import (
    COLOURS,
    ORIENTATIONS,
    corners,
    grey,
    numbers,
    retimed,
    seen_corners,
    sound,
    video,
    with_display_matrix,
)

CONFIG = CutConfig(((Bucket(24, 16),),), latent_frames=2, stride=9)  # clips of 9 frames


def read(folder, data, config=CONFIG, caption="a", **sidecars):
    """Items of one video: clips, and skips as text."""
    (folder / "v.mkv").write_bytes(data)
    for kind, text in {"txt": caption, **sidecars}.items():
        if text is not None:
            (folder / f"v.{kind}").write_text(text)
    (sample,) = find_samples(folder)
    return [str(i) if isinstance(i, Skipped) else i for i in read_clips(sample, config)]


@pytest.mark.parametrize(
    "length, stride, starts",
    [(9, 9, [0]), (26, 9, [0, 9]), (27, 9, [0, 9, 18]), (14, 2, [0, 2, 4]), (30, 20, [0, 20])],
)
def test_clips_start_every_stride(tmp_path, length, stride, starts):
    config = dataclasses.replace(CONFIG, stride=stride)
    clips = read(tmp_path, video(grey(length)), config)
    assert [clip.start for clip in clips] == [start / 24 for start in starts]
    for clip, start in zip(clips, starts):
        assert clip.video.shape == (9, 16, 24, 3) and clip.video.dtype == np.uint8
        assert numbers(clip.video) == list(range(start, start + 9))
        assert (clip.source, clip.captions, clip.poses) == ("v.mkv", ["a"], None)


def test_a_clip_is_cropped_to_its_bucket(tmp_path):
    frames = np.zeros((9, 32, 64, 3), np.uint8)
    frames[:, :, :16], frames[:, :, -16:] = 255, 255  # what a square loses
    config = dataclasses.replace(CONFIG, buckets=((Bucket(16, 8),), (Bucket(16, 16),)))
    (wide,) = read(tmp_path, video(frames), config)
    assert wide.bucket == (16, 8) and wide.video[:, 4, 1].min() > 200
    (square,) = read(
        tmp_path, video(frames), dataclasses.replace(config, buckets=((Bucket(16, 16),),))
    )
    assert square.video.shape[1:3] == (16, 16) and square.video[:, :, 3:13].max() == 0


BROKEN = [
    (video(grey(8)), {}, "too short: expected 9 frames at 24 fps, got 8"),
    (b"", {}, "cannot be decoded: at once: "),
    (sound(), {}, "no video: "),
    (video(grey(9)), {"caption": None}, "no caption: expected v.txt"),
]


@pytest.mark.parametrize("data, options, expected", BROKEN)
def test_a_video_that_cannot_be_used_is_skipped(tmp_path, data, options, expected):
    (skipped,) = read(tmp_path, data, **options)
    assert skipped.startswith(expected)


def test_what_comes_before_damage_is_used(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 48, 3), dtype=np.uint8)
    data = video(noise, codec="libx264", container="mpegts")
    clip, skipped = read(tmp_path, data[: len(data) // 2])
    assert clip.start == 0 and skipped == "cannot be decoded: after 0.417 s: a damaged picture"


def starts(items):
    """Return the start of each clip in video frames, and the text of each skip."""
    return [item if isinstance(item, str) else round(24 * item.start) for item in items]


def test_clips_begin_anew_after_a_gap(tmp_path):
    """Pictures 0 to 12 and 13 to 39, with 0.6 s more between them."""
    times = [1000 * n // 24 + (600 if n > 12 else 0) for n in range(40)]
    items = read(tmp_path, video(grey(40), times=times))
    assert starts(items) == [0, "gap: from 0.500 s to 1.141 s", 27, 36, 45]
    first = [numbers(item.video)[0] for item in items if not isinstance(item, str)]
    assert first == [0, 13, 22, 31]


@pytest.mark.parametrize("seconds", [1e4, 2e6, 2**62 // 1000])
def test_a_wild_clock_is_one_skip(tmp_path, seconds):
    """A clock that jumps far ahead, from a picture to the end, and for one picture alone. Its
    neighbours replace that picture."""
    even = [round(1000 * n / 24) for n in range(30)]
    late = [round(1000 * seconds) + time for time in even]
    items = read(tmp_path, retimed(video(grey(30)), even[:12] + late[12:]))
    assert starts(items[:1]) == [0] and items[1].startswith("gap: from 0.458 s to ")
    assert len(items) == (2 if seconds > 1e9 else 4)  # times that large are too coarse for clips
    items = read(tmp_path, retimed(video(grey(30)), even[:12] + late[12:13] + even[13:]))
    assert starts(items) == [0, 9, 18]
    assert set(np.diff(numbers(items[1].video))) == {0, 1, 2}


@pytest.mark.parametrize("motion", ["none", "camera"])
def test_joined_files_give_clips_of_each(tmp_path, motion):
    """The second clock continues after the first, so that no time means two pictures."""
    even = [round(1000 * n / 24) for n in range(15)]
    cameras = trajectory([yawed(0.0)] * 60)
    config = dataclasses.replace(CONFIG, motion=motion)
    data = retimed(video(grey(30)), even + even)
    items = read(tmp_path, data, config, **{"camera.txt": cameras})
    assert starts(items) == [0, "gap: from 0.583 s to 0.783 s", round(24 * 0.783)]
    assert numbers(items[2].video) == list(range(15, 24))


def test_a_slide_show_is_no_video(tmp_path):
    assert read(tmp_path, video(grey(9), rate=2)) == ["gap: from 0.000 s to 0.500 s"]


def test_a_trajectory_may_begin_after_a_gap(tmp_path):
    times = [1000 * n // 24 + (600 if n > 12 else 0) for n in range(30)]
    lines = trajectory([yawed(0.0)] * 50).splitlines()
    config = dataclasses.replace(CONFIG, motion="camera")
    for first, expected in [(20, [27]), (38, ["too short: expected 9 frames at 24 fps, got 6"])]:
        text = "\n".join([lines[0], *lines[1 + first :]])
        items = read(tmp_path, video(grey(30), times=times), config, **{"camera.txt": text})
        assert starts(items) == expected


def test_a_change_of_size_ends_a_video(tmp_path, monkeypatch):
    def pictures(file):
        yield from first
        for picture in second:
            yield dataclasses.replace(picture, time=picture.time + 10 / 24)

    decode = clip_reader.pictures
    first = list(decode(io.BytesIO(video(grey(10)))))
    second = list(decode(io.BytesIO(video(grey(10, 16, 16)))))
    monkeypatch.setattr(clip_reader, "pictures", pictures)
    clip, skipped = read(tmp_path, b"")
    assert clip.start == 0 and skipped == "size changes: at 0.417 s from (48, 32) to (16, 16)"


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError(), av.EOFError(1, "end")])
def test_every_error_of_a_library_is_skipped(tmp_path, monkeypatch, error):
    def pictures(file):
        raise error

    monkeypatch.setattr(clip_reader, "pictures", pictures)
    (skipped,) = read(tmp_path, b"")
    assert skipped.startswith(f"cannot be decoded: {type(error).__name__}")


@pytest.mark.parametrize("number", [errno.ELOOP, errno.EACCES, errno.ENXIO])
def test_an_error_of_the_path_while_reading_is_skipped(tmp_path, monkeypatch, number):
    def pictures(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(clip_reader, "pictures", pictures)
    assert read(tmp_path, b"") == [f"unreadable: {os.strerror(number)}"]


def test_an_error_of_the_disk_is_raised(tmp_path, monkeypatch):
    def pictures(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(clip_reader, "pictures", pictures)
    with pytest.raises(OSError, match="Input/output"):
        read(tmp_path, b"")


CAMERA = dataclasses.replace(CONFIG, motion="camera", max_turn=math.radians(80))


def test_poses_are_relative_to_the_video_frame_before(tmp_path):
    """Row n - 1, of latent frame n, holds the poses of video frames 4n - 3 to 4n."""
    cameras, steps = controlled(19)
    clips = read(tmp_path, video(grey(20)), CAMERA, **{"camera.txt": trajectory(cameras)})
    assert [clip.start for clip in clips] == [0, 9 / 24]
    for clip, start in zip(clips, (0, 9)):
        assert clip.poses.shape == (2, 4, 4, 4) and clip.poses.dtype == torch.float32
        expected = steps[start : start + 8].unflatten(0, (2, 4)).float()
        # The clocks are rounded: Matroska's to milliseconds, the trajectory's to microseconds
        torch.testing.assert_close(clip.poses, expected, atol=4e-3, rtol=0)
    # 48 x 32 and 24 x 16 have one shape: the lens stays
    np.testing.assert_allclose(clips[0].lens, [0.8, 1.4, 0.5, 0.5], rtol=1e-6)


def test_the_lens_is_cropped_with_the_picture(tmp_path):
    config = dataclasses.replace(CAMERA, buckets=((Bucket(16, 16),),))
    text = trajectory([yawed(0.0)] * 9, lens=(0.8, 1.2, 0.55, 0.4))
    (clip,) = read(tmp_path, video(grey(9, 32, 64)), config, **{"camera.txt": text})
    np.testing.assert_allclose(clip.lens, [1.6, 1.2, 0.6, 0.4], rtol=1e-6)  # half the width is left


def test_the_camera_moves_as_the_pictures_do(tmp_path):
    """30 fps shown at 24 leave out picture 2, so the camera moves twice as far between frames 1 and
    2. The trajectory has a line per picture."""
    cameras = [yawed(0.0, (0.02 * n, 0.0, 0.0)) for n in range(20)]
    text = trajectory(cameras, fps=30)
    clip, *_ = read(tmp_path, video(grey(20), rate=30), CAMERA, **{"camera.txt": text})
    shown = numbers(clip.video)
    moved = clip.poses.flatten(0, 1)[:, 0, 3].numpy()
    np.testing.assert_allclose(moved, 0.02 * np.diff(shown), atol=1e-3)
    assert set(np.diff(shown)) == {1, 2}


def test_clips_are_within_the_trajectory(tmp_path):
    cameras, _ = controlled(39)
    lines = trajectory(cameras).splitlines()
    text = "\n".join([lines[0], *lines[6:36]])  # of pictures 5 to 34
    clips = read(tmp_path, video(grey(40)), CAMERA, **{"camera.txt": text})
    assert [round(24 * clip.start) for clip in clips] == [5, 14, 23]
    assert [numbers(clip.video)[0] for clip in clips] == [5, 14, 23]
    poses = trajectory_poses(parse_trajectory(text).at(torch.arange(5, 14).double() / 24))
    torch.testing.assert_close(clips[0].poses.flatten(0, 1), poses.float(), atol=4e-3, rtol=0)


def test_jumps_of_the_camera_cost_their_clips(tmp_path):
    still, far = yawed(0.0), yawed(0.0, (0.0, 0.6, 0.0))
    turned = yawed(math.radians(20), (0.0, 0.6, 0.0))
    text = trajectory([still] * 12 + [far] * 12 + [turned] * 12)
    config = dataclasses.replace(CAMERA, max_turn=math.radians(15))
    items = read(tmp_path, video(grey(36)), config, **{"camera.txt": text})
    kinds = [item if isinstance(item, str) else round(24 * item.start) for item in items]
    assert kinds[0] == 0 and kinds[3] == 27
    limits = "expected moves up to 0.5 and turns up to 15 degrees a frame, got "
    assert kinds[1].startswith(f"camera too fast: clip at 0.375 s: {limits}0.6 and ")
    assert kinds[2].startswith(f"camera too fast: clip at 0.750 s: {limits}0 and 20")
    loose = dataclasses.replace(CAMERA, max_move=0.7)
    assert len([i for i in read(tmp_path, video(grey(36)), loose) if not isinstance(i, str)]) == 4


@pytest.mark.parametrize("motion, kind", [("camera", "camera.txt"), ("pose", "keypoints.json")])
def test_motion_that_is_missing_or_broken_is_skipped(tmp_path, motion, kind):
    config = dataclasses.replace(CONFIG, motion=motion)
    name = {"camera": "camera", "pose": "keypoints"}[motion]
    assert read(tmp_path, video(grey(9)), config) == [f"no {name}: expected v.{kind}"]
    (skipped,) = read(tmp_path, video(grey(9)), config, **{kind: "?"})
    assert skipped.startswith(f"bad {name}: expected ")


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_the_lens_belongs_to_the_upright_image(tmp_path, name):
    """A square is cut out of a video that is shown 96 x 48 or 48 x 96."""
    matrix, corners_seen = ORIENTATIONS[name]
    data = video(corners(9, 48, 96), codec="libx264", container="mp4")
    config = dataclasses.replace(CAMERA, buckets=((Bucket(32, 32),),))
    text = trajectory([yawed(0.0)] * 9, lens=(0.8, 1.2, 0.55, 0.4))
    data = with_display_matrix(data, matrix)
    (clip,) = read(tmp_path, data, config, **{"camera.txt": text})
    assert seen_corners(clip.video[4]) == corners_seen
    wide = matrix[0] != 0
    expected = [1.6, 1.2, 0.6, 0.4] if wide else [0.8, 2.4, 0.55, 0.3]
    np.testing.assert_allclose(clip.lens, expected, rtol=1e-6)


POSE = dataclasses.replace(CONFIG, motion="pose", buckets=((Bucket(64, 64),),))


def test_skeletons_are_drawn_where_the_people_are(tmp_path):
    """A 128 x 64 video cropped to its middle square. The arm moves right, 4 pixels per picture."""
    arms = [entry(person({6: (40 + 4 * n, 20), 8: (40 + 4 * n, 44)})) for n in range(9)]
    data = video(grey(9, 64, 128))
    (clip,) = read(tmp_path, data, POSE, **{"keypoints.json": json.dumps(arms)})
    assert clip.skeletons.shape == clip.video.shape == (9, 64, 64, 3)
    lit = [np.flatnonzero(frame[32].any(axis=1)).mean() for frame in clip.skeletons]
    np.testing.assert_allclose(lit, [8 + 4 * n for n in range(9)], atol=1)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_skeletons_are_drawn_on_the_upright_image(tmp_path, name):
    """An arm in the red quarter of the upright image. A stored pixel is twice as wide as high."""
    matrix, corners_seen = ORIENTATIONS[name]
    columns, rows = (128, 64) if matrix[0] else (64, 128)
    place = corners_seen.index("R")
    x, y = ((1 + 2 * (place % 2)) * columns // 4, (1 + 2 * (place // 2)) * rows // 4)
    arm = entry(person({6: (x, y - 8), 8: (x, y + 8)}))
    data = with_display_matrix(
        video(corners(9), codec="libx264", container="mp4", aspect=2), matrix
    )
    bucket = Bucket(128, 32) if matrix[0] else Bucket(32, 128)  # as it is seen, nothing cut off
    config = dataclasses.replace(POSE, buckets=((bucket,),))
    (clip,) = read(tmp_path, data, config, **{"keypoints.json": json.dumps([arm] * 9)})
    assert seen_corners(clip.video[0]) == corners_seen
    lit = np.argwhere(clip.skeletons[0].any(axis=2)).mean(axis=0)
    expected = (y / rows * bucket.height, x / columns * bucket.width)
    np.testing.assert_allclose(lit, expected, atol=1)
    assert np.abs(clip.video[0, int(lit[0]), int(lit[1])].astype(int) - COLOURS["R"]).max() < 16


def test_keypoints_of_another_size_are_brought_to_the_video(tmp_path):
    """DWPose has read the video at half its size."""
    people = [{"pose_keypoints_2d": [0] * 6 + [40, 10, 1, 40, 22, 1] + [0] * 42}]  # right upper arm
    frame = {"people": people, "canvas_width": 64, "canvas_height": 32}
    text = json.dumps([frame] * 9)
    (clip,) = read(tmp_path, video(grey(9, 64, 128)), POSE, **{"keypoints.json": text})
    lit = np.argwhere(clip.skeletons[0].any(axis=2))
    assert abs(lit.mean(axis=0) - (32, 80 - 32)).max() < 1
    items = read(tmp_path, video(grey(9, 64, 64)), POSE, **{"keypoints.json": text})
    assert items == ["bad keypoints: expected a canvas of the shape of 64x64, got 64x32"]


def test_skeletons_follow_the_pictures_that_are_shown(tmp_path):
    arms = [entry(person({6: (2 * n, 20), 8: (2 * n, 44)})) for n in range(20)]
    config = dataclasses.replace(POSE, buckets=((Bucket(96, 64),),))
    data = video(grey(20, 64, 96), rate=48)
    (clip,) = read(tmp_path, data, config, **{"keypoints.json": json.dumps(arms)})
    lit = [np.flatnonzero(frame[32].any(axis=1)).mean() for frame in clip.skeletons[1:]]
    np.testing.assert_allclose(lit, [2 * n for n in numbers(clip.video)[1:]], atol=1)


def test_people_who_leave_are_gone_and_nobody_is_skipped(tmp_path):
    arm = entry(person({6: (24, 8), 8: (24, 24)}))
    text = json.dumps([arm] * 5 + [None])  # the list ends before the video
    items = read(tmp_path, video(grey(20)), POSE, **{"keypoints.json": text})
    lit = [bool(frame.any()) for frame in items[0].skeletons]
    assert lit == [True] * 5 + [False] * 4
    assert items[1] == "nobody: clip at 0.375 s: no keypoint to draw"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latent_frames": 0}, "latent_frames: expected 1 or more, got 0"),
        ({"stride": 0}, "stride: expected 1 or more, got 0"),
        ({"buckets": ()}, "buckets: expected one or more, got none"),
        ({"motion": "x"}, "motion: expected none, camera or pose, got 'x'"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
