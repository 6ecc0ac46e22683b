"""A dry run tries every stage at full size, keeps nothing, and foresees the time."""

import dataclasses
import json
from pathlib import Path

import pytest

from aapt.commands.app import main
from aapt.lock import FolderInUse, folder_lock
from aapt.runs.dry_run import dry_run, duration, shortened, shortened_stage, stage_seconds
from aapt.runs.loop import RunOptions, TrainingError
from aapt.runs.parallel import Parallel
from aapt.training.optimization import Schedule
from aapt.training.recipe import Recipe
from aapt.training.recipes import paper_8b, tiny_world, wan_1_3b_matched
from aapt.training.savings import with_switches

from .test_run import small_recipe

MATCHING = wan_1_3b_matched().stages["matching"]
ALONE = {"parallel": Parallel.single(), "options": RunOptions(), "workers": 1}


def short_recipe() -> Recipe:
    """Three small stages, of which the first and the last are long."""
    recipe = small_recipe()
    stages = {name: recipe.stages[name] for name in ("diffusion", "consistency", "adversarial")}
    many = {"steps": 1000, "discriminator_warmup": 100}
    near = {"clips": "clips", "segments": 1, "start": "consistency"}
    stages["adversarial"] = dataclasses.replace(stages["adversarial"], **many, **near)
    clips = {"clips": dataclasses.replace(recipe.data["clips"], clips=50, video_clips=50)}
    return dataclasses.replace(recipe, stages=stages, data=clips)


def test_every_stage_runs_and_nothing_is_kept(tmp_path):
    """Also with switches that save memory: an extension loads what was merged."""
    lines, recipe = [], short_recipe()
    starts = {"start": "adversarial", "discriminator_start": "adversarial"}
    extension = dataclasses.replace(recipe.stages["adversarial"], **starts)
    matching = dataclasses.replace(MATCHING, clips="clips", batch=2, segment_frames=3)
    stages = recipe.stages | {"matching": matching, "extension": extension}
    recipe = dataclasses.replace(recipe, stages=stages)
    recipe = with_switches(recipe, ["eight-bit", "lora=2", "discriminator-lora=2"])
    dry_run(recipe, tmp_path / "run", report=lines.append, **ALONE)
    assert [line.split(": ")[0] for line in lines] == [
        "diffusion",
        "consistency",
        "adversarial",
        "matching",
        "extension",
        "all stages",
    ]
    assert "works; 1000 updates take" in lines[3]
    assert "works; 2 updates take" in lines[0] and "works; 1100 updates take" in lines[2]
    assert not list(tmp_path.iterdir())


def test_a_stage_that_fails_is_named_and_nothing_is_kept(tmp_path, monkeypatch):
    """Also if the run's folder is the current one, whose path has no name."""
    recipe = short_recipe()
    wild = dataclasses.replace(recipe.stages["consistency"], schedule=Schedule(1e30))
    recipe = dataclasses.replace(recipe, stages={**recipe.stages, "consistency": wild})
    with pytest.raises(TrainingError, match="consistency: step 1"):
        dry_run(recipe, tmp_path / "run", report=print, **ALONE)
    assert not list(tmp_path.iterdir())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(TrainingError, match="consistency: step 1"):
        dry_run(recipe, Path(), report=print, **ALONE)
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_what_a_killed_dry_run_left_is_removed_and_nothing_else(tmp_path):
    left = tmp_path / "run.dry-run"
    left.mkdir()
    (left / "recipe.json").write_text("{}")
    with folder_lock(left), pytest.raises(ValueError, match="expected a folder in use by no other"):
        dry_run(short_recipe(), tmp_path / "run", report=print, **ALONE)
    (left / "recipe.json").rename(left / "diary.txt")
    with pytest.raises(
        ValueError, match="run.dry-run: expected what a dry run left, got something"
    ):
        dry_run(short_recipe(), tmp_path / "run", report=print, **ALONE)
    (left / "diary.txt").rename(left / "recipe.json")
    dry_run(short_recipe(), tmp_path / "run", report=lambda line: None, **ALONE)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_that_another_has_overtaken_leaves_its_folder(tmp_path, monkeypatch):
    """Both found nothing there."""
    folder = tmp_path / "run.dry-run"
    folder.mkdir()
    (folder / "recipe.json").write_text("{}")
    monkeypatch.setattr("aapt.runs.dry_run._clear", lambda folder: None)
    with folder_lock(folder), pytest.raises(FolderInUse):
        dry_run(short_recipe(), tmp_path / "run", report=print, **ALONE)
    assert (folder / "recipe.json").is_file()


@pytest.mark.parametrize("make", [tiny_world, paper_8b])
def test_only_updates_and_clips_are_fewer(make):
    recipe = make()
    brief = shortened(recipe)
    assert brief.stages.keys() == recipe.stages.keys() and brief.data.keys() == recipe.data.keys()
    kinds = set()
    for name, config in recipe.stages.items():
        short, updates = brief.stages[name], 1 if type(config) in kinds else 2
        kinds.add(type(config))
        if hasattr(config, "curriculum"):
            assert {phase.steps for phase in short.curriculum.phases} == {updates}
            assert len(short.curriculum.phases) == len(config.curriculum.phases)
            assert dataclasses.replace(short, curriculum=config.curriculum) == config
        else:
            warmup = getattr(config, "discriminator_warmup", None)
            back = {"steps": config.steps} | ({"discriminator_warmup": warmup} if warmup else {})
            assert short.steps + (short.discriminator_warmup if warmup else 0) == updates
            assert dataclasses.replace(short, **back) == config
    assert (
        dataclasses.replace(
            brief,
            stages=recipe.stages,
            data=recipe.data,
            decoder=recipe.decoder,
            light_decoder=recipe.light_decoder,
        )
        == recipe
    )


@pytest.mark.parametrize(
    "config, seconds, expected",
    [
        (paper_8b().stages["diffusion"], [9, 10, 20, 22, 30, 35], 20_000 + 2 * 6_000 + 5 * 4_000),
        (paper_8b().stages["adversarial"], [8, 11], 500 * 3),
        (tiny_world().stages["adversarial"], [4, 8], 60 * 4 + 220 * 4),
        (MATCHING, [9, 19, 22, 29], 200 * (4 * 3 + 7)),
        (dataclasses.replace(MATCHING, critic_updates=1), [9, 19], 200 * 10),
    ],
)
def test_the_second_update_of_each_phase_is_timed(config, seconds, expected, tmp_path):
    lines = [json.dumps({"step": step, "seconds": end}) for step, end in enumerate(seconds)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert stage_seconds(config, tmp_path / "metrics.jsonl") == pytest.approx(expected)
    made = shortened_stage(config)
    updates = getattr(made, "curriculum", made).steps + getattr(made, "discriminator_warmup", 0)
    updates *= getattr(made, "critic_updates", 1)
    assert updates == len(seconds)


@pytest.mark.parametrize(
    ("config", "seconds", "expected"),
    [
        (paper_8b().stages["consistency"], [9], 5_000 * 9),
        (tiny_world().stages["extension"], [4], (40 + 160) * 4),  # an upper bound
        (MATCHING, [9, 19], 200 * (4 * 9 + 10)),
    ],
)
def test_the_only_update_of_a_stage_that_is_warm_is_timed(config, seconds, expected, tmp_path):
    lines = [json.dumps({"step": step, "seconds": end}) for step, end in enumerate(seconds)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert stage_seconds(config, tmp_path / "metrics.jsonl", warm=True) == expected
    short = shortened_stage(config, warm=True)
    if hasattr(config, "discriminator_warmup"):
        assert (short.steps, short.discriminator_warmup) == (1, 0)


def test_times_have_fitting_units():
    assert [duration(s) for s in (3.14, 150, 7200, 864_000)] == [
        "3.1 s",
        "2.5 min",
        "2.0 h",
        "10.0 days",
    ]


def test_the_command_refuses_a_single_stage(capsys):
    assert main(["train", "tiny-world", "--dry-run", "--stage", "diffusion"]) == 2
    assert "stage: expected none with --dry-run" in capsys.readouterr().err
    assert main(["train", "tiny-world", "--dry-run", "--plan"]) == 2
    assert "dry_run: expected none with --plan" in capsys.readouterr().err
    assert main(["train", "vae-light", "--dry-run"]) == 2
    assert "dry_run: expected none for the recipe vae-light" in capsys.readouterr().err
