"""Folders and tar shards: samples in order, links, odd files, and faults."""

import errno
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import tarfile

import pytest

from aapt.data.videos.pixel_clips import source_digest
from aapt.data.videos.sample import Skipped
from aapt.data.videos.sources import find_samples


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


def test_a_broken_tar_gives_the_members_before_the_damage(tmp_path):
    path = tmp_path / "a.tar"
    tar(path, {"1.mp4": b"one", "2.mp4": bytes(2000), "3.mp4": b"three"})
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])
    broken, whole = find_samples(tmp_path)
    assert (broken.name, broken.video, whole.name) == ("a.tar", None, "a.tar//1.mp4")
    assert broken.fault == ("broken archive", "after 1 files: damaged or truncated")
    for data in (b"no tar at all" * 100, b""):
        path.write_bytes(data)
        (broken,) = find_samples(tmp_path)
        assert broken.video is None and broken.fault[0] == "broken archive"
        assert broken.fault[1].startswith("after 0 files: ")


@pytest.mark.parametrize("end", [512 + 512 + 512 + 700, 512 + 512 + 100])
def test_a_tar_that_ends_early(tmp_path, end):
    tar(tmp_path / "a.tar", {"1.mp4": b"one", "2.mp4": bytes(2000)})
    os.truncate(tmp_path / "a.tar", end)
    samples = find_samples(tmp_path)
    assert [sample.name for sample in samples][:2] == ["a.tar", "a.tar//1.mp4"]
    assert samples[0].fault[0] == "broken archive"


def test_a_tar_without_an_end_mark_is_whole(tmp_path):
    tar(tmp_path / "a.tar", {"1.mp4": b"one"})
    os.truncate(tmp_path / "a.tar", 1024)
    assert [sample.name for sample in find_samples(tmp_path)] == ["a.tar//1.mp4"]


CAPTIONS = [
    ({"txt": b" a  meadow\nat noon \n"}, ["a meadow at noon"]),
    ({"txt": "\ufeffé".encode()}, ["é"]),
    ({"txt": b"a\r\nb\r\n"}, ["a b"]),
    ({"json": '\ufeff{"caption": "é"}'.encode()}, ["é"]),
    ({"json": b'{"caption": "a", "fps": 3}'}, ["a"]),
    ({"json": b'{"captions": ["a", " ", "b"]}'}, ["a", "b"]),
    ({"txt": b"text", "json": b'{"caption": "a"}'}, ["text"]),
    ({}, "no caption: expected v.txt"),
    ({"txt": b" \n"}, "no caption: the caption is empty"),
    ({"json": b'{"captions": []}'}, "no caption: the caption is empty"),
    ({"txt": "été".encode("latin-1")}, "bad caption: not UTF-8"),
    ({"txt": "a".encode("utf-16")}, "bad caption: not UTF-8"),
    ({"json": b"{"}, "bad caption: expected JSON: "),
    ({"json": b"[" * 100_000}, "bad caption: expected JSON: "),
    ({"json": b"[1]"}, "bad caption: expected a string 'caption' or a list of strings 'captions'"),
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
    """OpenPose writes a file per video frame. The number in the name gives the order."""
    (tmp_path / "w1.mp4").touch()
    (tmp_path / "w1.keypoints.json").write_text("[1]")
    (tmp_path / "w2.mp4").touch()
    (tmp_path / "w2.keypoints").mkdir()
    for number in (8, 9, 10):
        file = tmp_path / "w2.keypoints" / f"w2_{number}_keypoints.json"
        file.write_text(f'{{"frame_id": 0, "people": [{number}]}}')
    (tmp_path / "w2.keypoints" / "notes.txt").touch()
    one, two = find_samples(tmp_path)
    assert one.keypoints() == [1]
    assert two.keypoints() == [{"people": [8]}, {"people": [9]}, {"people": [10]}]
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
            "bad keypoints: expected a file with number 2, got none",
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


def faults(samples):
    """[(name, reason)] of the faulty samples."""
    return [(sample.name, sample.fault[0]) for sample in samples if sample.fault]


def unreadable(sample):
    """The reason why the video cannot be opened."""
    with pytest.raises(Skipped) as skipped:
        sample.open()
    assert skipped.value.reason == "unreadable"
    return skipped.value.detail


def test_linked_folders_are_read_and_every_folder_once(tmp_path):
    """A folder that can be reached without a link has the name of this path."""
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    for folder in (source / "real", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "v.mp4").touch()
    (source / "a-link").symlink_to(source / "real")
    (source / "loop").symlink_to(".")
    (source / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(source)
    (source / "second.mp4").symlink_to("real/v.mp4")
    samples = find_samples(source)
    names = ["more/deep/v.mp4", "real/v.mp4", "second.mp4"]
    assert [sample.name for sample in samples] == names and not faults(samples)


def test_the_source_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "v.mp4").touch()
    (tmp_path / "link").symlink_to("real")
    assert [sample.name for sample in find_samples(tmp_path / "link")] == ["v.mp4"]


def test_links_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "v.mp4").touch()
    (tmp_path / "more").symlink_to("gone")
    (tmp_path / "lost.mp4").symlink_to("gone.mp4")
    (tmp_path / "v.txt").symlink_to("v.txt")
    lost, more, video = find_samples(tmp_path)
    assert faults([more]) == [("more", "unreadable")]
    assert unreadable(lost) == "No such file or directory"
    with pytest.raises(Skipped, match="unreadable: Too many levels of symbolic links"):
        video.captions()


def refuse(monkeypatch, folder, number):
    """Let the system refuse to list a folder, even to root."""
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path) == os.fspath(folder):
            raise OSError(number, os.strerror(number))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    for name in ("a.mp4", "locked/b.mp4", "locked/deeper/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    refuse(monkeypatch, tmp_path / "locked", errno.EACCES)
    samples = find_samples(tmp_path)
    assert [sample.name for sample in samples] == ["a.mp4", "locked"]
    with pytest.raises(Skipped, match="unreadable: Permission denied"):
        samples[1].open()
    refuse(monkeypatch, tmp_path, errno.EACCES)
    with pytest.raises(ValueError, match="videos: expected a folder.*: Permission denied"):
        find_samples(tmp_path)


def test_a_failing_disk_is_no_fault_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    refuse(monkeypatch, tmp_path / "folder", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        find_samples(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "file.txt/x", "circle"])
def test_a_source_that_the_system_refuses(tmp_path, name):
    (tmp_path / "file.txt").touch()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ValueError, match="videos: expected a folder, a .tar or a video, got "):
        find_samples(tmp_path / name)


def test_pipes_devices_and_sockets_are_never_opened(tmp_path):
    """Opening a pipe would wait for a writer."""
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder.mp4" / "v.mp4").touch()
    os.mkfifo(tmp_path / "folder.mp4" / "v.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.mp4"))
        device, inner, pipe, tar_pipe, bound = find_samples(tmp_path)
        assert inner.name == "folder.mp4/v.mp4" and faults([tar_pipe]) == [
            ("pipe.tar", "unreadable")
        ]
        for sample in (device, pipe, bound):
            assert unreadable(sample) == "expected a regular file"
        with pytest.raises(Skipped, match="unreadable: expected a regular file"):
            inner.captions()
    (alone,) = find_samples(tmp_path / "pipe.mp4")
    assert unreadable(alone) == "expected a regular file"


@pytest.mark.parametrize(
    "number", [errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENAMETOOLONG, errno.EACCES]
)
def test_an_error_of_a_path_is_the_files_and_one_of_the_disk_is_not(tmp_path, monkeypatch, number):
    (tmp_path / "v.mp4").touch()
    (sample,) = find_samples(tmp_path)

    def failing(path, *_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pathlib.Path.open", failing)
    assert unreadable(sample) == os.strerror(number)
    for number in (errno.EIO, errno.ESTALE, errno.EMFILE):  # `failing` takes the new number
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            sample.open()


def test_suffixes_in_capitals_and_archives_that_are_not_read(tmp_path):
    tar(tmp_path / "U.TAR", {"a.MP4": b"A", "inner.tar": b"", "inner.zip": b""})
    for name in ("g.tar.gz", "h.TGZ", "i.zip", "j.tar.zst", ".hidden.zip", "v.txt.gz"):
        (tmp_path / name).touch()
    (tmp_path / "z.MoV").touch()
    samples = find_samples(tmp_path)
    assert [sample.name for sample in samples if sample.video] == ["U.TAR//a.MP4", "z.MoV"]
    unread = ["U.TAR//inner.tar", "U.TAR//inner.zip", "g.tar.gz", "h.TGZ", "i.zip", "j.tar.zst"]
    assert faults(samples) == [(name, "unread archive") for name in unread]
    assert [s.name for s in find_samples(tmp_path / "U.TAR")] == [
        *("U.TAR//a.MP4", "U.TAR//inner.tar", "U.TAR//inner.zip")
    ]


def test_sidecars_with_suffixes_in_capitals_are_read(tmp_path):
    for name in ("a.mp4", "b.MP4", "c.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "a.TXT").write_text("in capitals")
    (tmp_path / "b.Json").write_text('{"caption": "as JSON"}')
    (tmp_path / "b.Camera.TXT").write_text("poses")
    (tmp_path / "c.TXT").write_text("not this one")
    (tmp_path / "c.txt").write_text("this one")
    (tmp_path / "c.Keypoints").mkdir()
    (tmp_path / "c.Keypoints" / "frame_3.JSON").write_text("{}")
    a, b, c = find_samples(tmp_path)
    assert [s.captions() for s in (a, b, c)] == [["in capitals"], ["as JSON"], ["this one"]]
    assert b.sidecar("camera.txt", "no camera").text("bad camera") == "poses"
    assert c.keypoints() == [{}]


def member(archive, name, kind, target="", data=b""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(data)
    archive.addfile(info, io.BytesIO(data))


def test_links_in_a_tar_have_the_bytes_of_their_targets(tmp_path):
    """GNU tar writes hard links for every further name of a file."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member(archive, "d", tarfile.DIRTYPE)
        member(archive, "d/1.mp4", tarfile.REGTYPE, data=b"one")
        member(archive, "1.txt", tarfile.REGTYPE, data=b"text")
        member(archive, "./hard.mp4", tarfile.LNKTYPE, "d/1.mp4")
        member(archive, "d/soft.mp4", tarfile.SYMTYPE, "../hard.mp4")
        member(archive, "d/soft.txt", tarfile.LNKTYPE, "1.txt")
        member(archive, "folder", tarfile.SYMTYPE, "d")
        member(archive, "circle.mp4", tarfile.SYMTYPE, "circle.mp4")
        member(archive, "lost.mp4", tarfile.LNKTYPE, "gone.mp4")
        member(archive, "out", tarfile.SYMTYPE, "../elsewhere")
        member(archive, "pipe.mp4", tarfile.FIFOTYPE)
    samples = {sample.name.removeprefix("a.tar//"): sample for sample in find_samples(tmp_path)}
    assert sorted(samples) == [
        *("./hard.mp4", "circle.mp4", "d/1.mp4", "d/soft.mp4", "lost.mp4", "out", "pipe.mp4")
    ]
    for name in ("./hard.mp4", "d/1.mp4", "d/soft.mp4"):
        with samples[name].open() as file:
            assert file.read() == b"one"
    assert samples["d/soft.mp4"].captions() == ["text"]
    assert unreadable(samples["circle.mp4"]) == "expected a link to a file, got a circle of links"
    lost = "expected the link's target gone.mp4 in the tar, got none"
    assert unreadable(samples["lost.mp4"]) == lost
    assert unreadable(samples["pipe.mp4"]) == "expected a regular member, got a pipe or a device"
    assert faults(samples.values()) == [("a.tar//out", "unreadable")]


def test_sparse_members_of_a_tar_are_named(tmp_path):
    with (tmp_path / "v.mp4").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"data")
    command = ["tar", "--sparse", "-C", tmp_path, "-cf", tmp_path / "a.tar", "v.mp4"]
    subprocess.run(command, check=True)
    (sample,) = find_samples(tmp_path / "a.tar")
    assert unreadable(sample) == "expected a regular member, got a sparse one"


def test_a_second_archive_in_a_tar_is_read(tmp_path):
    """`cat 1.tar 2.tar`: the first archive ends with blocks of zeros."""
    tar(tmp_path / "1", {"a.mp4": b"A", "a.txt": b"a"})
    tar(tmp_path / "2", {"b.mp4": b"B", "b.txt": b"b"})
    both = (tmp_path / "1").read_bytes() + bytes(5000 * 512) + (tmp_path / "2").read_bytes()
    (tmp_path / "s.tar").write_bytes(both)
    samples = find_samples(tmp_path / "s.tar")
    assert [sample.name for sample in samples] == ["s.tar//a.mp4", "s.tar//b.mp4"]
    assert [sample.captions() for sample in samples] == [["a"], ["b"]]
    with samples[1].open() as file:
        assert file.read() == b"B"
    (tmp_path / "s.tar").write_bytes(both + b"garbage" * 100)
    fault = find_samples(tmp_path / "s.tar")[0]
    assert fault.fault == ("broken archive", "after 4 files: damaged or truncated")


def test_a_video_that_is_twice_in_a_tar_is_named(tmp_path):
    for name in ("1", "2"):
        tar(tmp_path / name, {"a.mp4": name.encode()})
    (tmp_path / "s.tar").write_bytes((tmp_path / "1").read_bytes() + (tmp_path / "2").read_bytes())
    fault, sample = find_samples(tmp_path / "s.tar")
    assert fault.fault == ("broken archive", "expected each video once, got a.mp4 again")
    with sample.open() as file:
        assert file.read() == b"2"


def test_names_need_not_be_utf_8(tmp_path):
    name = os.fsencode(tmp_path) + b"/b\xff.mp4"
    with open(name, "wb"), open(name[:-3] + b"txt", "wb") as caption:
        caption.write(b"text")
    (sample,) = find_samples(tmp_path)
    assert sample.name == "b\udcff.mp4" and sample.captions() == ["text"]
    before = source_digest(tmp_path)
    with open(name, "ab") as file:
        file.write(b"longer")
    assert len({before, source_digest(tmp_path)}) == 2 and len(before) == 64


def test_the_digest_of_a_source_stays(tmp_path):
    """A run of an older version has recorded the digest."""
    (tmp_path / "a.mp4").write_bytes(b"12")
    (tmp_path / "é.mp4").write_bytes(b"123")
    expected = hashlib.sha256("a.mp4\0002\né.mp4\0003\n".encode()).hexdigest()
    assert source_digest(tmp_path) == expected


def test_a_file_that_went_away_is_skipped(tmp_path):
    (tmp_path / "v.mp4").touch()
    (tmp_path / "v.txt").write_text(json.dumps("x"))
    (sample,) = find_samples(tmp_path)
    (tmp_path / "v.mp4").unlink()
    with pytest.raises(Skipped, match="unreadable: No such file or directory"):
        sample.video.open()
