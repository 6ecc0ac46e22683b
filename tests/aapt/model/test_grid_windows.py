"""A window for each size of frames: one model against models that know one window alone."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from aapt import Control, StreamingGenerator
from aapt.checkpoint import BUNDLED, CheckpointError, load_config, save_config, tuples
from aapt.commands.app import main
from aapt.model.config import ModelConfig, SamplingConfig
from aapt.model.discriminator import Discriminator
from aapt.model.rope import RotaryPositions
from aapt.streaming.diffusion import DiffusionRollout
from aapt.streaming.student import StudentRollout
from aapt.training.forcing import parallel_pass, teacher_forced_logits

from ..helpers import CONFIG, PROMPTS, controls, tiny_model

WINDOWS = ((2, 2, 1), (4, 2, 4))  # beside 2 for every other grid
SIZES = {(4, 6): 2, (4, 4): 1, (8, 4): 4}  # latent pixels, of which a token takes two by two
FRAMES = 8  # past the end of every window
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


def latents(frames: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, CONFIG.latent_channels, frames, *size, dtype=torch.float64)


@each_size
@pytest.mark.parametrize("sink_distance", ["absolute", "clamped"])
@torch.no_grad()
def test_streaming_equals_parallel(size, sink_distance):
    model = tiny_model(grid_windows=WINDOWS, sink_distance=sink_distance)
    x, recycled = latents(FRAMES, size), latents(FRAMES, size)
    channels, *text = model.conditions(controls(FRAMES), PROMPTS, size)
    time = x.new_ones(2)
    expected = model.transformer(x, recycled, channels, *text, time)
    cache = StudentRollout(model.transformer, *text, recycled[:, :, :1]).cache
    assert cache.ring_frames == SIZES[size] + 1
    for i in range(FRAMES):
        frame = [tensor[:, :, i : i + 1] for tensor in (x, recycled, channels)]
        made = model.transformer.step(*frame, time, cache)
        torch.testing.assert_close(made, expected[:, :, i : i + 1], rtol=1e-9, atol=1e-10)


@torch.no_grad()
def everything(model, size) -> list[torch.Tensor]:
    """Return what every way through the network makes of one set of inputs."""
    net = model.transformer
    torch.manual_seed(1)
    x, recycled, noise = (latents(FRAMES, size) for _ in range(3))
    channels, *text = model.conditions(controls(FRAMES), PROMPTS, size)
    other = model.text_encoder(PROMPTS[::-1])
    time, first = x.new_ones(2), recycled[:, :, :1]
    made = [net(x, recycled, channels, *text, time)]
    rollout = StudentRollout(net, *text, first)
    for part in (slice(0, 5), slice(5, FRAMES)):
        segment = rollout.roll(noise[:, :, part], channels[:, :, part])
        made += [segment.output, parallel_pass(net, segment, *text)]
    recached = StudentRollout(net, *text, first, recache=True)
    recached.roll(noise[:, :, 1:], channels[:, :, 1:])
    recached.set_text(*other)
    made.append(recached.step(noise[:, :, :1], recached.last, channels[:, :, :1]))
    diffusion = DiffusionRollout(net, *text, other, first, SamplingConfig(2, 6.0, 3.0))
    for i in range(FRAMES):
        frame = [tensor[:, :, i : i + 1] for tensor in (noise, recycled, channels)]
        made.append(diffusion.step(*frame))
    torch.manual_seed(2)
    judge = Discriminator(model).double()
    made.append(judge(x, recycled, channels, *text, time))
    real = torch.cat([recycled, x[:, :, -1:]], dim=2)
    made.append(teacher_forced_logits(judge, x, real, (channels, *text), time))
    return made


@each_size
def test_every_way_has_the_window_of_its_size(size):
    several = everything(tiny_model(grid_windows=WINDOWS, sink_distance="clamped"), size)
    for window in SIZES.values():
        alone = everything(tiny_model(window_frames=window, sink_distance="clamped"), size)
        same = [torch.equal(a, b) for a, b in zip(several, alone, strict=True)]
        if window == SIZES[size]:
            assert all(same)
        else:  # but for the first steps of streams
            assert same.count(True) <= 2 + min(window, SIZES[size])


@each_size
def test_the_first_frame_is_clamped_behind_the_window_of_its_size(size):
    config = dataclasses.replace(CONFIG, grid_windows=WINDOWS, sink_distance="clamped")
    grid = config.token_grid(*size)
    at = RotaryPositions(config)(torch.arange(FRAMES), grid)
    cosines = at.cos_sink.unflatten(0, (FRAMES, -1))
    furthest = SIZES[size] + 1
    torch.testing.assert_close(cosines[:furthest], at.cos.unflatten(0, (FRAMES, -1))[:furthest])
    assert torch.equal(cosines[furthest:], cosines[furthest].expand_as(cosines[furthest:]))
    assert not torch.equal(cosines[furthest], cosines[furthest - 1])


def test_a_configuration_comes_back_from_json():
    config = dataclasses.replace(CONFIG, grid_windows=WINDOWS)
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert ModelConfig(**tuples(saved)) == config
    del saved["grid_windows"]  # as it was before there were any
    assert ModelConfig(**tuples(saved)) == CONFIG


def test_a_grid_on_its_side_has_the_same_window():
    config = dataclasses.replace(CONFIG, grid_windows=((4, 2, 4),))
    assert config.window((2, 4)) == config.window((4, 2)) == config.window((8, 1)) == 4
    assert config.window((2, 3)) == CONFIG.window_frames


@pytest.mark.parametrize(
    "windows",
    [
        None,
        15,
        [(2, 2, 1)],
        (2, 2, 1),
        ((2, 2),),
        ((2, 2, 1, 1),),
        ((2, 2, -1),),
        ((0, 2, 1),),
        ((2, 0, 1),),
        ((2, 2, 1.0),),
        (((2, 2), 1),),
        ((2, 2, 1), (2, 2, 3)),
        ((2, 3, 1), (3, 2, 1)),
    ],
    ids=repr,
)
def test_windows_that_cannot_be(windows):
    message = (
        r"grid_windows: expected a tuple of \(rows, columns, window_frames\), each number of "
        "tokens once"
    )
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, grid_windows=windows)


def bundled(folder, windows):
    """A copy of the bundled model, 5 x 8 tokens and N = 8, with windows for particular grids."""
    shutil.copytree(BUNDLED / "tiny-world", folder)
    config = load_config(folder)
    assert "grid_windows" not in config["model"] and config["model"]["window_frames"] == 8
    config["model"]["grid_windows"] = windows
    save_config(folder, config)
    return folder


def test_a_checkpoint_streams_with_the_window_of_its_size(tmp_path, capsys):
    folder = bundled(tmp_path / "model", [[5, 8, 3]])
    generator = StreamingGenerator.from_pretrained(folder)
    stream = generator.open(np.zeros((generator.height, generator.width, 3), np.uint8), "")
    assert stream.step(Control()).shape[0] == 4
    assert stream._memory.rollout.cache.ring_frames == 4
    assert main(["info", "--model", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["model"]
    assert facts["window_frames"] == 3 and facts["config"]["grid_windows"] == [[5, 8, 3]]


def test_a_checkpoint_with_a_window_that_cannot_be(tmp_path):
    folder = bundled(tmp_path / "model", [[5, 8]])
    with pytest.raises(CheckpointError, match=r"config.json: grid_windows: expected .* \(\(5, 8\)"):
        StreamingGenerator.from_pretrained(folder)
