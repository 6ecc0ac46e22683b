"""The encoding job: its output, resuming, skips, changed files, and failures."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import random
import shutil
import stat
import tarfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from aapt import checkpoint
from aapt.commands.app import main
from aapt.data.videos import clip_reader, encode
from aapt.data.videos.buckets import Bucket
from aapt.data.videos.clip_reader import CutConfig
from aapt.data.videos.sample import Skipped
from aapt.data.videos.sources import find_samples
from aapt.lock import FolderInUse
from aapt.vae import CausalVAE, tiny

from .test_keypoints import entry, person
from .test_trajectories import trajectory, yawed
from .videos import grey, video

WIDE, TALL = Bucket(32, 16), Bucket(16, 32)
CONFIG = CutConfig(((WIDE,), (TALL,)), latent_frames=2, stride=9)  # clips of 9 frames


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return CausalVAE(tiny()).eval()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eleven clips of two shapes in six videos, and three videos that cannot be used."""
    folder = tmp_path_factory.mktemp("videos")
    noise = np.random.default_rng(0).integers(0, 255, (36, 32, 32, 3), dtype=np.uint8)
    for name, clips, size in [
        ("a/1", 2, (16, 32)),
        ("a/2", 1, (32, 16)),
        ("b/3", 3, (16, 32)),
        ("b/4", 1, (32, 16)),
        ("c/5", 3, (32, 16)),
        ("c/6", 1, (16, 32)),
    ]:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".mkv").write_bytes(video(noise[: 9 * clips, : size[0], : size[1]]))
        path.with_suffix(".txt").write_text(f"this is {name}")
    (folder / "a" / "3.mkv").write_bytes(video(grey(9)))
    (folder / "b" / "bad.mkv").write_bytes(b"bad" * 100)
    (folder / "d.mkv").write_bytes(video(grey(3)))
    for name in ("b/bad", "d"):
        (folder / name).with_suffix(".txt").write_text("x")
    return folder


def run(videos, vae, out, config=CONFIG, **options):
    return encode.encode(videos, vae, out, config, **{"shard_clips": 2, **options})


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(videos, vae, tmp_path_factory):
    """The result of one uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(videos, vae, out)
    return out


def test_the_index_counts_everything(whole):
    index = json.loads((whole / "index.json").read_text())
    assert index["complete"]
    assert index["videos"] == {"found": 9, "read": 9, "used": 6}
    assert index["skipped"] == {"cannot be decoded": 1, "no caption": 1, "too short": 1}
    clips = {name: [s["clips"] for s in b["shards"]] for name, b in index["buckets"].items()}
    assert clips == {"16x32": [2, 2, 1], "32x16": [2, 2, 2]}
    for bucket in index["buckets"].values():
        for shard in bucket["shards"]:
            assert (whole / shard["file"]).stat().st_size == shard["bytes"]
    lengths = {name: bucket["caption_bytes"] for name, bucket in index["buckets"].items()}
    assert lengths == {"16x32": {"11": 5}, "32x16": {"11": 6}}  # "this is a/1"
    outcomes = [json.loads(line) for line in (whole / "videos.jsonl").read_text().splitlines()]
    assert [outcome["video"] for outcome in outcomes] == sorted(o["video"] for o in outcomes)
    assert outcomes[2]["skipped"] == [["no caption", "expected a/3.txt"]]
    assert not [name for name in content(whole) if "partial" in name]


def test_captions_are_measured_in_the_bytes_that_a_model_reads(vae, tmp_path):
    """The longest caption of a clip counts, in lower case: this capital then has three bytes."""
    (tmp_path / "v").mkdir()
    for name, caption in (("a", '{"captions": ["x", "\u0130y"]}'), ("b", '{"caption": "x"}')):
        (tmp_path / "v" / f"{name}.mkv").write_bytes(video(grey(18, 16, 32)))
        (tmp_path / "v" / f"{name}.json").write_text(caption)
    index = run(tmp_path / "v", vae, tmp_path / "out", shard_clips=3)
    assert index["buckets"]["32x16"]["caption_bytes"] == {"1": 2, "4": 2}


def test_latents_are_those_of_the_clips(whole, videos, vae):
    found = []
    for sample in find_samples(videos):
        for clip in clip_reader.read_clips(sample, CONFIG):
            if not isinstance(clip, Skipped) and clip.bucket == WIDE:
                found.append(clip)
    latents, about = [], []
    for n in range(3):
        path = whole / "32x16" / f"{n:05d}.safetensors"
        latents.append(load_file(path)["latents"])
        with safe_open(path, "pt") as shard:
            about += json.loads(shard.metadata()["clips"])
        assert path.stat().st_mode & stat.S_IROTH == (whole / "index.json").stat().st_mode & 4
    assert (whole / "vae.safetensors").stat().st_mode == (whole / "index.json").stat().st_mode
    latents = torch.cat(latents)
    assert latents.dtype == torch.float16 and latents.shape == (6, 16, 3, 2, 4)
    for clip, latent, facts in zip(found, latents, about, strict=True):
        pixels = torch.from_numpy(clip.video).permute(3, 0, 1, 2)[None].float()
        with torch.no_grad():
            expected = vae.encode(pixels / 127.5 - 1)[0]
        torch.testing.assert_close(latent.float(), expected, atol=2e-3, rtol=2e-3)
        start = round(clip.start, 6)
        assert facts == {"video": clip.source, "start": start, "captions": clip.captions}


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_workers_and_the_file_system_change_no_byte(
    whole, videos, vae, tmp_path, monkeypatch, workers
):
    scandir = os.scandir

    def shuffled(path):
        entries = list(scandir(path))
        random.shuffle(entries)
        return contextlib.nullcontext(entries)

    monkeypatch.setattr(os, "scandir", shuffled)
    run(videos, vae, tmp_path / "out", workers=workers)
    assert content(tmp_path / "out") == content(whole)


@pytest.mark.parametrize("clips", [0, 1, 2, 5, 9, 10])
def test_an_interrupted_job_is_resumed_to_equal_bytes(whole, videos, vae, tmp_path, clips):
    out, asked = tmp_path / "out", []

    def stop():
        asked.append(None)
        return len(asked) > clips

    index = run(videos, vae, out, stop=stop)
    assert not index["complete"] and index == json.loads((out / "index.json").read_text())
    kept, said = sum(bucket["clips"] for bucket in index["buckets"].values()), []
    run(videos, vae, out, report=said.append)
    assert content(out) == content(whole)
    assert (f"{out} holds {kept} clips in {kept // 2} whole shards: resuming" in said) == (kept > 0)


def test_a_killed_job_is_resumed_to_equal_bytes(whole, videos, vae, tmp_path, monkeypatch):
    """Killed anywhere between two writes, with a line half written and a shard not yet listed."""
    out, left, add = tmp_path / "out", [], encode.Shard.add

    def kill(shard, clip):
        if not left.pop():
            raise KeyboardInterrupt
        add(shard, clip)

    monkeypatch.setattr(encode.Shard, "add", kill)
    for clips in (0, 3, 2, 5):
        left[:] = range(clips + 1)
        with pytest.raises(KeyboardInterrupt):
            run(videos, vae, out)
        (out / ".lock").write_text("process 1")  # held by nobody
        with (out / "videos.jsonl").open("a") as journal:
            journal.write('{"video": "b/')
        (out / "16x32").mkdir(exist_ok=True)
        (out / "16x32" / "00002.safetensors").write_bytes(b"half")
    left[:] = [True] * 100
    run(videos, vae, out)
    assert content(out) == content(whole)


def test_finished_videos_are_not_decoded_again(whole, videos, vae, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(encode, "read_clips", None)
    assert run(videos, vae, tmp_path / "out")["complete"]

    read, decoded = clip_reader.read_clips, []

    def record(sample, config):
        decoded.append(sample.name)
        return read(sample, config)

    monkeypatch.setattr(encode, "read_clips", record)
    out, count = tmp_path / "second", iter(range(100))
    run(videos, vae, out, stop=lambda: next(count) == 8)  # within b/4: a shard of each bucket
    assert {"a/1.mkv", "a/3.mkv"} <= set(decoded)
    decoded.clear()
    run(videos, vae, out)
    assert "a/1.mkv" not in decoded and "a/3.mkv" not in decoded
    assert content(out) == content(whole)


def test_another_job_is_refused_in_the_folder(whole, videos, vae, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    longer = dataclasses.replace(CONFIG, latent_frames=1)
    with pytest.raises(ValueError, match="out: expected a new folder, .* latent_frames 2, not 1"):
        run(videos, vae, out, longer)
    other = CausalVAE(tiny())
    other.latent_std.fill_(2.0)
    with pytest.raises(ValueError, match="out: expected a new folder, .* encoded with vae"):
        run(videos, other, out)
    with pytest.raises(ValueError, match="videos: expected the videos of the run that began"):
        run(videos / "c", vae, out)
    more = tmp_path / "more"
    shutil.copytree(videos, more)
    shutil.copy(more / "d.mkv", more / "e.mkv")
    with pytest.raises(ValueError, match="videos: expected the videos of the run that began"):
        run(more, vae, out)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").touch()
    with pytest.raises(ValueError, match="out: expected a new folder or one of encoded clips"):
        run(videos, vae, tmp_path / "used")


@pytest.fixture
def few(tmp_path):
    """Two videos of three clips with captions, and one without."""
    folder = tmp_path / "few"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.mkv").write_bytes(video(grey(27, 16, 32)))
        (folder / f"{name}.txt").write_text(name)
    (folder / "c.txt").unlink()
    return folder


def later(path, data=None):
    """Write a file one hour after its last change."""
    time = path.stat().st_mtime_ns if path.exists() else 0
    if data is not None:
        path.write_bytes(data)
    os.utime(path, ns=(time + 3600 * 10**9,) * 2)


CHANGES = {
    "a.mkv, which has changed": lambda few: later(few / "a.mkv", video(grey(28, 16, 32))),
    "b.txt, which has changed": lambda few: later(few / "b.txt", b"B"),  # of the same size
    "b.txt, which is gone": lambda few: (few / "b.txt").unlink(),
    "c.txt, which is new": lambda few: (few / "c.txt").write_text("c"),
    "c.json, which is new": lambda few: (few / "c.json").write_text('{"caption": "c"}'),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("clips", [None, 7])
def test_files_that_changed_since_are_noticed(few, vae, tmp_path, change, clips):
    """A finished job notices, and so does one stopped with all videos in its journal."""
    count = iter(range(100))
    index = run(few, vae, tmp_path / "out", stop=lambda: clips and next(count) == clips - 1)
    assert index["complete"] == (clips is None)
    shutil.copytree(few, tmp_path / "copy")  # another folder of the same files, with their times
    assert run(tmp_path / "copy", vae, tmp_path / "out")["complete"]
    CHANGES[change](few)
    with pytest.raises(ValueError) as error:
        run(few, vae, tmp_path / "out")
    assert str(error.value) == (
        f"videos: expected the files that {tmp_path / 'out'} was encoded from, got {change} since; "
        "take a new folder, or remove this one to encode all anew"
    )


def test_a_file_that_is_only_newer_is_no_other(few, vae, tmp_path):
    run(few, vae, tmp_path / "out")
    before = content(tmp_path / "out")
    for path in few.iterdir():
        later(path)
    run(few, vae, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_sidecars_of_another_motion_may_change(few, vae, tmp_path):
    run(few, vae, tmp_path / "out")
    (few / "a.camera.txt").write_text("new")
    (few / "a.keypoints.json").write_text("new")
    assert run(few, vae, tmp_path / "out")["complete"]


def test_a_video_that_changed_while_it_was_read_is_noticed(few, vae, tmp_path):
    """Its first clips are in a shard, but the journal has no line for it yet."""
    count = iter(range(100))
    index = run(few, vae, tmp_path / "out", stop=lambda: next(count) == 5)
    assert index["videos"]["read"] == 1 and index["buckets"]["32x16"]["clips"] == 4
    assert index["reading"]["video"] == "b.mkv"
    assert not run(few, vae, tmp_path / "out", stop=lambda: True)["complete"]
    later(few / "b.mkv", video(grey(26, 16, 32)))
    with pytest.raises(ValueError, match="got b.mkv, which has changed since"):
        run(few, vae, tmp_path / "out")


def test_keypoints_and_members_of_tars_are_files_too(few, vae, tmp_path):
    arm = json.dumps([entry(person({6: (6, 2), 8: (6, 14)}))])
    (few / "a.keypoints").mkdir()
    for number in (1, 2):
        (few / "a.keypoints" / f"{number}.json").write_text(arm[1:-1])
    (few / "b.mkv").unlink()
    config = dataclasses.replace(CONFIG, motion="pose")
    run(few, vae, tmp_path / "out", config)
    later(few / "a.keypoints" / "1.json", arm[1:-1].replace("14", "15").encode())
    with pytest.raises(ValueError, match="got a.keypoints, which has changed since"):
        run(few, vae, tmp_path / "out", config)
    for text in (b"one", b"two"):
        with tarfile.open(tmp_path / "s.tar", "w") as archive:
            archive.add(few / "a.mkv", "a.mkv")
            info = tarfile.TarInfo("a.txt")
            info.size = 3
            archive.addfile(info, io.BytesIO(text))
        if text == b"one":
            run(tmp_path / "s.tar", vae, tmp_path / "of-tar")
            later(tmp_path / "s.tar")
            assert run(tmp_path / "s.tar", vae, tmp_path / "of-tar")["complete"]
    later(tmp_path / "s.tar")
    with pytest.raises(ValueError, match="got s.tar//a.txt, which has changed since"):
        run(tmp_path / "s.tar", vae, tmp_path / "of-tar")


def test_folders_of_older_versions_are_resumed(whole, videos, vae, tmp_path):
    """Their journals have no stamps."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    lines = [json.loads(line) for line in (out / "videos.jsonl").read_text().splitlines()]
    for line in lines:
        assert all(len(stamp) == 3 for stamp in line.pop("files").values())
    (out / "videos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(videos, vae, out)["complete"]


def test_a_finished_folder_may_be_read_only(whole, videos, vae, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for name in ("open", "replace", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    assert run(videos, vae, whole) == json.loads((whole / "index.json").read_text())


def test_two_jobs_do_not_write_into_one_folder(whole, videos, vae, tmp_path):
    out, refused = tmp_path / "out", []

    def report(line):
        with pytest.raises(FolderInUse, match=f"in use by process {os.getpid()} on "):
            run(videos, vae, out)
        refused.append(line)

    run(videos, vae, out, report=report)
    assert len(refused) == 6 and content(out) == content(whole)


def test_a_full_disk_leaves_whole_shards(whole, videos, vae, tmp_path, monkeypatch):
    out, save, saved = tmp_path / "out", checkpoint.save_file, []

    def full(tensors, path, metadata):
        saved.append(path)
        if len(saved) == 4:  # the VAE is the first
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(encode.EncodeError) as error:
        run(videos, vae, out)
    assert "No space left on device" in str(error.value)
    assert str(error.value).endswith(f"{out} holds 4 clips in 2 whole shards")
    shards = {name: data for name, data in content(out).items() if name.endswith("safetensors")}
    assert len(shards) == 3 and shards.items() <= content(whole).items()  # two and the VAE
    run(videos, vae, out)
    assert content(out) == content(whole)


def test_an_output_that_cannot_be_made(videos, vae, whole, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(encode.EncodeError, match="Not a directory"):
        run(videos, vae, tmp_path / "file" / "out")
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "videos.jsonl").write_text('{"video": "a"}\nscratched\n')
    with pytest.raises(ValueError, match="videos.jsonl: line 2: expected a video's outcome"):
        run(videos, vae, tmp_path / "out")


def test_a_failing_source_stops_the_job(videos, vae, tmp_path, monkeypatch):
    def pictures(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(clip_reader, "pictures", pictures)
    with pytest.raises(encode.EncodeError, match="Input/output error.*holds 0 clips"):
        run(videos, vae, tmp_path / "out")


def test_latents_must_be_finite(videos, tmp_path):
    vae = CausalVAE(tiny())
    vae.latent_std.fill_(1e-9)
    with pytest.raises(encode.EncodeError, match="a/1.mkv: the VAE's latents are not finite"):
        run(videos, vae, tmp_path / "out")


def test_tar_shards_are_a_source_too(whole, videos, vae, tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "x.tar", "w") as archive:
        for path in sorted(videos.rglob("*.*")):
            archive.add(path, path.relative_to(videos).as_posix())
    os.truncate(tmp_path / "tars" / "x.tar", (tmp_path / "tars" / "x.tar").stat().st_size - 10_500)
    index = run(tmp_path / "tars", vae, tmp_path / "out")
    assert index["skipped"]["broken archive"] == 1
    for name in ("16x32/00000.safetensors", "32x16/00001.safetensors"):
        ours, theirs = load_file(tmp_path / "out" / name), load_file(whole / name)
        assert torch.equal(ours["latents"], theirs["latents"])


def test_camera_motion_is_stored_with_its_lens_and_deviation(vae, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mkv").write_bytes(video(grey(18, 16, 32)))
    (tmp_path / "v" / "a.txt").write_text("a")
    cameras = [yawed(0.0, (0.0, 0.0, 0.06 * n)) for n in range(18)]
    (tmp_path / "v" / "a.camera.txt").write_text(trajectory(cameras))
    config = dataclasses.replace(CONFIG, motion="camera")
    index = run(tmp_path / "v", vae, tmp_path / "out", config)
    shard = load_file(tmp_path / "out" / "32x16" / "00000.safetensors")
    assert shard["poses"].shape == (2, 2, 4, 4, 4) and shard["lens"].shape == (2, 4)
    # 0.06 along one axis of three, and no turn
    assert index["deviation"]["origin"] == pytest.approx(0.06 / 3**0.5, rel=1e-2)
    assert index["deviation"]["direction"] == pytest.approx(0, abs=1e-6)


def test_skeletons_are_encoded_like_the_video(vae, tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mkv").write_bytes(video(grey(9, 16, 32)))
    (tmp_path / "v" / "a.txt").write_text("a")
    arms = [entry(person({6: (4 + n, 2), 8: (4 + n, 14)})) for n in range(9)]
    (tmp_path / "v" / "a.keypoints.json").write_text(json.dumps(arms))
    config = dataclasses.replace(CONFIG, motion="pose")
    run(tmp_path / "v", vae, tmp_path / "out", config)
    skeletons = load_file(tmp_path / "out" / "32x16" / "00000.safetensors")["skeletons"]
    (clip,) = clip_reader.read_clips(find_samples(tmp_path / "v")[0], config)
    drawn = torch.from_numpy(clip.skeletons).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(drawn)[:, :, 1:]
    assert skeletons.shape == (1, 16, 2, 2, 4)
    torch.testing.assert_close(skeletons.float(), expected, atol=2e-3, rtol=2e-3)


@pytest.fixture
def command(vae, monkeypatch):
    """`aapt encode` with the VAE above behind a model of 32 x 16."""

    monkeypatch.setattr("aapt.commands.encode._autoencoder", lambda name: (vae, "32x16", 24, 2))
    return lambda *arguments: main(["encode", *map(str, arguments)])


def test_the_command(command, whole, videos, tmp_path, capsys):
    options = ["--out", tmp_path / "out", "--seconds", 8 / 24, "--shard-clips", 2]
    options += ["--bucket", "32x16", "--bucket", "16x32"]
    assert command(videos, *options) == 0
    ours, theirs = content(tmp_path / "out"), content(whole)
    assert ours == theirs
    output = capsys.readouterr()
    rows = [" ".join(line.split()) for line in output.out.splitlines()]
    assert rows == [
        "videos 6 used of 9 read, 9 found",
        "clips 0.33 s each, motion none",
        "16x32 5 in 3 shards",
        "32x16 6 in 3 shards",
        "captions up to 11 bytes",
        "skipped 3",
        "cannot be decoded 1",
        "no caption 1",
        "too short 1",
    ]
    assert output.err.splitlines()[0] == "32x16/00000.safetensors: 2 clips; 0 of 9 videos"
    assert command(videos, *options, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(ours["index.json"])


def test_help_has_examples(capsys):
    assert main(["encode", "--help"]) == 0
    assert "Examples:\n    aapt encode" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(command, videos, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    for arguments, code, message in [
        ([tmp_path / "none", "--out", out], 2, "videos: expected a folder, a .tar or a video"),
        ([videos, "--out", out, "--bucket", "30x16"], 2, "bucket: expected multiples of 16"),
        ([videos, "--out", out, "--seconds", "nan"], 2, "seconds: expected a finite number"),
        ([videos, "--out", out, "--stride", "0"], 2, "stride: expected a finite number above 0"),
        ([videos, "--out", out, "--motion", "up"], 2, "motion: expected none, camera or pose"),
        (
            [videos, "--out", out, "--device", "dsp"],
            2,
            "device: expected cpu, cuda or ",
        ),
        ([videos, "--out", whole], 2, "out: expected a new folder, "),
        ([videos, "--out", out, "--motion", "pose"], 1, "no clip could be used; "),
    ]:
        assert command(*arguments) == code
        output = capsys.readouterr()
        assert message in output.err and output.err.count("\n") == 1

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert command(videos, "--out", tmp_path / "full", "--seconds", 0.3) == 1
    said = capsys.readouterr().err
    assert "No space left" in said and said.endswith("; the same command resumes\n")


def test_ctrl_c_ends_the_command_between_clips(command, videos, whole, tmp_path, capsys):
    import signal

    add, options = encode.Shard.add, ["--out", tmp_path / "out", "--seconds", 8 / 24]
    options += ["--shard-clips", 2, "--bucket", "32x16", "--bucket", "16x32"]

    def interrupt(shard, clip):
        signal.raise_signal(signal.SIGINT)
        add(shard, clip)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode.Shard, "add", interrupt)
        assert command(videos, *options) == 130
    assert capsys.readouterr().err.endswith("aapt: interrupted: the same command resumes\n")
    assert command(videos, *options) == 0
    assert content(tmp_path / "out") == content(whole)
