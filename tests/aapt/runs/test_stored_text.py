"""Training of a model that reads UMT5: captions come from the shards, no encoder is loaded."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from aapt.checkpoint import read_tensors
from aapt.data.videos.buckets import Bucket
from aapt.data.videos.clip_reader import CutConfig
from aapt.data.videos.encode import encode
from aapt.model.umt5 import UMT5TextEncoder

from ..data.videos.videos import grey, video
from .test_inputs import MODEL, recipe, train, vae

SIZES = (Bucket(48, 32), Bucket(96, 64), Bucket(32, 16))
READS_UMT5 = dataclasses.replace(MODEL, text_encoder="umt5")


def encoded(folder, text):
    videos = folder / "videos"
    videos.mkdir(parents=True)
    for name in "ab":
        (videos / f"{name}.mkv").write_bytes(video(grey(18, 64, 96)))
        (videos / f"{name}.txt").write_text(f"this is {name}")
    config = CutConfig((SIZES,), latent_frames=2, stride=9)
    encode(videos, vae(), folder / "latents", config, text=text)
    return folder / "latents"


def text(width: int):
    def embed(prompt):
        return torch.randn(2, width, generator=torch.Generator().manual_seed(len(prompt)))

    return SimpleNamespace(embed=embed, tokens=12, digest=lambda: "one")


def test_a_stage_trains_on_stored_embeddings(tmp_path, monkeypatch):
    latents = encoded(tmp_path, text(MODEL.text_width))
    read = []
    forward = UMT5TextEncoder.forward

    def reading(encoder, prompts):
        read.extend(prompts)
        return forward(encoder, prompts)

    monkeypatch.setattr(UMT5TextEncoder, "forward", reading)
    made = recipe(model=READS_UMT5)
    train(tmp_path / "run", latents, stages=["diffusion"], made=made)
    assert set(read) <= {"", "this is a", "this is b"} and read
    weights = read_tensors(tmp_path / "run" / "diffusion" / "weights.safetensors")
    assert not any(name.startswith("text_encoder") for name in weights)
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_clips_without_embeddings_stop_the_run_at_once(tmp_path):
    made = recipe(model=READS_UMT5)
    latents = encoded(tmp_path / "none", None)
    with pytest.raises(ValueError, match="expected embeddings of captions, got none; encode the"):
        train(tmp_path / "run", latents, made=made)
    wide = encoded(tmp_path / "wide", text(MODEL.text_width + 1))
    with pytest.raises(ValueError, match="latents: expected embeddings of 8 channels, got 9; enco"):
        train(tmp_path / "run", wide, made=made)
    assert not (tmp_path / "run").exists()
