"""Encoding in parts, by several processes into one folder, and in chunks, in fixed memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aapt.data.latent_shards import LatentShards, read_index
from aapt.data.videos import encode, parts, shard
from aapt.data.videos.buckets import Bucket
from aapt.data.videos.clip_reader import CutConfig
from aapt.data.videos.parts import Part
from aapt.vae import CausalVAE, tiny, wan

from .videos import grey, video

CONFIG = CutConfig(((Bucket(32, 16),),), latent_frames=2, stride=9)  # clips of 9 frames


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return CausalVAE(tiny()).eval()


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for number, clips in enumerate((2, 1, 3, 1, 1)):
        (folder / f"{number}.mkv").write_bytes(video(grey(9 * clips, 16, 32)))
        (folder / f"{number}.txt").write_text(f"this is {number}")
    return folder


def run(videos, vae, out, **options):
    return encode.encode(videos, vae, out, CONFIG, **{"shard_clips": 2, **options})


def clips_of(folder, index):
    """(video, start, latents) of every clip of a folder's index, by the first two."""
    from safetensors import safe_open

    found = {}
    for entry in index["buckets"]["32x16"]["shards"]:
        with safe_open(folder / entry["file"], "pt") as file:
            about = json.loads(file.metadata()["clips"])
            for facts, latent in zip(about, file.get_tensor("latents"), strict=True):
                found[facts["video"], facts["start"]] = latent
    return found


def test_parts_together_are_the_whole(videos, vae, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    alone = run(videos, vae, whole)
    said = []
    for number in (2, 0, 1):
        assert not (out / "index.json").exists()
        run(videos, vae, out, part=Part(number, 3), report=said.append)
    joined = read_index(out)
    assert said[-1] == f"{out}: joined 3 parts"
    for key in ("encoding", "videos", "skipped", "complete"):
        assert joined[key] == alone[key]
    bucket = joined["buckets"]["32x16"]
    assert bucket["clips"] == 8 and bucket["caption_bytes"] == {"9": 8}
    assert bucket["shards"][0]["file"].startswith("0-of-3/32x16/")
    ours, theirs = clips_of(out, joined), clips_of(whole, alone)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[clip], theirs[clip]) for clip in theirs)
    # What trains and what decodes reads the folder like any other
    assert len(LatentShards(out)) == 8
    assert (out / "vae.safetensors").read_bytes() == (whole / "vae.safetensors").read_bytes()
    before = (out / "index.json").read_bytes()
    run(videos, vae, out, part=Part(1, 3))
    assert (out / "index.json").read_bytes() == before


def test_a_part_that_stopped_is_resumed(videos, vae, tmp_path):
    out = tmp_path / "out"
    stops = iter([False, True])
    assert not run(videos, vae, out, part=Part(0, 2), stop=lambda: next(stops))["complete"]
    run(videos, vae, out, part=Part(1, 2))
    assert not (out / "index.json").exists()
    assert run(videos, vae, out, part=Part(0, 2))["complete"]
    assert read_index(out)["buckets"]["32x16"]["clips"] == 8


def test_more_parts_than_videos(videos, vae, tmp_path):
    for number in range(7):
        run(videos, vae, tmp_path / "out", part=Part(number, 7))
    assert read_index(tmp_path / "out")["buckets"]["32x16"]["clips"] == 8


def test_parts_that_do_not_fit(videos, vae, tmp_path):
    for text in ("1", "a/b", "2/2", "0/0", "-1/2"):
        with pytest.raises(ValueError, match="shard: expected I/N"):
            Part.parse(text)
    out = tmp_path / "out"
    run(videos, vae, out, part=Part(0, 2))
    with pytest.raises(
        ValueError, match="shard: expected parts as in .*0-of-2, got 0/3; take a ne"
    ):
        run(videos, vae, out, part=Part(0, 3))
    with pytest.raises(ValueError, match="out: expected parts with one encoding, got another in"):
        run(videos, vae, out, part=Part(1, 2), shard_clips=3)
    run(videos, vae, tmp_path / "whole")
    with pytest.raises(ValueError, match="out: expected a new folder or one of parts, got"):
        run(videos, vae, tmp_path / "whole", part=Part(0, 2))


def test_two_processes_that_end_together(videos, vae, tmp_path, monkeypatch):
    """The second finds the lock held, and leaves joining to the first."""
    out = tmp_path / "out"
    run(videos, vae, out, part=Part(0, 2))
    from aapt.lock import folder_lock

    with folder_lock(out):
        assert run(videos, vae, out, part=Part(1, 2))["complete"]
    assert not (out / "index.json").exists()
    parts.join(out, 2, lambda line: None)
    assert read_index(out)["complete"]


@pytest.mark.parametrize("frames, pixels", [(1, 10), (361, 1280 * 720), (121, 736 * 416), (9, 7)])
def test_chunks_cover_a_clip_once(frames, pixels):
    slices = list(shard.chunks(frames, 4, pixels))
    covered = [n for part in slices for n in range(frames)[part]]
    assert covered == list(range(frames))
    assert all((s.stop - s.start - (s.start == 0)) % 4 == 0 for s in slices)
    assert all(s.stop - s.start <= 1 + max(4, shard.CHUNK_PIXELS // pixels) for s in slices)


def test_chunks_give_the_latents_of_the_whole_clip(videos, tmp_path, monkeypatch):
    torch.manual_seed(0)
    vae = CausalVAE(wan(8)).eval()
    whole = run(videos, vae, tmp_path / "whole")
    monkeypatch.setattr(shard, "CHUNK_PIXELS", 1)  # 4 frames at a time
    chunked = run(videos, vae, tmp_path / "chunked")
    ours = clips_of(tmp_path / "chunked", chunked)
    for clip, latent in clips_of(tmp_path / "whole", whole).items():
        torch.testing.assert_close(ours[clip], latent, atol=2e-3, rtol=2e-3)


def test_bfloat16_is_part_of_the_encoding(videos, vae, tmp_path):
    out = tmp_path / "out"
    index = run(videos, vae, out, dtype=torch.bfloat16)
    assert index["encoding"]["dtype"] == "bfloat16"
    assert index["encoding"]["vae"] == run(videos, vae, tmp_path / "full")["encoding"]["vae"]
    ours, exact = clips_of(out, index), clips_of(tmp_path / "full", read_index(tmp_path / "full"))
    for clip, latent in exact.items():
        torch.testing.assert_close(ours[clip], latent, atol=5e-2, rtol=5e-2)
    assert not all(torch.equal(ours[clip], exact[clip]) for clip in exact)
    with pytest.raises(ValueError, match="was encoded with dtype bfloat16, not None"):
        run(videos, vae, out)


def test_a_decoder_alone_encodes_nothing(videos, tmp_path):
    with pytest.raises(ValueError, match="model: expected an autoencoder, got a decoder alone; pa"):
        run(videos, CausalVAE(wan(2).without_encoder()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_torchrun_gives_every_rank_its_part(videos, vae, tmp_path, monkeypatch, capsys):
    """The command under torchrun's variables: the last rank joins the parts."""
    from aapt.commands.app import main

    monkeypatch.setattr("aapt.commands.encode._autoencoder", lambda name: (vae, "32x16", 24, 2))
    out = tmp_path / "out"
    given = ["encode", str(videos), "--out", str(out), "--seconds", str(8 / 24)]
    for rank in range(2):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        assert main([*given, "--shard-clips", "2"]) == 0
    assert f"{out}: joined 2 parts" in capsys.readouterr().err
    joined = read_index(out)
    assert joined["buckets"]["32x16"]["clips"] == 8
    monkeypatch.delenv("WORLD_SIZE")
    for options, message in [
        (["--shard", "2/2"], "shard: expected I/N with I from 0 to N - 1, got 2/2"),
        (["--dtype", "int8"], "dtype: expected one of float32, bfloat16, got int8"),
        (["--shard", "0/3"], "shard: expected parts as in "),
    ]:
        assert main([*given, *options]) == 2
        assert message in capsys.readouterr().err


PEAK = """
import re, sys, torch
from pathlib import Path
from aapt.data.videos.shard import Shard
from aapt.vae import CausalVAE, wan
import numpy as np
from types import SimpleNamespace
torch.set_num_threads(1)
vae = CausalVAE(wan(16)).eval().requires_grad_(False)
frames = np.zeros((int(sys.argv[1]), 128, 128, 3), np.uint8)
clip = SimpleNamespace(video=frames, source="", start=0.0, captions=[""])
clip.poses = clip.skeletons = None
from aapt.data.videos import shard
shard.CHUNK_PIXELS = 4 * 128 * 128
Shard(vae).add(clip)
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_a_clip():
    """But for the clip's own pixels, 0.05 MB per frame. The whole clip at once took 9 MB per
    frame."""

    def peak(frames):
        command = [sys.executable, "-c", PEAK, str(frames)]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    short, long = peak(21), peak(53)
    assert long - short <= 48 << 20, (short, long)
