"""Clips as pixels: videos that give them, and videos that are left out."""

import numpy as np
import pytest

from aapt.data.videos import pixel_clips
from aapt.data.videos.buckets import Bucket
from aapt.data.videos.pixel_clips import video_clips

from .videos import ORIENTATIONS, corners, grey, numbers, seen_corners, video, with_display_matrix

SIZE = Bucket(24, 16)


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "a.mkv").write_bytes(video(grey(20)))
    (tmp_path / "b.mkv").symlink_to("b.mkv")
    (tmp_path / "c.mkv").write_bytes(b"no video")
    (tmp_path / "d.zip").touch()
    (tmp_path / "e.mkv").write_bytes(video(grey(12)))
    return tmp_path


def test_videos_that_cannot_be_read_are_reported_and_left_out(videos):
    said = []
    clips = list(video_clips(videos, SIZE, 9, 10, report=said.append))
    assert [numbers(clip)[0] for clip in clips] == [0, 9, 0]
    assert all(clip.shape == (9, 16, 24, 3) for clip in clips)
    assert [line.split(": ")[:2] for line in said] == [
        ["b.mkv", "unreadable"],
        ["c.mkv", "cannot be decoded"],
        ["d.zip", "unread archive"],
    ]


@pytest.mark.parametrize("error", [ValueError("odd"), OSError(13, "Permission denied")])
def test_no_video_stops_the_others(videos, monkeypatch, error):
    read = pixel_clips.pictures

    def pictures(file):
        if file.name.endswith("a.mkv"):
            raise error
        return read(file)

    said = []
    monkeypatch.setattr(pixel_clips, "pictures", pictures)
    assert len(list(video_clips(videos, SIZE, 9, 10, report=said.append))) == 1
    reason = "unreadable" if isinstance(error, OSError) else "cannot be decoded"
    assert said[0].startswith(f"a.mkv: {reason}: ")


def test_an_error_of_the_disk_is_raised(videos, monkeypatch):
    def pictures(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pixel_clips, "pictures", pictures)
    with pytest.raises(OSError, match="Input/output"):
        list(video_clips(videos, SIZE, 9, 10, report=print))


def test_names_that_are_not_utf_8_are_reported(tmp_path, capsys):
    (tmp_path / "good.mkv").write_bytes(video(grey(9)))
    (tmp_path / "b\udcff.mkv").write_bytes(b"no video")
    assert len(list(video_clips(tmp_path, SIZE, 9, 2))) == 1
    assert capsys.readouterr().out.startswith(r"b\udcff.mkv: cannot be decoded")


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_clips_are_upright(tmp_path, name):
    matrix, expected = ORIENTATIONS[name]
    data = video(corners(5, 32, 48), codec="libx264", container="mp4")
    (tmp_path / "v.mp4").write_bytes(with_display_matrix(data, matrix))
    (clip,) = video_clips(tmp_path, Bucket(24, 24), 5, 1)
    assert seen_corners(np.asarray(clip[2])) == expected
