"""Folders and tar shards: what belongs together, in which order, and what is broken."""

import io
import json
import os
import tarfile

import pytest

from aapt.data.videos.sources import Skipped, find_samples


def tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_a_tree_is_read_in_the_order_of_names(tmp_path):
    names = ["b/2.mp4", "b/10.webm", "a.v1.mkv", "c.MOV"]
    for name in [
        *reversed(names),
        "a.v1.txt",
        "b/2.json",
        "b/2.camera.txt",
        ".hidden.mp4",
        "n.jpg",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    tar(tmp_path / "b" / "5.tar", {"y.txt": b"why", "y.mp4": b"Y", "x.mp4": b"X"})
    samples = find_samples(tmp_path)
    assert [sample.name for sample in samples] == [
        *("a.v1.mkv", "b/10.webm", "b/2.mp4", "b/5.tar//x.mp4", "b/5.tar//y.mp4", "c.MOV"),
    ]
    assert [sorted(sample.sidecars) for sample in samples] == [
        *(["txt"], [], ["camera.txt", "json"], [], ["txt"], []),
    ]
    assert samples[4].captions() == ["why"]
    with samples[3].video.open() as x, samples[4].video.open() as y:
        assert (x.read(), y.read()) == (b"X", b"Y")


def test_one_tar_or_one_video_is_a_source_too(tmp_path):
    tar(tmp_path / "a.tar", {"y.mp4": b"Y"})
    for name in ("b.mp4", "bb.mp4"):
        (tmp_path / name).write_bytes(b"B")
    assert [s.name for s in find_samples(tmp_path / "a.tar")] == ["a.tar//y.mp4"]
    assert [s.name for s in find_samples(tmp_path / "b.mp4")] == ["b.mp4"]


def test_no_source(tmp_path):
    with pytest.raises(
        ValueError, match="videos: expected a folder, a .tar or a video, got .*none"
    ):
        find_samples(tmp_path / "none")
    with pytest.raises(ValueError, match="videos: expected videos or .tar shards in .*found none"):
        find_samples(tmp_path)


def test_a_broken_tar_gives_what_it_can(tmp_path):
    path = tmp_path / "a.tar"
    tar(path, {"1.mp4": b"one", "2.mp4": bytes(2000), "3.mp4": b"three"})
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])
    broken, whole = find_samples(tmp_path)
    assert (broken.name, broken.video, whole.name) == ("a.tar", None, "a.tar//1.mp4")
    assert broken.broken == "after 1 files: damaged or truncated"
    path.write_bytes(b"no tar at all" * 100)
    (broken,) = find_samples(tmp_path)
    assert broken.video is None and broken.broken.startswith("after 0 files: ")


@pytest.mark.parametrize("end", [512 + 512 + 512 + 700, 512 + 512 + 100])
def test_a_tar_that_ends_early(tmp_path, end):
    tar(tmp_path / "a.tar", {"1.mp4": b"one", "2.mp4": bytes(2000)})
    os.truncate(tmp_path / "a.tar", end)
    samples = find_samples(tmp_path)
    assert [sample.name for sample in samples][:2] == ["a.tar", "a.tar//1.mp4"]
    assert samples[0].broken


def test_a_tar_without_an_end_mark_is_whole(tmp_path):
    tar(tmp_path / "a.tar", {"1.mp4": b"one"})
    os.truncate(tmp_path / "a.tar", 1024)
    assert [sample.name for sample in find_samples(tmp_path)] == ["a.tar//1.mp4"]


CAPTIONS = [
    ({"txt": b" a  meadow\nat noon \n"}, ["a meadow at noon"]),
    ({"txt": "\ufeffé".encode()}, ["é"]),
    ({"json": b'{"caption": "a", "fps": 3}'}, ["a"]),
    ({"json": b'{"captions": ["a", " ", "b"]}'}, ["a", "b"]),
    ({"txt": b"text", "json": b'{"caption": "a"}'}, ["text"]),
    ({}, "no caption: expected v.txt"),
    ({"txt": b" \n"}, "no caption: the caption is empty"),
    ({"json": b'{"captions": []}'}, "no caption: the caption is empty"),
    ({"txt": b"\xff\xfe"}, "bad caption: not UTF-8"),
    ({"json": b"{"}, "bad caption: expected JSON: "),
    ({"json": b"[" * 100_000}, "bad caption: expected JSON: "),
    ({"json": b"[1]"}, "bad caption: expected a string 'caption' or a list of them 'captions'"),
    ({"json": b'{"captions": [1]}'}, "bad caption: expected a string 'caption' or a list"),
]


@pytest.mark.parametrize("files, expected", CAPTIONS)
def test_captions(tmp_path, files, expected):
    (tmp_path / "v.mp4").touch()
    for kind, data in files.items():
        (tmp_path / f"v.{kind}").write_bytes(data)
    (sample,) = find_samples(tmp_path)
    if isinstance(expected, list):
        assert sample.captions() == expected
    else:
        with pytest.raises(Skipped) as skipped:
            sample.captions()
        assert str(skipped.value).startswith(expected)


def test_keypoints_of_a_video_are_a_file_or_a_folder(tmp_path):
    """OpenPose writes a file per picture; the number in its name orders them, not the name."""
    (tmp_path / "w1.mp4").touch()
    (tmp_path / "w1.keypoints.json").write_text("[1]")
    (tmp_path / "w2.mp4").touch()
    (tmp_path / "w2.keypoints").mkdir()
    for number in (8, 9, 10):
        (tmp_path / "w2.keypoints" / f"w2_{number}_keypoints.json").write_text(f"[{number}]")
    (tmp_path / "w2.keypoints" / "notes.txt").touch()
    one, two = find_samples(tmp_path)
    assert (one.keypoints(), two.keypoints()) == ([1], [[8], [9], [10]])
    (alone,) = find_samples(tmp_path / "w2.mp4")
    assert alone.keypoints() == two.keypoints()
    names = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("w2*.*"))]
    files = {n: (tmp_path / n).read_bytes() for n in names if (tmp_path / n).is_file()}
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars" / "a.tar", files)
    (packed,) = find_samples(tmp_path / "tars")
    assert packed.keypoints() == two.keypoints()


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, "no keypoints: expected v.keypoints.json"),
        ({"v.keypoints.json": "{"}, "bad keypoints: expected JSON: "),
        ({"v.keypoints/1.json": "1", "v.keypoints/2.json": "{"}, "bad keypoints: file 2: expected"),
        (
            {"v.keypoints/1.json": "1", "v.keypoints/3.json": "3"},
            "bad keypoints: expected a file for picture 2, got none",
        ),
    ],
)
def test_keypoints_that_cannot_be_used(tmp_path, files, expected):
    (tmp_path / "v.mp4").touch()
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (sample,) = find_samples(tmp_path)
    with pytest.raises(Skipped) as skipped:
        sample.keypoints()
    assert str(skipped.value).startswith(expected)


def test_a_file_that_went_away_is_skipped(tmp_path):
    (tmp_path / "v.mp4").touch()
    (tmp_path / "v.txt").write_text(json.dumps("x"))
    (sample,) = find_samples(tmp_path)
    (tmp_path / "v.mp4").unlink()
    with pytest.raises(Skipped, match="unreadable: No such file or directory"):
        sample.video.open()
