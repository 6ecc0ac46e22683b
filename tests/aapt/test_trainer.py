"""A whole recipe, small: from rendered clips to a checkpoint that streams."""

import dataclasses
import json

import numpy as np
import pytest

from aapt import Control, StreamingGenerator
from aapt.optimization import Schedule
from aapt.recipes import tiny_world
from aapt.trainer import STAGES, TrainingError, run


def small_recipe():
    recipe = tiny_world()
    brief = {"schedule": Schedule(1e-3, steps=2), "batch": 2}
    model = dataclasses.replace(
        recipe.model, width=32, heads=2, head_dim=16, depth=3, rope_axes=(4, 6, 6)
    )
    adversarial = dataclasses.replace(
        recipe.adversarial,
        generator_schedule=Schedule(1e-4, steps=2),
        discriminator_schedule=Schedule(1e-4, steps=2),
        discriminator_warmup=1,
        batch=2,
        segment_frames=2,
    )
    return dataclasses.replace(
        recipe,
        model=model,
        data=dataclasses.replace(
            recipe.data, height=48, width=64, clips=3, latent_frames=6, video_clips=2
        ),
        long_data=dataclasses.replace(
            recipe.long_data, height=48, width=64, clips=3, latent_frames=10
        ),
        decoder=dataclasses.replace(recipe.decoder, video_frames=9, **brief),
        diffusion=dataclasses.replace(recipe.diffusion, frames=4, **brief),
        consistency=dataclasses.replace(recipe.consistency, frames=4, **brief),
        regression=dataclasses.replace(recipe.regression, segment_frames=2, **brief),
        adversarial=adversarial,
        extension=adversarial,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("run"), []
    folder = run(small_recipe(), out, workers=1, report=lines.append)
    return out, folder, lines


def test_every_stage_leaves_its_result(trained):
    out, _, lines = trained
    assert [line.split(":")[0] for line in lines] == list(STAGES)
    for stage in STAGES:
        assert (out / stage / "weights.safetensors").is_file()
    metrics = [json.loads(line) for line in (out / "adversarial" / "metrics.jsonl").open()]
    assert [m["step"] for m in metrics] == [0, 1]
    assert "generator" not in metrics[0] and "generator" in metrics[1]


def test_the_checkpoint_streams(trained):
    _, folder, _ = trained
    generator = StreamingGenerator.from_pretrained(folder)
    assert (generator.height, generator.width) == (48, 64)
    stream = generator.open(np.zeros((48, 64, 3), np.uint8), generator.sample_prompt)
    assert stream.step(Control(forward=1.0)).shape == (4, 48, 64, 3)
    assert generator.sample_image().is_file()


def test_finished_stages_are_not_run_again(trained):
    out, folder, _ = trained
    lines = []
    assert run(small_recipe(), out, workers=1, report=lines.append) == folder
    assert lines == [f"{stage}: already done" for stage in STAGES]


def test_two_recipes_never_mix(trained):
    out, _, _ = trained
    other = dataclasses.replace(small_recipe(), seed=1)
    with pytest.raises(ValueError, match=r"recipe.json: seed: expected 1, got 0; train another"):
        run(other, out)


def test_unknown_stage(tmp_path):
    with pytest.raises(ValueError, match="stages: expected some of encoder, .* got polish"):
        run(small_recipe(), tmp_path, ["polish"])


def test_a_stage_that_is_not_finite_stops(trained, tmp_path):
    out, _, _ = trained
    for stage in ("encoder", "encode"):
        (tmp_path / stage).mkdir()
        source = out / stage / "weights.safetensors"
        (tmp_path / stage / "weights.safetensors").write_bytes(source.read_bytes())
    recipe = small_recipe()
    wild = dataclasses.replace(recipe.diffusion, schedule=Schedule(1e30, steps=5), max_norm=None)
    with pytest.raises(TrainingError, match=r"diffusion: step \d: .*finite"):
        run(dataclasses.replace(recipe, diffusion=wild), tmp_path, ["diffusion"])
    assert not (tmp_path / "diffusion" / "weights.safetensors").exists()
