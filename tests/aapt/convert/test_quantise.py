"""Checkpoints in 8 bits: written, checked, loaded, and streams of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from aapt import Control, StreamingGenerator
from aapt.checkpoint import BUNDLED, CheckpointError
from aapt.convert.quantise import quantise
from aapt.model.float8 import quantise_blocks, quantise_weight

PLAIN = BUNDLED / "tiny-world"
CONTROLS = [Control(forward=1.0, yaw=0.3 * float(np.sin(i / 5))) for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised") / "tiny"
    quantise("tiny-world", path)
    return path


def tensors(path):
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def open_stream(generator):
    picture = Image.open(generator.sample_image()).convert("RGB")
    picture = picture.resize((generator.width, generator.height))
    return generator.open(np.asarray(picture), generator.sample_prompt)


def psnr(one, other) -> float:
    error = (one.astype(np.float64) - other.astype(np.float64)) ** 2
    return float(10 * np.log10(255**2 / error.mean()))


def test_a_file_has_rounded_weights_and_everything_else_as_it_was(folder):
    before, after = tensors(PLAIN), tensors(folder)
    rounded = [name for name in before if name + "_scale" in after]
    assert len(rounded) == 45 and all(".blocks." in name for name in rounded)
    for name, tensor in before.items():
        if name in rounded:
            values, scales = quantise_weight(tensor)
            assert torch.equal(after[name].view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(after[name + "_scale"], scales)
        else:
            assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)
    assert set(after) == set(before) | {name + "_scale" for name in rounded}
    for name in ("vae.safetensors", "original_vae.safetensors", "sample.png", "neon.png"):
        assert (folder / name).read_bytes() == (PLAIN / name).read_bytes()
    assert StreamingGenerator.from_pretrained(folder, decoder="original_vae").themes


def test_a_loaded_checkpoint_is_the_model_rounded_in_memory(folder):
    loaded = StreamingGenerator.from_pretrained(folder)
    made = StreamingGenerator.from_pretrained("tiny-world")
    quantise_blocks(made.model.transformer)
    with open_stream(loaded) as ours, open_stream(made) as expected:
        for control in CONTROLS[:2]:
            assert np.array_equal(ours.step(control), expected.step(control))
    half = StreamingGenerator.from_pretrained(folder, dtype=torch.bfloat16)
    states = (each.model.state_dict() for each in (loaded, half))
    for name, (one, other) in zip(loaded.model.state_dict(), zip(*map(dict.values, states))):
        kept = name.endswith("_scale") or one.dtype == torch.float8_e4m3fn
        assert other.dtype == (one.dtype if kept else torch.bfloat16), name


def test_five_seconds_of_steps_are_near_those_of_float32(folder):
    """Each step from the state that float32 has reached: alone, small differences grow."""
    exact = StreamingGenerator.from_pretrained("tiny-world")
    rounded = StreamingGenerator.from_pretrained(folder)
    expected, ours = [], []
    with open_stream(exact) as stream, open_stream(rounded) as twin:
        for control in CONTROLS:
            twin.restore(stream.snapshot())
            expected.append(stream.step(control))
            ours.append(twin.step(control))
    assert psnr(np.concatenate(expected), np.concatenate(ours)) > 46
    assert min(map(psnr, expected, ours)) > 43


def test_a_scale_that_was_changed_on_the_disk_is_refused(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = broken / "model.safetensors"
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    scale = next(name for name in header if name.endswith("_scale"))
    content[8 + size + header[scale]["data_offsets"][0] + 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors: expected SHA-256 .*, got .*; "):
        StreamingGenerator.from_pretrained(broken)


def test_other_sources_and_places_are_refused(folder, tmp_path):
    words = "^source: expected a checkpoint in its own precision, got .*; pass the checkpoint that "
    with pytest.raises(ValueError, match=words):
        quantise(folder, tmp_path / "twice")
    with pytest.raises(ValueError, match="^out: expected a folder without a checkpoint, got "):
        quantise("tiny-world", folder)
    assert not (tmp_path / "twice").exists()


def test_weights_without_a_tensor_are_refused(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(PLAIN, source)
    rest = tensors(source)
    name = next(name for name in rest if ".blocks." in name)
    del rest[name]
    save_file(rest, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors: expected tensor {name}, which"):
        quantise(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
