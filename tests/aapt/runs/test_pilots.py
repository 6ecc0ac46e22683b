"""The pilots of the next world: each trains from the shipped autoencoder or one that is given."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from aapt import Control, StreamingGenerator
from aapt.checkpoint import (
    CheckpointError,
    save_config,
    save_module,
)
from aapt.commands.app import main
from aapt.runs.inputs import Inputs
from aapt.runs.loop import RunOptions
from aapt.runs.plan import plan
from aapt.runs.run import Run, run
from aapt.training.curriculum import constant
from aapt.training.recipes import RECIPES, vae_fine
from aapt.vae import CausalVAE
from aapt.vae.folder import load_vae

PILOTS = {  # tokens of a frame
    "pilot-40": 40,
    "pilot-80": 80,
    "pilot-160": 160,
    "pilot-160-fine": 160,
}


def random_vae(folder, seed):
    """A checkpoint with an autoencoder of the shape of `vae-fine`."""
    torch.manual_seed(seed)
    vae = CausalVAE(vae_fine().vae)
    save_module(folder / "vae.safetensors", vae, torch.bfloat16)
    save_config(folder, {"name": "vae-fine", "vae": asdict(vae.config)})
    return folder


@pytest.fixture(scope="module")
def fine(tmp_path_factory):
    return random_vae(tmp_path_factory.mktemp("fine"), seed=0)


def small(name):
    """The pilot on small images, with two updates per stage and less depth where it starts anew."""
    recipe = RECIPES[name]()
    brief = {
        "diffusion": {"curriculum": constant("clips", frames=2, batch=1, steps=2)},
        "consistency": {"curriculum": constant("clips", frames=2, batch=1, steps=2)},
        "regression": {"steps": 2, "batch": 1, "segment_frames": 2},
    }
    data = replace(recipe.data["clips"], height=16, width=32, clips=2, latent_frames=6)
    stages = {stage: replace(config, **brief[stage]) for stage, config in recipe.stages.items()}
    depth = recipe.model.depth if recipe.grown else 2
    model = replace(recipe.model, depth=depth)
    return replace(recipe, model=model, data={"clips": data}, stages=stages)


def train(recipe, out, vae=None):
    options = RunOptions(save_every=None, sample_every=None)
    inputs = Inputs(vae=vae)
    given = {"workers": 1, "options": options, "inputs": inputs}
    return run(recipe, out, report=lambda line: None, **given)


@pytest.mark.parametrize("name", PILOTS)
def test_a_pilot_trains_and_streams(name, fine, tmp_path):
    whole, recipe = RECIPES[name](), small(name)
    cell, data = whole.vae.space_factor, whole.data["clips"]
    rows, columns = whole.model.token_grid(data.height // cell, data.width // cell)
    assert rows * columns == PILOTS[name]
    made = train(recipe, tmp_path, fine if whole.autoencoder == "vae-fine" else None)
    generator = StreamingGenerator.from_pretrained(made)
    assert (generator.height, generator.width) == (16, 32)
    stream = generator.open(np.zeros((16, 32, 3), np.uint8), generator.sample_prompt)
    assert stream.step(Control(forward=1.0)).shape == (4, 16, 32, 3)
    given = load_vae(fine if whole.autoencoder == "vae-fine" else "tiny-world").state_dict()
    for key, tensor in generator.vae.state_dict().items():
        assert torch.equal(tensor, given[key]), key
    for stage in recipe.stages:
        assert len((tmp_path / stage / "metrics.jsonl").read_text().splitlines()) == 2


def test_pilots_cost_about_the_same():
    """Counted by `aapt train --plan`: 155e12 operations each."""
    for name in PILOTS:
        recipe, total = RECIPES[name](), 0.0
        for each in plan(recipe, 1):
            config = recipe.stages[each.workload.stage]
            phases = config.curriculum.phases if hasattr(config, "curriculum") else [config]
            total += each.flops * sum(phase.steps for phase in phases)
        assert total == pytest.approx(155e12, rel=0.03), name


def test_without_its_autoencoder_a_pilot_names_the_command(tmp_path):
    message = (
        "vae: expected the autoencoder of vae-fine, got none; run `aapt train vae-fine` and pass "
        "--vae runs/vae-fine/vae-fine"
    )
    with pytest.raises(ValueError, match=message):
        train(small("pilot-160-fine"), tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: expected a checkpoint folder"):
        train(small("pilot-160-fine"), tmp_path, "nowhere")
    with pytest.raises(ValueError, match="of cells of 4x4 pixels .* got cells of 8x8 pixels in"):
        train(small("pilot-160-fine"), tmp_path, "tiny-world")
    assert not (tmp_path / "clips").exists()


def test_a_run_is_of_one_autoencoder(fine, tmp_path):
    recipe, out = small("pilot-160-fine"), tmp_path / "run"
    Run(recipe, out, inputs=Inputs(vae=fine)).claim()
    moved = random_vae(tmp_path / "moved", seed=0)
    Run(recipe, out, inputs=Inputs(vae=moved)).claim()
    other = random_vae(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="inputs.json: vae: expected the autoencoder of before"):
        Run(recipe, out, inputs=Inputs(vae=other)).claim()


def test_commands(fine, tmp_path, capsys, monkeypatch):
    for name in ("pilot-160", "pilot-160-fine"):
        recipe = small(name)
        monkeypatch.setitem(RECIPES, name, lambda recipe=recipe: recipe)
    arguments = ["--out", str(tmp_path / "run"), "--workers", "1"]
    assert main(["train", "pilot-160-fine", "--vae", str(fine), *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "pilot-160-fine")
    assert main(["train", "tiny-world", "--vae", str(fine), *arguments]) == 2
    assert "vae: expected none for the recipe tiny-world, got" in capsys.readouterr().err
    assert main(["train", "pilot-160", "--videos", str(fine), *arguments]) == 2
    assert "videos: expected none for the recipe pilot-160" in capsys.readouterr().err
