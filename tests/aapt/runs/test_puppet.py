"""The recipe of the puppet in small: from rendered figures to a stream that follows poses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aapt import StreamingGenerator
from aapt.checkpoint import load_config, read_tensors
from aapt.commands.app import main
from aapt.runs.loop import RunOptions
from aapt.runs.run import run
from aapt.runs.stage_order import stage_names
from aapt.streaming.poses import load_poses
from aapt.training.curriculum import constant
from aapt.training.puppet_recipe import tiny_puppet

from ...docs.test_pages import ROOT, blocks

STEPS = 2


def small_recipe():
    recipe = tiny_puppet()
    model = replace(
        recipe.model,
        width=32,
        heads=2,
        head_dim=16,
        depth=3,
        rope_axes=(4, 6, 6),
        reference_grid=(3, 3),
    )
    curriculum = constant("clips", frames=4, batch=2, steps=STEPS)
    brief = {"steps": STEPS, "batch": 2, "segment_frames": 2}
    small = {
        "diffusion": {"curriculum": curriculum},
        "consistency": {"curriculum": curriculum},
        **dict.fromkeys(("regression", "long-regression"), brief),
        # later segments leave their clips, whose poses then turn back
        **dict.fromkeys(("adversarial", "extension"), brief | {"discriminator_warmup": 1}),
        "final": brief | {"discriminator_warmup": 1, "lead_segments": 1},
    }
    lengths = {
        "clips": {"latent_frames": 6, "video_clips": 2},
        "long-clips": {"latent_frames": 10},
        "minute-clips": {"latent_frames": 12},
    }
    return replace(
        recipe,
        model=model,
        data={
            name: replace(data, height=48, width=48, clips=3, **lengths[name])
            for name, data in recipe.data.items()
        },
        decoder=replace(recipe.decoder, video_frames=9, steps=STEPS),
        light_decoder=replace(recipe.light_decoder, video_frames=9, steps=STEPS),
        stages={name: replace(stage, **small[name]) for name, stage in recipe.stages.items()},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("puppet")
    options = RunOptions(save_every=None, sample_every=None)
    folder = run(small_recipe(), out, workers=1, options=options, report=lambda line: None)
    return out, folder


def test_every_stage_trains_on_poses(trained):
    out, folder = trained
    for stage in stage_names(small_recipe()):
        assert (out / stage / "weights.safetensors").is_file()
    clips = read_tensors(out / "clips" / "weights.safetensors")
    assert clips["latents"].shape == (3, 32, 6, 6, 6)
    assert clips["skeletons"].shape == (3, 32, 5, 6, 6)
    assert load_config(folder)["poses"] is True and load_config(folder)["camera"] is None


def test_the_checkpoint_follows_poses(trained):
    generator = StreamingGenerator.from_pretrained(trained[1])
    picture = np.asarray(Image.open(generator.sample_image()))
    made = []
    for name in ("dance", "jump"):
        script = load_poses(name)
        stream = generator.open(picture, generator.sample_prompt, pose=script.first)
        steps = script.steps(generator.fps, generator.frames_per_step)
        made.append(np.concatenate([stream.step(pose) for _, pose in zip(range(4), steps)]))
    assert made[0].shape == (16, 48, 48, 3) and not np.array_equal(*made)
    assert generator.sample_prompt == "wizard in a meadow" and len(generator.themes) == 6


def test_the_page_runs(trained, tmp_path, monkeypatch):
    (tmp_path / "tiny-puppet").symlink_to(trained[1], target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "docs" / "poses.md", {"python"})
    names = {}
    exec(compile(block, "docs/poses.md", "exec"), names)
    assert names["frames"].shape == (4, 48, 48, 3)


def test_generate_takes_a_preset_or_a_file(trained, tmp_path, capfd):
    model = ["--model", str(trained[1]), "--seconds", "1", "--seed", "3"]
    preset = Path(__file__).parents[3] / "aapt" / "assets" / "poses" / "wave.json"
    for name, pose in (("a", "wave"), ("b", str(preset)), ("c", "jump")):
        out = ["--pose", pose, "--out", str(tmp_path / name)]
        assert main(["generate", *model, *out]) == 0
    a, b, c = (
        np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / name).glob("*.png"))])
        for name in "abc"
    )
    assert a.shape == (25, 48, 48, 3) and np.array_equal(a, b) and not np.array_equal(a, c)
    capfd.readouterr()
    assert main(["generate", *model, "--controls", "walk", "--out", str(tmp_path / "d")]) == 2
    assert "controls: expected none for a model without camera, got walk" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("pose", "said"),
    [
        ("wave", "pose: expected none for a model that follows no poses, got wave; pass --model"),
        ("wafe", "pose: expected a file or one of show"),
    ],
)
def test_generate_says_which_poses_it_cannot_use(pose, said, tmp_path, capfd):
    assert main(["generate", "--pose", pose, "--out", str(tmp_path / "x")]) == 2
    assert said in capfd.readouterr().err
