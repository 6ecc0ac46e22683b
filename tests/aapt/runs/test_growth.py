"""The first weights of a recipe that grows from a bundled generator."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from aapt.checkpoint import find_checkpoint, read_tensors, save_config, save_module
from aapt.data.rendered import render_clips
from aapt.data.tiny_world.rendered_clips import ProceduralData
from aapt.model.latent_relation import fit_relation
from aapt.model.world_model import WorldModel
from aapt.runs import growth
from aapt.runs.inputs import Inputs
from aapt.runs.loop import RunOptions
from aapt.runs.run import Run, run
from aapt.runs.stage_order import stage_names
from aapt.training.recipe_file import load_recipe
from aapt.training.recipes import RECIPES, vae_fine
from aapt.training.stages.decoder import fit_linear
from aapt.vae.folder import ORIGINAL, load_vae

KEPT = Path(__file__).parents[3] / "benchmarks/starts/sharp-world/near/discriminator.safetensors"
CLIPS = ProceduralData(height=16, width=32, clips=8, latent_frames=9)


@pytest.fixture(scope="module")
def fine(tmp_path_factory):
    """A checkpoint with an autoencoder of the shape of `vae-fine`, its encoder fitted."""
    folder = tmp_path_factory.mktemp("fine")
    videos = torch.stack([clip.video for clip in render_clips(CLIPS, 1)])
    torch.manual_seed(0)
    vae = fit_linear(vae_fine().vae, videos)
    save_module(folder / "vae.safetensors", vae)
    save_config(folder, {"name": "vae-fine", "vae": asdict(vae.config)})
    return folder


def small(name):
    """A recipe on small images, with one stage of two updates."""
    recipe = RECIPES[name]()
    regression = replace(recipe.stages["regression"], steps=2, batch=1, segment_frames=2)
    return replace(recipe, data={"clips": CLIPS}, stages={"regression": regression})


def test_growth_comes_before_the_first_stage():
    assert stage_names(small("sharp-world")) == ["clips", "growth", "regression"]
    assert stage_names(replace(small("sharp-world"), grown=None)) == ["clips", "regression"]


def test_finer_latents(fine, tmp_path):
    """The weights are those of the relation that both autoencoders have on the recipe's clips."""
    recipe, inputs = small("sharp-world"), Inputs(vae=fine)
    options = RunOptions(save_every=None, sample_every=None)
    given = {"workers": 1, "inputs": inputs, "options": options}
    lines = []
    run(recipe, tmp_path, report=lines.append, **given)
    clips = list(render_clips(CLIPS, 1))
    vaes = load_vae("tiny-world", ORIGINAL), load_vae(fine)
    relation = fit_relation(*(CLIPS.encode(vae, clips)["latents"] for vae in vaes))
    expected = WorldModel(recipe.model, recipe.camera)
    expected.load_grown(find_checkpoint("tiny-world"), relation)
    made = Run(recipe, tmp_path, **given).starting_model(None).state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(made[name], tensor), name
    assert any(line.startswith("growth: 0.") for line in lines)
    run(recipe, tmp_path, report=lines.append, **given)
    assert "growth: already done" in lines


def test_one_autoencoder_needs_no_relation(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("no clip is needed")

    monkeypatch.setattr(growth, "render_clips", refuse)
    recipe = small("pilot-160")
    run_ = Run(recipe, tmp_path)
    run_.run("growth")
    ours = run_.starting_model(None).state_dict()
    theirs = read_tensors(find_checkpoint("tiny-world") / "model.safetensors")
    split = {f"transformer.video_{name}" for name in ("in.weight", "out.weight", "out.bias")}
    assert split < theirs.keys()
    for name in theirs.keys() - split:
        assert torch.equal(ours[name], theirs[name].float()), name


def test_the_bundled_world_can_be_trained_on(tmp_path, fine):
    """docs/training.md copies its weights and its discriminator to where `near` starts."""
    recipe = load_recipe("sharp-world", ["stages.near.start=final", "stages.together=none"])
    near = recipe.stages["near"]
    files = {"weights": find_checkpoint("sharp-world") / "model.safetensors", "discriminator": KEPT}
    assert near.start == near.mixed_with == near.discriminator_start == "final"
    (tmp_path / "final").mkdir()
    for name, file in files.items():
        shutil.copy(file, tmp_path / "final" / f"{name}.safetensors")
    run_ = Run(recipe, tmp_path, inputs=Inputs(vae=fine))
    run_.check_order(["far-clips", "near"])
    made = {"weights": run_.starting_model(near.start), "discriminator": run_.discriminator(near)}
    for file, network in made.items():
        for name, tensor in read_tensors(files[file]).items():
            assert torch.equal(network.state_dict()[name], tensor.float()), (file, name)
