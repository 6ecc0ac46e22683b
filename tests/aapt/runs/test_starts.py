"""Weights that a run starts from: any converted model, widened to the recipe's channels."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from aapt.checkpoint import CheckpointError, load_config, read_tensors, write_json
from aapt.convert.job import convert
from aapt.model.world_model import WorldModel
from aapt.runs.inputs import ANY_SET, Inputs
from aapt.runs.run import Run
from aapt.training.recipe_file import changed
from aapt.training.recipes import RECIPES, wan_1_3b, wan_1_3b_one_step

from ..convert.plain_native import PlainNativeWan, random_weights
from ..helpers import CAMERA

SHAPE = {"width": 128, "heads": 1, "depth": 3, "mlp_width": 48, "text_width": 24}
SMALL = {"model": {**SHAPE, "latent_channels": 4}}


def weights(seed=0):
    torch.manual_seed(seed)
    return random_weights(width=128, depth=3, hidden=48, text=24, channels=4)


@pytest.fixture
def converted(tmp_path):
    save_file(weights(), tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "wan", "wan2.1-t2v")
    return tmp_path / "wan"


def model(recipe, converted, **changes):
    config = dataclasses.replace(changed(recipe, SMALL).model, **changes)
    world = WorldModel(config, CAMERA if config.condition_channels else None).double()
    world.load_start(converted / "model.safetensors", recipe.new_channels)
    return world.transformer


def test_with_zero_columns_the_model_computes_what_wan_does(converted):
    """One frame at any time, whatever is recycled: against Wan written again."""
    net = model(wan_1_3b(), converted)
    x, recycled, text = (
        torch.randn(2, 4, 1, 4, 6),
        torch.randn(2, 4, 1, 4, 6),
        torch.randn(2, 7, 24),
    )
    padded = torch.cat([text, torch.zeros(2, 505, 24)], dim=1).double()
    expected, _ = PlainNativeWan(weights(), padded, 3, 1).run(x.double(), 0.75)
    lengths, t = torch.tensor([7, 7]), torch.full((2,), 0.75, dtype=torch.float64)
    actual = net(x.double(), recycled.double(), None, text.double(), lengths, t)
    assert expected.std() > 0.3
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("wan-1.3b")])
def test_new_columns_begin_as_the_recipe_says(converted, name):
    recipe = RECIPES[name]()
    conditions = CAMERA.channels if name.endswith("camera") else 0
    net = model(recipe, converted, condition_channels=conditions)
    columns = net.video_in.weight.unflatten(1, (4, -1))
    given = read_tensors(converted / "model.safetensors")["transformer.video_in.weight"]
    assert torch.equal(columns[..., :4], given.unflatten(1, (4, 4)))
    new = columns[..., 4:]
    assert new.shape[-1] == 4 + conditions
    if recipe.new_channels == "zero":
        assert not new.any()
    else:
        assert new.abs().min() > 0 and new.std() < 0.2
    others = net.state_dict()
    for key, tensor in read_tensors(converted / "model.safetensors").items():
        if "video_in.weight" not in key:
            assert torch.equal(others[key.removeprefix("transformer.")], tensor)


def test_channels_that_no_recipe_adds_are_rejected(converted, tmp_path):
    """Channels of half a recycled frame have no meaning."""
    tensors = read_tensors(converted / "model.safetensors")
    columns = tensors["transformer.video_in.weight"].unflatten(1, (4, 4))
    wider = torch.cat([columns, columns[..., :2]], dim=-1).flatten(1)
    save_file(tensors | {"transformer.video_in.weight": wider}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"video_in.weight: expected \(128, 32\), got"):
        model(wan_1_3b(), tmp_path)


def test_a_checkpoint_of_another_model_is_named_with_every_difference(converted):
    given = {"width": 256, "heads": 2, "depth": 4, "mlp_width": "none"}  # four times the width
    recipe = changed(wan_1_3b(), {"model": {**SMALL["model"], **given}})
    inputs = Inputs({}, converted)
    with pytest.raises(ValueError) as raised:
        inputs.check_weights(recipe)
    assert str(raised.value) == (
        "weights: expected a model of width 256, heads 2, depth 4, mlp_width 1024, as the recipe "
        f"has it, got width 128, heads 1, depth 3, mlp_width 48 in {converted}; change the recipe "
        "with --set model.FIELD=VALUE"
    )
    inputs.check_weights(changed(wan_1_3b(), SMALL))
    Inputs({}, converted / "model.safetensors").check_weights(recipe)  # a file says nothing
    short = changed(wan_1_3b_one_step(), {"model": {**SMALL["model"], **given}})
    with pytest.raises(ValueError, match="^discriminator_weights: expected a model of width 256"):
        Inputs({}, None, converted).check_weights(short)


def test_a_checkpoint_that_the_recipe_cannot_widen_is_named(converted):
    """Weights with the channels of a camera, for a model without one."""
    recipe = changed(wan_1_3b_one_step(), SMALL)
    config = load_config(converted)
    for change, fits in (
        ({"recycle": True}, True),
        ({"recycle": True, "condition_channels": 24}, False),
    ):
        model = {**config["model"], **change}
        write_json(converted / "config.json", {"format_version": 1, **config, "model": model})
        inputs = Inputs({}, None, converted)
        if fits:
            inputs.check_weights(recipe)
            continue
        with pytest.raises(
            ValueError,
            match="^discriminator_weights: expected a model of at most 8 input channels, .* got 32",
        ):
            inputs.check_weights(recipe)


def test_a_folder_of_another_project_is_told_to_be_converted(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    with pytest.raises(
        CheckpointError,
        match="config.json: expected format_version 1, got None; pass a folder of aapt convert$",
    ):
        Inputs({}, tmp_path).check_weights(wan_1_3b())


def test_the_discriminator_has_weights_of_its_own_or_the_generators(
    converted, tmp_path, monkeypatch
):
    save_file(weights(1), tmp_path / "v.safetensors")
    convert(
        tmp_path / "v.safetensors", tmp_path / "diffusion", "causal-forcing-framewise-diffusion"
    )
    recipe = changed(wan_1_3b_one_step(), SMALL)
    monkeypatch.setattr(Run, "stored_text", None)  # no clips are read here
    for given, expected in ((tmp_path / "diffusion", "diffusion"), (None, "wan")):
        run = Run(recipe, tmp_path / "run", inputs=Inputs({}, converted, given))
        stage = recipe.stages["adversarial"]
        assert run.inputs.starts([stage]) == {"discriminator_weights"} | (
            set() if given else {"weights"}
        )
        assert run.inputs.starts([recipe.stages["regression"]]) == {"weights"}
        assert run.inputs.starts([recipe.stages["extension"]]) == set()
        trunk = run.discriminator(stage).world.state_dict()
        file = tmp_path / expected / "model.safetensors"
        name = "transformer.blocks.1.cross.q.weight"
        assert torch.equal(trunk[name], read_tensors(file)[name].float())
    assert run.starting_model(None).state_dict()[name].equal(trunk[name])


def test_weights_that_no_discriminator_takes(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "check_text", lambda run: None)
    run = Run(changed(wan_1_3b(), SMALL), tmp_path, inputs=Inputs({}, converted, converted))
    with pytest.raises(
        ValueError, match="^discriminator_weights: expected none for wan-1.3b, whose"
    ):
        run.check(["diffusion"])


def test_the_record_holds_what_a_checkpoint_says_of_itself(converted, tmp_path):
    config = load_config(converted)
    write_json(converted / "config.json", {"format_version": 1, **config, "text": "../umt5"})
    out = tmp_path / "run"
    out.mkdir()
    inputs = Inputs({}, converted)
    assert inputs.claim(out, [], {"weights"}) is None
    (record,) = (json.loads((out / "inputs.json").read_text())["weights"],)
    assert record["file"] == str(converted / "model.safetensors")
    assert record["checkpoint"]["converted"]["licence"] == "Apache-2.0"
    assert record["checkpoint"]["text"] == str((tmp_path / "umt5").resolve())
    moved = converted.rename(tmp_path / "moved")
    assert Inputs({}, moved / "model.safetensors").claim(out, [], {"weights"}) is None
    assert Inputs({}, tmp_path / "none").claim(out, [], set()) is None  # a stage that needs none
    save_file(weights(1), tmp_path / "other.safetensors")
    said = Inputs({}, tmp_path / "other.safetensors").claim(out, [], {"weights"})
    assert "weights: expected" in said and "as before, got" in said


def test_sets_of_several_rates_are_rejected(tmp_path):
    for name, fps in (("a", 16), ("b", 24)):
        (tmp_path / name).mkdir()
        index = {"format_version": 1, "encoding": {"fps": fps}, "buckets": {"48x32": {}}}
        write_json(tmp_path / name / "index.json", index)
    assert Inputs({ANY_SET: [tmp_path / "a"]}).fps("48x32") == 16
    both = Inputs({"48x32": [tmp_path / "a", tmp_path / "b"]})
    with pytest.raises(ValueError, match=r"^48x32: expected clips of one rate, got \[16, 24\] fps"):
        both.fps("48x32")
