"""Inputs of a failed update are written and read again."""

import json
import math
import os

import pytest
import torch
from safetensors import safe_open

from aapt.runs.failed_update import RecordedSets, save_inputs

from ..helpers import clips, draws


def read(path):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, {key: json.loads(value) for key, value in file.metadata().items()}


def test_all_that_an_update_drew_is_kept(tmp_path):
    sets = RecordedSets({"encode": clips()})
    random = draws(2, seed=3, step=7)
    first = sets["encode"].sample(random, 4)
    second = sets["encode"].sample(random, 2, first_frame="never")
    assert sets.drawn == [first, second]
    path = tmp_path / "adversarial" / "inputs-7.safetensors"
    save_inputs(path, sets.drawn, seed=3, step=7, metrics={"loss": math.nan, "gradient": 2.0})
    tensors, facts = read(path)
    assert list(tensors) == ["0.latents", "0.motion", "1.latents", "1.motion"]
    assert torch.equal(tensors["0.latents"], first.latents)
    assert torch.equal(tensors["1.motion"], second.motion)
    assert (facts["seed"], facts["step"]) == (3, 7)
    assert facts["0.prompts"] == list(first.prompts)
    assert facts["metrics"] == {"loss": "nan", "gradient": 2.0}


def test_motion_that_an_update_read_is_kept_too(tmp_path):
    """Also from the part of a set that serves the update."""
    recorded = RecordedSets({"a": clips()})
    part = recorded["a"].part(draws(2), 3)
    assert len(part) == len(clips())
    motion = part.motion([1, 0])
    save_inputs(tmp_path / "a", recorded.drawn, seed=0, step=0, metrics={})
    tensors, _ = read(tmp_path / "a")
    assert torch.equal(tensors["0.batch"], motion)


def test_recorded_sets_draw_the_same_batches():
    plain, recorded = clips(), RecordedSets({"a": clips()})
    plain.latents.copy_(recorded.sets["a"].latents)
    seen = recorded["a"].sample(draws(2), 3)
    assert torch.equal(seen.latents, plain.sample(draws(2), 3).latents)
    with pytest.raises(KeyError, match="b"):
        recorded["b"]


def test_batches_of_pixels_and_uncontrolled_clips_are_kept_too(tmp_path):
    video = torch.randn(2, 3, 5, 8, 8).transpose(3, 4)  # as it comes, not contiguous
    uncontrolled = clips().sample(draws(1), 2)
    object.__setattr__(uncontrolled, "motion", None)
    save_inputs(tmp_path / "a", [video, uncontrolled], seed=0, step=0, metrics={})
    tensors, facts = read(tmp_path / "a")
    assert torch.equal(tensors["0.batch"], video)
    assert facts["1.motion"] is None and "1.motion" not in tensors


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "inputs.safetensors"
    save_inputs(path, [torch.ones(2)], seed=0, step=1, metrics={})

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_inputs(path, [torch.zeros(2)], seed=0, step=2, metrics={})
    tensors, facts = read(path)
    assert facts["step"] == 1 and torch.equal(tensors["0.batch"], torch.ones(2))
