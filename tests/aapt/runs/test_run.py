"""A small recipe as a whole, from rendered clips to a checkpoint that streams."""

import dataclasses
import importlib
import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aapt import Control, StreamingGenerator
from aapt.checkpoint import read_tensors
from aapt.device import mixed_precision
from aapt.model.config import FewStepConfig, SamplingConfig
from aapt.model.low_rank import LoRA
from aapt.runs import run as run_module
from aapt.runs import sheets
from aapt.runs.build_stage import build_stage
from aapt.runs.inputs import Inputs
from aapt.runs.loop import RunOptions, TrainingError
from aapt.runs.parallel import Parallel
from aapt.runs.run import DIFFUSION_SAMPLES, Run, run
from aapt.runs.samples import sample_sheet
from aapt.runs.stage_order import stage_names
from aapt.training.curriculum import constant
from aapt.training.optimization import Schedule
from aapt.training.recipe_file import load_recipe
from aapt.training.recipes import tiny_world, wan_1_3b_matched
from aapt.training.savings import with_switches

from . import ranks

STAGES = stage_names(tiny_world())
BRIEF = (0, 1)  # seconds of a sheet of samples


def small_recipe():
    recipe = tiny_world()
    model = dataclasses.replace(
        recipe.model,
        width=32,
        heads=2,
        head_dim=16,
        depth=3,
        rope_axes=(4, 6, 6),
        reference_grid=(3, 4),
    )
    curriculum = constant("clips", frames=4, batch=2, steps=2)
    brief = {"steps": 1, "batch": 2, "segment_frames": 2, "discriminator_warmup": 1}
    small = {
        "diffusion": {"curriculum": curriculum},
        "consistency": {"curriculum": curriculum},
        "regression": {"steps": 2, "batch": 2, "segment_frames": 2},
        "long-regression": {"steps": 2, "batch": 2, "segment_frames": 2},
        "further-regression": {"steps": 2, "batch": 2, "segment_frames": 2},
        **dict.fromkeys(("adversarial", "extension", "further-adversarial"), brief),
        "final": brief | {"lead_segments": 2},
    }
    picture = {"height": 48, "width": 64, "clips": 3}
    lengths = {
        "clips": {"latent_frames": 6, "video_clips": 2},
        "long-clips": {"latent_frames": 10},
        "longer-clips": {"latent_frames": 14},
        "minute-clips": {"latent_frames": 18},
    }
    return dataclasses.replace(
        recipe,
        model=model,
        data={
            name: dataclasses.replace(data, **picture, **lengths[name])
            for name, data in recipe.data.items()
        },
        decoder=dataclasses.replace(recipe.decoder, video_frames=9, steps=2, batch=2),
        light_decoder=dataclasses.replace(recipe.light_decoder, video_frames=9, steps=2, batch=2),
        stages={
            name: dataclasses.replace(config, **small[name])
            for name, config in recipe.stages.items()
        },
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("run"), []
    options = RunOptions(save_every=1, sample_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aapt.runs.run.SHEET_SECONDS", BRIEF)
        folder = run(small_recipe(), out, workers=1, options=options, report=lines.append)
    return out, folder, lines


def test_every_stage_leaves_its_result(trained):
    out, _, lines = trained
    assert [line.split(":")[0] for line in lines] == STAGES
    for stage in STAGES:
        assert (out / stage / "weights.safetensors").is_file()
    metrics = [json.loads(line) for line in (out / "adversarial" / "metrics.jsonl").open()]
    assert [m["step"] for m in metrics] == [0, 1]
    assert not list(out.glob("*/states"))
    assert (out / "regression" / "samples-2.png").is_file()
    assert "generator" not in metrics[0] and "generator" in metrics[1]


def test_numbers_that_a_later_stage_does_not_take_are_said_first(tmp_path):
    """Not when that stage begins, which may be after days."""
    recipe = small_recipe()
    for name, change in (("adversarial", {"state_bits": 16}), ("diffusion", {"lora": LoRA(2)})):
        changed = dataclasses.replace(recipe.stages[name], **change)
        other = dataclasses.replace(recipe, stages=recipe.stages | {name: changed})
        with pytest.raises(ValueError, match=f"^stages.{name}.(state_bits|muon): expected"):
            Run(other, tmp_path / name).check([*recipe.stages])


def test_the_checkpoint_streams(trained):
    _, folder, _ = trained
    generator = StreamingGenerator.from_pretrained(folder)
    assert (generator.height, generator.width) == (48, 64)
    picture = np.asarray(Image.open(generator.sample_image()))
    stream = generator.open(picture, generator.sample_prompt)
    assert stream.step(Control(forward=1.0)).shape == (4, 48, 64, 3)


def test_an_exported_stage_says_how_it_is_sampled(trained, tmp_path):
    out, folder, _ = trained
    made = Run(small_recipe(), out).export("diffusion", tmp_path)
    config = small_recipe().stages["diffusion"]
    expected = SamplingConfig(config.sampling_steps, config.shift, config.guidance)
    assert StreamingGenerator.from_pretrained(made).sampling == expected
    assert StreamingGenerator.from_pretrained(folder).sampling is None


def test_a_model_that_moves_too_little_is_exported_to_be_asked_for_more(trained, tmp_path):
    recipe = dataclasses.replace(small_recipe(), motion_asked=(1.25, 1.5))
    made = Run(recipe, trained[0]).export("final", tmp_path)
    camera = StreamingGenerator.from_pretrained(made).model.camera
    assert camera.direction_deviation == pytest.approx(0.014 / 1.25)
    assert camera.origin_deviation == pytest.approx(0.021 / 1.5)
    for factors in ((0.0, 1.0), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="motion_asked: expected finite numbers above 0, got"):
            dataclasses.replace(recipe, motion_asked=factors)


@pytest.mark.parametrize("name", ["tiny-world", "sharp-world"])
def test_a_bundled_world_has_the_camera_of_its_recipe(name):
    camera = StreamingGenerator.from_pretrained(name).model.camera
    assert camera == load_recipe(name).played_camera


def test_a_model_without_a_reference_grid_is_exported_at_the_size_of_its_clips(trained, tmp_path):
    recipe = small_recipe()
    model = dataclasses.replace(recipe.model, reference_grid=None)
    made = Run(dataclasses.replace(recipe, model=model), trained[0]).export("final", tmp_path)
    generator = StreamingGenerator.from_pretrained(made)
    assert (generator.height, generator.width) == (48, 64)
    assert generator.model.config.reference_grid is None
    assert Image.open(generator.sample_image()).size == (64, 48)


def test_a_baseline_of_diffusion_forcing_is_trained_and_streams(tmp_path):
    """Two passes per frame; sheets are sampled as the checkpoint is."""
    recipe = small_recipe()
    stages = {
        name: dataclasses.replace(recipe.stages[name], forcing="diffusion")
        for name in ("diffusion", "consistency")
    }
    model = dataclasses.replace(recipe.model, block="wan", recycle=False, residual_head=False)
    recipe = dataclasses.replace(recipe, model=model, stages=stages)
    options = RunOptions(sample_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aapt.runs.run.SHEET_SECONDS", BRIEF)
        folder = run(
            recipe,
            tmp_path,
            ["encoder", "clips", *stages],
            workers=1,
            options=options,
            report=lambda line: None,
        )
    assert all((tmp_path / name / "samples-2.png").is_file() for name in stages)
    generator = StreamingGenerator.from_pretrained(folder)
    assert generator.sampling == FewStepConfig((1.0,)) and generator.sampling.passes == 2
    picture = np.asarray(Image.open(generator.sample_image()))
    stream = generator.open(picture, generator.sample_prompt)
    assert stream.step(Control(forward=1.0)).shape == (4, 48, 64, 3)


def test_the_sheet_of_a_diffusion_stage_is_sampled_like_its_checkpoint(trained):
    made = Run(small_recipe(), trained[0])
    config = made.recipe.stages["diffusion"]
    stage = build_stage(dataclasses.replace(config, start="diffusion"), made)
    made.sampler("diffusion", stage)(0)
    shown = np.asarray(Image.open(trained[0] / "diffusion" / "samples-0.png"))
    batch, vae = made.sample_clips("diffusion")
    with mixed_precision(made.parallel.device):
        sampled, one_pass = (
            np.asarray(sample_sheet(stage.model, vae, batch, DIFFUSION_SAMPLES, sampling=sampling))
            for sampling in (config.sampling, None)
        )
    assert np.array_equal(shown, sampled) and not np.array_equal(shown, one_pass)


def test_finished_stages_are_not_run_again(trained):
    out, folder, _ = trained
    lines = []
    assert run(small_recipe(), out, workers=1, report=lines.append) == folder
    assert lines == [f"{stage}: already done" for stage in STAGES]


def on_ranks(out: Path) -> None:
    options = RunOptions(save_every=1, sample_every=1)
    given = {"workers": 1, "options": options, "parallel": Parallel.from_environment()}
    run_module.SHEET_SECONDS, sheets.SHARE = BRIEF, math.inf  # in a process of its own
    run(small_recipe(), out, report=lambda line: None, **given)


def test_ranks_train_together(trained, tmp_path):
    """Also with a sheet of samples after every update, which leaves parameters gathered."""
    for name in (
        "encoder",
        "clips",
        "long-clips",
        "longer-clips",
        "minute-clips",
        "decoder",
        "light-decoder",
        "diffusion",
        "consistency",
    ):
        shutil.copytree(trained[0] / name, tmp_path / name)
    ranks.run(2, on_ranks, tmp_path)
    assert (tmp_path / "adversarial" / "samples-2.png").is_file()
    assert (tmp_path / "adversarial" / "discriminator.safetensors").is_file()
    StreamingGenerator.from_pretrained(tmp_path / "tiny-world")


def killed(out: Path, stage: str, at: str, count: int) -> None:
    """Run a stage and die when it calls a function of `os` or of the loop for the n-th time."""
    module, _, name = at.rpartition(".")
    module, calls = importlib.import_module(module), itertools.count(1)
    real = getattr(module, name)

    def deadly(*arguments, **options):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(module, name, deadly)
    options = RunOptions(save_every=1, sample_every=None)
    run(small_recipe(), out, [stage], workers=1, options=options, report=lambda line: None)


@pytest.mark.parametrize(
    ("stage", "at", "count", "states"),
    [
        ("clips", "os.replace", 1, 0),  # the tensors are written and not yet in their place
        ("decoder", "aapt.runs.loop.parts", 2, 1),  # within an update
        ("decoder", "os.replace", 1, 1),
    ],
)
def test_a_preparation_that_was_killed_resumes(trained, tmp_path, stage, at, count, states):
    """It ends with equal bytes, and no result is ever half written."""
    for name in ("recipe.json", "encoder/weights.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(trained[0] / name, tmp_path / name)
    assert ranks.run(1, killed, tmp_path, stage, at, count) == [signal.SIGKILL]
    result = tmp_path / stage / "weights.safetensors"
    assert not result.exists()
    assert len(list(tmp_path.glob("*/states/step-*"))) == states
    run(small_recipe(), tmp_path, [stage], workers=1, report=lambda line: None)
    assert result.read_bytes() == (trained[0] / stage / "weights.safetensors").read_bytes()
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / stage / "states").exists()


def test_a_recipe_of_before_a_new_field_still_fits(trained):
    path = trained[0] / "recipe.json"
    whole = path.read_text()
    older = json.loads(whole)
    del older["vae"]["patch_size"]
    path.write_text(json.dumps(older))
    assert run(small_recipe(), trained[0], report=lambda line: None) == trained[1]
    path.write_text(whole)


def test_an_extension_continues_with_its_discriminator(trained, tmp_path):
    recipe = small_recipe()
    first = recipe.stages["adversarial"]
    again = dataclasses.replace(first, start="adversarial", discriminator_start="adversarial")
    recipe = dataclasses.replace(recipe, stages={**recipe.stages, "extension": again})
    start = Inputs(weights=tmp_path / "none.safetensors")  # not read for a stage's networks
    made = Run(recipe, trained[0], inputs=start)
    kept = read_tensors(trained[0] / "adversarial" / "discriminator.safetensors")
    discriminator = build_stage(again, made).discriminator.state_dict()
    assert all(torch.equal(discriminator[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("sees", [True, False])
def test_a_discriminator_without_the_frame_before(trained, sees):
    """The first frame, which is the user's, is always seen."""
    config = dataclasses.replace(small_recipe().stages["adversarial"], discriminator_recycled=sees)
    discriminator = Run(small_recipe(), trained[0]).discriminator(config)
    torch.manual_seed(0)
    x, previous, other = torch.randn(3, 1, 16, 3, 6, 8)
    other[:, :, 0] = previous[:, :, 0]
    channels, *text = discriminator.world.conditions(torch.zeros(1, 3, 2), ["a"], (6, 8))
    with torch.no_grad():
        logits, others = (
            discriminator(x, p, channels, *text, torch.ones(1)) for p in (previous, other)
        )
    assert torch.equal(logits[:, :1], others[:, :1])
    assert torch.equal(logits, others) != sees


def test_two_recipes_never_mix(trained):
    out, _, _ = trained
    other = dataclasses.replace(small_recipe(), seed=1)
    with pytest.raises(ValueError, match=r"recipe.json: seed: expected 1, got 0; train in another"):
        run(other, out)


def test_unknown_stage(tmp_path):
    with pytest.raises(ValueError, match="stage: expected one of encoder, .* got 'polish'"):
        run(small_recipe(), tmp_path, ["polish"])


def test_a_stage_that_is_not_finite_stops(trained, tmp_path):
    out, _, _ = trained
    for stage in ("encoder", "clips"):
        (tmp_path / stage).mkdir()
        source = out / stage / "weights.safetensors"
        (tmp_path / stage / "weights.safetensors").write_bytes(source.read_bytes())
    recipe = small_recipe()
    wild = dataclasses.replace(
        recipe.stages["diffusion"],
        curriculum=constant("clips", frames=4, batch=2, steps=5),
        schedule=Schedule(1e30),
        max_norm=None,
    )
    recipe = dataclasses.replace(recipe, stages={**recipe.stages, "diffusion": wild})
    with pytest.raises(
        TrainingError, match=r"diffusion: step \d: .*finite.* inputs are in"
    ) as error:
        run(recipe, tmp_path, ["diffusion"])
    inputs = read_tensors(Path(str(error.value).rsplit(" ", 1)[1]))
    assert inputs["0.latents"].shape == (2, 16, 5, 6, 8)
    assert not (tmp_path / "diffusion" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("regression", {"segments": 3}, "clips: expected clips of 6 latent frames .* at most 5"),
        ("extension", {"segments": 7}, "longer-clips: expected clips of 14 latent frames"),
        ("final", {"lead_segments": 3}, "minute-clips: expected clips of 18 latent frames"),
    ],
)
def test_clips_that_are_too_short_are_refused_first(tmp_path, stage, change, message):
    recipe = small_recipe()
    longer = dataclasses.replace(recipe.stages[stage], **change)
    recipe = dataclasses.replace(recipe, stages={**recipe.stages, stage: longer})
    with pytest.raises(ValueError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sets_of_real_clips_need_their_folder(tmp_path):
    recipe = small_recipe()
    elsewhere = dataclasses.replace(
        recipe.stages["diffusion"], curriculum=constant("64x48", frames=4, batch=2, steps=1)
    )
    recipe = dataclasses.replace(recipe, stages={"diffusion": elsewhere}, vae=None)
    with pytest.raises(ValueError, match="latents: expected the folder with clips of 64x48"):
        run(recipe, tmp_path)


@pytest.mark.parametrize("offload", [True, False])
def test_every_network_of_a_stage_is_offloaded(offload, tmp_path, monkeypatch):
    """On several ranks; on one a run is rejected before it starts."""
    recipe, placed = small_recipe(), []
    made = Run(recipe, tmp_path)
    monkeypatch.setattr(made, "starting_model", lambda stage: made.world(recipe.model))
    monkeypatch.setattr(Run, "pixel_deviation", lambda self: torch.ones(16))
    monkeypatch.setattr(Parallel, "shard", lambda *arguments: placed.append(arguments))
    for config in (*recipe.stages.values(), wan_1_3b_matched().stages["matching"]):
        starts = {"discriminator_start": None} if hasattr(config, "discriminator_start") else {}
        stage = build_stage(dataclasses.replace(config, offload=offload, **starts), made)
        networks = [part.module for part in stage.trained.values()]
        networks += [stage.teacher] if hasattr(stage, "teacher") else []
        assert {id(network) for _, network, *_ in placed} == set(map(id, networks))
        assert all(arguments[-1] is offload for arguments in placed)
        placed.clear()
    recipe = with_switches(recipe, ["offload"])
    message = r"stages\.\w+\.offload: expected several ranks, got 1; start training with torchrun"
    with pytest.raises(ValueError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "made", "message"),
    [
        (["diffusion"], [], "stage diffusion: expected the result of encoder in .*; train encoder"),
        (["diffusion"], ["encoder"], "expected the result of clips in .*; train clips first"),
        (["clips"], [], "stage clips: expected the result of encoder"),
        (["decoder"], [], "stage decoder: expected the result of encoder"),
        (["light-decoder"], ["encoder"], "stage light-decoder: expected the result of decoder"),
        (["clips", "encoder"], [], "stage clips: expected the result of encoder"),
        (["clips", "encoder"], ["encoder"], None),
        (["encoder", "clips", "consistency"], [], "consistency: expected the result of diffusion"),
        (["encoder", "clips", "diffusion", "consistency"], [], None),
        (STAGES, [], None),
        (STAGES[::-1], [], "stage final: expected the result of"),
        (STAGES[::-1], STAGES, None),
    ],
)
def test_results_that_a_stage_needs_are_there_or_made_before_it(tmp_path, stages, made, message):
    run_ = Run(small_recipe(), tmp_path)
    for stage in made:
        run_.result(stage).parent.mkdir()
        run_.result(stage).touch()
        if stage in run_.recipe.stages:
            run_.start(stage).touch()
    if message is None:
        run_.check(stages)
        return
    with pytest.raises(ValueError, match=message):
        run_.check(stages)
    assert made or not any(tmp_path.iterdir())


def test_a_grown_model_needs_its_start_or_weights(tmp_path):
    recipe = load_recipe("pilot-160")
    for name in ("clips", "regression"):
        (tmp_path / name).mkdir()
    (tmp_path / "clips" / "weights.safetensors").touch()
    with pytest.raises(ValueError, match="stage regression: expected the result of growth in"):
        Run(recipe, tmp_path).check_order(["regression"])
    Run(recipe, tmp_path, inputs=Inputs(weights=tmp_path)).check_order(["regression"])
