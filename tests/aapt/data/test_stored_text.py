"""Embeddings of captions in shards: stored once, looked up by caption, in no trainer's memory."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from aapt.commands.app import main
from aapt.data.latent_shards import DataError, LatentShards
from aapt.data.stored_text import StoredText
from aapt.data.videos import encode
from aapt.data.videos.buckets import Bucket
from aapt.data.videos.clip_reader import CutConfig
from aapt.data.videos.parts import Part
from aapt.model.umt5 import UMT5TextEncoder
from aapt.vae import CausalVAE, tiny

from .videos.videos import grey, video

WIDTH, TOKENS = 6, 5
CONFIG = CutConfig(((Bucket(32, 16),),), latent_frames=2, stride=9)  # clips of 9 frames
CAPTIONS = {"a": ["a fox"], "b": ["the sea at noon", "a fox"], "c": ["snow"]}


def rows(prompt: str) -> torch.Tensor:
    """Embeddings that tell prompts apart: a row per word and one at the end."""
    words = [*prompt.split(), ""]
    return torch.tensor([[len(prompt), n, *map(len, [word] * (WIDTH - 2))] for n, word in
                         enumerate(words)]).bfloat16()  # fmt: skip


def text(digest: str = "one"):
    """A text encoder that counts its calls."""
    asked = []
    embed = lambda prompt: asked.append(prompt) or rows(prompt)  # noqa: E731
    return SimpleNamespace(embed=embed, asked=asked, tokens=TOKENS, digest=lambda: digest)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return CausalVAE(tiny()).eval()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, captions in CAPTIONS.items():
        (folder / f"{name}.mkv").write_bytes(video(grey(18, 16, 32)))
        (folder / f"{name}.json").write_text(json.dumps({"captions": captions}))
    return folder


def run(videos, vae, out, **options):
    return encode.encode(videos, vae, out, CONFIG, **{"shard_clips": 4, **options})


def test_captions_are_found_by_their_words(videos, vae, tmp_path):
    encoder = text()
    run(videos, vae, tmp_path, text=encoder)
    # Once per shard, beside the empty prompt
    assert encoder.asked == ["", "a fox", "the sea at noon", "", "snow"]
    stored = StoredText([tmp_path])
    for prompt in ("", "a fox", "the sea at noon", "snow"):
        assert torch.equal(stored(prompt), rows(prompt))
    shard = load_file(tmp_path / "32x16/00000.safetensors")
    assert shard["text"].shape == (1 + 3 + 5, WIDTH) and shard["text_ends"].tolist() == [1, 4, 9]
    with pytest.raises(DataError, match="text: expected a caption of the encoded clips or the em"):
        stored("the moon")
    assert copy.deepcopy(stored) is stored
    # The clips themselves read as before
    assert len(LatentShards(tmp_path)) == 6


def test_a_model_reads_them_padded_with_zeros(videos, vae, tmp_path):
    run(videos, vae, tmp_path, text=text())
    encoder = UMT5TextEncoder(TOKENS, WIDTH)
    encoder.source = StoredText([tmp_path])
    embeddings, lengths = encoder(["snow", "the sea at noon"])
    assert embeddings.shape == (2, TOKENS, WIDTH) and lengths.tolist() == [2, 5]
    assert torch.equal(embeddings[0, :2], rows("snow").float()) and not embeddings[0, 2:].any()


def test_parts_and_folders_are_read_together(videos, vae, tmp_path):
    for number in range(2):
        run(videos, vae, tmp_path / "parts", text=text(), part=Part(number, 2))
    other = tmp_path / "videos"
    other.mkdir()
    (other / "z.mkv").write_bytes(video(grey(9, 16, 32)))
    (other / "z.txt").write_text("rain")
    run(other, vae, tmp_path / "more", text=text())
    stored = StoredText([tmp_path / "parts", tmp_path / "more"])
    for prompt in ("a fox", "snow", "rain"):
        assert torch.equal(stored(prompt), rows(prompt))


def test_folders_that_do_not_fit(videos, vae, tmp_path):
    run(videos, vae, tmp_path / "none")
    with pytest.raises(DataError, match="expected embeddings of captions, got none; encode the vi"):
        StoredText([tmp_path / "none"])
    with pytest.raises(ValueError, match="was encoded with text None, not {'kind': 'umt5'"):
        run(videos, vae, tmp_path / "none", text=text())
    run(videos, vae, tmp_path / "one", text=text())
    run(videos, vae, tmp_path / "two", text=text("two"))
    with pytest.raises(DataError, match="expected embeddings of one text encoder, got .*two.* aft"):
        StoredText([tmp_path / "one", tmp_path / "two"])
    path = tmp_path / "one" / "32x16" / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="expected a whole shard with embeddings"):
        StoredText([tmp_path / "one"])


def test_the_command_names_a_folder_without_umt5(videos, tmp_path, capsys):
    given = ["encode", str(videos), "--out", str(tmp_path / "out"), "--text", str(tmp_path)]
    assert main([*given, "--bucket", "128x80"]) == 2
    said = capsys.readouterr().err
    assert "expected UMT5, as text_encoder/ and tokenizer/ or as" in said and said.count("\n") == 1
    assert not Path(tmp_path / "out").exists()
