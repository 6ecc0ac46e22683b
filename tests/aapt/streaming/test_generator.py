"""Streams: seeds, isolation, prompts, memory, and checkpoints that cannot be used."""

import dataclasses
import gc
import json
import re
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from aapt import Control, StreamingGenerator
from aapt.checkpoint import CheckpointError, load_config, save_config, save_module
from aapt.model.config import SamplingConfig
from aapt.vae import CausalVAE, VAEConfig, to_bytes
from aapt.vae.pixels import to_array

from ..helpers import CAMERA, tiny_model

VAE = VAEConfig(
    encoder_channels=(4, 8, 8),
    decoder_channels=(4, 8, 8),
    encoder_blocks=(0, 1, 0),
    decoder_blocks=(0, 1, 0),
    strides=((2, 2), (2, 1)),
    latent_channels=4,
    patch_size=4,
    time_kernels=(3, 1),
    upsample="shuffle",
)
HEIGHT, WIDTH = 32, 48


def build() -> tuple:
    model = tiny_model(sink_distance="clamped", residual_head=True, output_clamp=4.0).float()
    torch.manual_seed(1)
    return model, CausalVAE(VAE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    model, vae = build()
    save_module(path / "model.safetensors", model, torch.bfloat16)
    save_module(path / "vae.safetensors", vae, torch.bfloat16)
    config = {"height": HEIGHT, "width": WIDTH, "fps": 24, "prompts": ["ab", "cd"]}
    parts = {"model": model.config, "camera": CAMERA, "vae": VAE}
    save_config(path, {**config, **{k: dataclasses.asdict(v) for k, v in parts.items()}})
    return path


@pytest.fixture(scope="module")
def generator(folder):
    return StreamingGenerator.from_pretrained(folder)


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def play(stream, controls):
    return np.concatenate([stream.step(control) for control in controls])


WALK = [Control(forward=1.0), Control(yaw=-0.5), Control(yaw=1.0, forward=-0.3)] * 3


def test_frames_come_in_fours(generator, picture):
    stream = generator.open(picture, prompt="ab", seed=0)
    assert stream.first_frame.shape == (1, HEIGHT, WIDTH, 3)
    frames = stream.step(Control())
    assert frames.shape == (4, HEIGHT, WIDTH, 3) and frames.dtype == np.uint8
    assert stream.steps == 1 and generator.frames_per_step == 4


def test_same_seed_same_video(generator, picture):
    videos = [play(generator.open(picture, "ab", seed), WALK) for seed in (3, 3, 4)]
    assert np.array_equal(videos[0], videos[1])
    assert not np.array_equal(videos[0], videos[2])


def test_streams_never_touch_each_other(generator, picture):
    alone = [play(generator.open(picture, "ab", seed), WALK) for seed in (0, 1)]
    streams = [generator.open(picture, "ab", seed) for seed in (0, 1)]
    together = [[stream.step(control) for stream in streams] for control in WALK]
    for index in range(2):
        frames = np.concatenate([pair[index] for pair in together])
        assert np.array_equal(frames, alone[index])


def test_a_stream_takes_over_what_one_that_ended_has_left(generator, picture):
    frames, decoders = [], []
    for _ in range(2):
        stream = generator.open(picture, "a desert", seed=3)
        other = generator.open(picture, "a desert", seed=4)
        other.step(Control(yaw=1.0))
        frames.append([stream.first_frame, *(stream.step(Control(forward=1.0)) for _ in range(3))])
        decoders.append({id(stream._memory), id(other._memory)})
        del stream, other
        gc.collect()
    assert decoders[0] == decoders[1] and len(decoders[0]) == 2
    assert np.array_equal(np.concatenate(frames[0]), np.concatenate(frames[1]))


def test_streaming_decode_equals_whole_clip(generator, picture):
    """The stream's pixels are those of decoding all its latents at once."""
    stream = generator.open(picture, "ab", seed=0)
    latents, frames = [stream._memory.latent.clone()], [stream.first_frame]
    for control in WALK:
        frames.append(stream.step(control))
        latents.append(stream._memory.latent.clone())
    whole = to_array(to_bytes(generator.vae.decode(torch.cat(latents, dim=2))))
    difference = np.abs(whole.astype(int) - np.concatenate(frames).astype(int))
    assert difference.max() <= 1  # rounding to uint8


def test_controls_and_prompts_change_the_future_only(generator, picture):
    plain = generator.open(picture, "ab", seed=0)
    turned = generator.open(picture, "ab", seed=0)
    assert np.array_equal(play(plain, WALK[:3]), play(turned, WALK[:3]))
    turned.prompt = "something else"
    assert turned.prompt == "something else"
    assert not np.array_equal(plain.step(WALK[0]), turned.step(WALK[0]))
    steered = generator.open(picture, "ab", seed=0)
    straight = generator.open(picture, "ab", seed=0)
    assert not np.array_equal(steered.step(Control(yaw=1.0)), straight.step(Control(yaw=-1.0)))


def resident(name):
    """A figure of this process's memory in KiB, by its name in /proc."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", status)[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_stream(generator, picture):
    stream = generator.open(picture, "ab", seed=0)
    for _ in range(40):
        stream.step(Control(forward=1.0))
    cache = stream._memory.rollout.cache.k.data_ptr()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    for _ in range(300):
        stream.step(Control(forward=1.0))
    assert resident("VmHWM") - before < 4096
    assert stream._memory.rollout.cache.k.data_ptr() == cache


@pytest.mark.parametrize(
    "bad", [np.zeros((HEIGHT, WIDTH, 4), np.uint8), np.zeros((HEIGHT, WIDTH, 3)), np.zeros(3)]
)
def test_first_frame_must_fit(generator, bad):
    with pytest.raises(ValueError, match=r"first_frame: expected uint8 \(32, 48, 3\), got"):
        generator.open(bad, "ab")


def test_prompt_must_be_text(generator, picture):
    with pytest.raises(ValueError, match="prompt: expected a string, got 7"):
        generator.open(picture, 7)


def test_a_prompt_that_is_cut_is_said(generator, picture):
    read = generator.model.text_encoder.tokens - 1
    long = "a" * (read + 3)
    message = f"prompt: expected at most {read} bytes, got {read + 3}; only '{'a' * read}' is read"
    with pytest.warns(UserWarning, match=message):
        stream = generator.open(picture, long)
    with pytest.warns(UserWarning, match=message):
        stream.prompt = long
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream.prompt = "a" * read


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "a"])
def test_seeds_are_checked(generator, picture, seed):
    with pytest.raises(ValueError, match="seed: expected an integer from 0 to"):
        generator.open(picture, "ab", seed)


def test_controls_are_controls(generator, picture):
    with pytest.raises(ValueError, match=r"control: expected a Control, got \(0, 1\)"):
        generator.open(picture, "ab").step((0, 1))


def test_half_precision_models_stream(picture):
    model, vae = build()
    half = StreamingGenerator(model.bfloat16(), vae, height=HEIGHT, width=WIDTH, prompts=["ab"])
    stream = half.open(picture, "ab")
    assert stream._memory.rollout.cache.k.dtype == torch.bfloat16
    assert play(stream, WALK[:3]).shape == (12, HEIGHT, WIDTH, 3)


def test_precision_and_size_are_chosen_at_loading(folder, picture):
    generator = StreamingGenerator.from_pretrained(folder, dtype=torch.bfloat16, size=(48, 64))
    weights = [*generator.model.parameters(), *generator.vae.parameters()]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    wide = np.zeros((48, 64, 3), np.uint8)
    assert generator.open(wide, "ab").step(Control(yaw=1.0)).shape == (4, 48, 64, 3)
    with pytest.raises(ValueError, match=r"first_frame: expected uint8 \(48, 64, 3\)"):
        generator.open(picture, "ab")
    with pytest.raises(ValueError, match="^height, width: expected multiples of 16, got 40 x 64; "):
        StreamingGenerator.from_pretrained(folder, size=(40, 64))


def test_a_device_that_is_not_there_is_said(folder):
    with pytest.raises(ValueError, match="^device: expected cpu, cuda or cuda:N, got no-such-"):
        StreamingGenerator.from_pretrained(folder, device="no-such-device")


def test_weights_are_loaded_one_tensor_at_a_time(folder, monkeypatch):
    """No more than one tensor of the file is alive at any moment, and the values are the file's."""
    alive, most = [], 0

    class File:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            nonlocal most
            tensor = self.file.get_tensor(name)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(each() is not None for each in alive))
            return tensor

    monkeypatch.setattr("aapt.checkpoint.safe_open", File)
    generator = StreamingGenerator.from_pretrained(folder)
    assert len(alive) > 20 and most == 1
    for name, stored in load_file(folder / "model.safetensors").items():
        assert torch.equal(generator.model.state_dict()[name], stored.float()), name


def test_parts_must_fit():
    model, vae = build()
    with pytest.raises(ValueError, match="height, width: expected multiples of 16, got 40 x 48"):
        StreamingGenerator(model, vae, height=40, width=48)
    other = CausalVAE(dataclasses.replace(VAE, latent_channels=8))
    with pytest.raises(ValueError, match="latent_channels: expected 8, as the VAE has it, got 4"):
        StreamingGenerator(model, other, height=HEIGHT, width=WIDTH)


def test_unknown_models_are_listed():
    with pytest.raises(CheckpointError, match="no-such-model: expected a checkpoint folder or one"):
        StreamingGenerator.from_pretrained("no-such-model")


def test_broken_checkpoints_name_what_is_wrong(folder, tmp_path):
    for name in ("config.json", "model.safetensors", "vae.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    model = tmp_path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*expected \d+ bytes"):
        StreamingGenerator.from_pretrained(tmp_path)
    model.write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["model"]["depth"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected tensor transformer.blocks"):
        StreamingGenerator.from_pretrained(tmp_path)
    del config["camera"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json: expected key 'camera'"):
        StreamingGenerator.from_pretrained(tmp_path)


def test_a_diffusion_model_says_that_it_does_not_stream(folder, picture, tmp_path):
    for name in ("model.safetensors", "vae.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = {**load_config(folder), "sampling": {"steps": 8, "shift": 6.0, "guidance": 3.0}}
    save_config(tmp_path, config)
    generator = StreamingGenerator.from_pretrained(tmp_path)
    assert generator.sampling == SamplingConfig(8, 6.0, 3.0)
    with pytest.raises(
        ValueError, match="one forward pass per frame .* diffusion model of 16; `aapt"
    ):
        generator.open(picture, "ab")
    for wrong, message in [({"steps": 0}, "steps: expected 1"), ({"width": 3}, "'width'")]:
        save_config(tmp_path, {**config, "sampling": {**config["sampling"], **wrong}})
        with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
            StreamingGenerator.from_pretrained(tmp_path)


def test_no_sample_is_said(generator):
    with pytest.raises(ValueError, match="comes without a sample image"):
        generator.sample_image()
    assert generator.sample_prompt == "ab"
