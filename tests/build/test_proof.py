"""The pages of the proof, from small invented reports, and the files they are made of."""

import dataclasses
import json
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from aapt.checkpoint import BUNDLED, load_config, save_config
from aapt.clock import STEPS_PER_SECOND
from aapt.evaluate.windows import WINDOWS
from aapt.lock import FolderInUse, folder_lock
from aapt.model.config import SamplingConfig
from aapt.training.recipes import paper_8b, tiny_world

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "a processor", "threads": 1}


@pytest.fixture
def proof(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.proof")


def result(proof, sharpness, **others):
    """Result with two sources; `sampled` is half as sharp as `plain`. No theme is known."""
    fields = {field: 1.0 for _, field, _ in proof.COLUMNS} | {"theme_kept": None}
    measured = {
        source: fields | {"sharpness": share * sharpness}
        for source, share in (("plain", 1), ("sampled", 0.5))
    }
    report = {
        "settings": {"starts": 6, "seconds": 60.0, "seed": 0},
        "environment": MACHINE,
        "windows": {window: measured for window in ("4-6 s", "55-60 s")},
    }
    return proof.Result(report, **{"minutes": {}, "speeds": {}} | others)


@pytest.fixture
def experiment(proof):
    sampled = {"sampled": SamplingConfig(8, 6.0, 10.0)}
    return proof.Experiment("Is it?", {}, tiny_world(), ("plain",), sampled, starts=6)


def test_a_page_shows_means_and_distances_over_seeds(proof, experiment):
    speeds = {"plain": (1, 2.0), "sampled": (16, 40.0)}
    results = {
        0: result(proof, 0.8, minutes={"evaluation": 3.0}, speeds=speeds),
        2: result(proof, 0.6, minutes={"evaluation": 5.0, "plain": 7.0}, speeds=speeds),
    }
    text = proof.page(experiment, "small", results)
    assert text.startswith("# small\n\nIs it?\n")
    assert "`python -m benchmarks.proof small --run RUN --seeds 0 2`" in text
    assert "6 held-out worlds of 60 s" in text
    assert "(a processor, threads: 1): evaluation 4.0 ± 1.0, plain 7.0." in text
    late = text.partition("## 55-60 s")[2].splitlines()
    assert late[2].split(" | ")[:3] == ["| ", "latent deviation", "sharpness"]
    assert late[3] == "|---" * (1 + len(proof.COLUMNS)) + "|"
    assert late[4].split(" | ")[:3] == ["| plain", "1.00 ± 0.00", "0.70 ± 0.10"]
    assert late[5].split(" | ")[:3] == ["| sampled", "1.00 ± 0.00", "0.35 ± 0.05"]
    assert late[4].split(" | ")[5] == "-"
    assert "| sampled | 16 | 40.0 ± 0.0 |" in text
    assert "](small-sheet.jpg)" in text and "](small-drift.png)" in text


def test_one_process_works_in_a_folder(proof, experiment, tmp_path):
    with folder_lock(tmp_path), pytest.raises(FolderInUse, match="in use by process"):
        proof.measure(experiment, 0, tmp_path / "run", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_known_is_left_out(proof, experiment):
    only_one = dataclasses.replace(experiment, samplings={})
    text = proof.page(only_one, "small", {1: result(proof, 0.8)})
    assert "CPU minutes" not in text and "forward passes" not in text and "±" not in text


def test_the_reading_of_a_page_survives(proof, experiment, tmp_path):
    pictures, docs = tmp_path / "evaluation", tmp_path / "docs"
    pictures.mkdir()
    for name in ("drift.png", "sheet.png"):
        Image.new("RGB", (8, 6)).save(pictures / name)
    speeds = {"speeds": {"plain": (1, 2.0), "sampled": (16, 40.0)}}
    proof.publish(experiment, "small", {0: result(proof, 0.8, **speeds)}, pictures, docs)
    path, reading = docs / "small.md", "\n## Reading\n\nBy hand.\n\n## More\n"
    first = path.read_text()
    assert first == proof.page(experiment, "small", {0: result(proof, 0.8, **speeds)})
    path.write_text(first + reading)
    proof.publish(experiment, "small", {0: result(proof, 0.4, **speeds)}, pictures, docs)
    again = path.read_text()
    assert again.endswith(reading) and again.count("## Reading") == 1
    assert "0.40" in again and "0.80" not in again
    assert {p.name for p in docs.iterdir()} == {"small.md", "small-drift.png", "small-sheet.jpg"}
    with Image.open(docs / "small-sheet.jpg") as sheet:
        assert sheet.format == "JPEG" and sheet.size == (8, 6)


def test_minutes_add_up_over_calls_that_were_stopped(proof, tmp_path, monkeypatch):
    clock = iter([0.0, 60.0, 100.0, 130.0])
    monkeypatch.setattr(proof.os, "times", lambda: (next(clock), 0.0, 0.0, 0.0, 0.0))
    with pytest.raises(KeyboardInterrupt), proof.counted(tmp_path, "short"):
        raise KeyboardInterrupt
    with proof.counted(tmp_path, "short"):
        pass
    assert json.loads((tmp_path / "minutes.json").read_text()) == {"short": 1.5}


def test_results_of_several_machines_are_kept_by_seed(proof, experiment, tmp_path):
    made = {seed: result(proof, 0.1 * seed, minutes={"plain": 2.0}) for seed in (10, 2)}
    for seed, each in made.items():
        longer = dataclasses.replace(each, report={**each.report, "timeline": [1.0] * 900})
        proof.keep(experiment, longer, tmp_path / "small" / f"seed-{seed}.json")
    found = proof.kept(experiment, tmp_path / "small")
    assert list(found) == [2, 10] and found == made
    asked = dataclasses.replace(experiment, question="Is it so?")
    assert proof.kept(asked, tmp_path / "small") == made
    changed = dataclasses.replace(experiment, starts=7)
    with pytest.raises(ValueError, match="seed-.*: expected a seed of this experiment as it is"):
        proof.kept(changed, tmp_path / "small")


def test_a_new_switch_that_is_off_leaves_results_valid(proof, experiment):
    @dataclasses.dataclass(frozen=True)
    class Later(type(experiment)):
        switch: bool = False

    later = Later(**{f.name: getattr(experiment, f.name) for f in dataclasses.fields(experiment)})
    assert proof.digest(later) == proof.digest(experiment)
    assert proof.digest(dataclasses.replace(later, switch=True)) != proof.digest(experiment)


def test_times_of_several_machines_are_told_apart(proof, experiment):
    speeds = {"plain": (1, 2.0), "sampled": (16, 40.0)}
    here, there = (
        result(proof, 0.8, minutes={"plain": taken}, speeds=speeds) for taken in (2.0, 6.0)
    )
    there.report["environment"] = {"cpu": "another", "threads": 2}
    text = proof.page(experiment, "small", {0: here, 1: there})
    assert "CPU minutes (a processor, threads: 1): plain 2.0." in text
    assert "CPU minutes (another, threads: 2): plain 6.0." in text
    assert text.count("| forward passes | CPU ms (") == 2


class FakeRun:
    def __init__(self, out):
        self.out, self.exported = out, []

    def export(self, stage, folder):
        self.exported.append(stage)
        save_config(folder, {"stage": stage, "sampling": None})


@pytest.mark.parametrize("start", ["random", "zero"])
def test_what_comes_before_is_trained_once_for_all(proof, tmp_path, monkeypatch, start):
    experiment = proof.EXPERIMENTS[f"camera-{start}-start"]()
    trained = []

    class Run(FakeRun):
        def __init__(self, recipe, out, workers):
            super().__init__(out)
            self.recipe = recipe

        def claim(self):
            assert self.recipe.camera is None and self.recipe.model.condition_channels == 0

        def result(self, stage):
            return self.out / stage / "weights.safetensors"

        def run(self, stage):
            trained.append(stage)
            self.result(stage).parent.mkdir()
            self.result(stage).touch()

    monkeypatch.setattr(proof, "Run", Run)
    given = 3, tmp_path / "shared"
    places = [tmp_path / name / "seed-3" for name in ("camera-zero-start", "camera-random-start")]
    weights, minutes = proof.train_before(experiment, *given, places[0])
    assert weights == tmp_path / "small-world-uncontrolled/seed-3/diffusion/weights.safetensors"
    assert list(minutes) == ["small-world-uncontrolled diffusion"]
    assert proof.train_before(experiment, *given, places[1])[0] == weights and len(trained) == 1
    assert proof.train_before(proof.EXPERIMENTS["camera"](), *given, places[1]) == (None, {})


def test_one_stage_is_sampled_in_several_ways(proof, experiment, tmp_path):
    run = FakeRun(tmp_path)
    for _ in range(2):  # a second call finds everything there
        folders = proof.export(experiment, run)
    assert run.exported == ["plain", "diffusion"]
    assert load_config(folders["plain"])["sampling"] is None
    expected = {"steps": 8, "shift": 6.0, "guidance": 10.0}
    assert load_config(folders["sampled"]) == {"stage": "diffusion", "sampling": expected}


def test_a_frame_of_the_bundled_model_is_one_pass(proof):
    passes, milliseconds = proof.speed(BUNDLED / "tiny-world", frames=1)
    assert passes == 1 and milliseconds > 0


def test_every_experiment_can_be_made(proof):
    for name, make in proof.EXPERIMENTS.items():
        made = make()
        assert made.question and {*made.variants, *made.beside, *made.samplings}, name
        assert set(made.beside) <= set(made.recipe.stages)


def test_every_window_of_an_experiment_is_measured(proof):
    for name, make in proof.EXPERIMENTS.items():
        made = make()
        ends = {window.name: window.last / STEPS_PER_SECOND for window in WINDOWS}
        assert max(ends[window] for window in made.windows) <= made.seconds, name


def test_variants_differ_and_start_from_stages_that_exist(proof):
    for name, make in proof.EXPERIMENTS.items():
        made = make()
        configs = list(made.variants.values())
        assert all(configs.count(config) == 1 for config in configs), name
        stages = {**made.recipe.stages, **made.variants}
        for config in configs:
            starts = {config.start, getattr(config, "discriminator_start", None)}
            assert starts - {None} <= set(stages), name


def test_the_papers_stage_three_has_the_papers_switches(proof):
    """Only sizes, lengths, rates, numbers of updates and the average that suits them differ from
    `paper-8b`."""
    ours, theirs = proof.EXPERIMENTS["as-written"](), paper_8b()
    assert ours.recipe.raw_starts
    for field in ("output_clamp", "residual_head", "sink_distance", "recycle"):
        assert getattr(ours.recipe.model, field) == getattr(theirs.model, field)
    scaled = {
        *(
            "clips",
            "steps",
            "batch",
            "average",
            "segment_frames",
            "shortest_segment",
            "overlap_frames",
        ),
        *("generator_schedule", "discriminator_schedule", "start", "discriminator_start"),
    }
    stages = dict(zip(("first", "second", "third"), ("adversarial", "extension", "extension-5")))
    for name, stage in stages.items():
        found, expected = (
            {key: value for key, value in dataclasses.asdict(each).items() if key not in scaled}
            for each in (ours.variants[name], theirs.stages[stage])
        )
        assert found == expected


def test_pages_answer_the_questions_of_their_experiments(proof):
    others = ("index", "claims", "gradient-conflict")  # of no training
    files = [path for path in (ROOT / "docs/proof").glob("*.md") if path.stem not in others]
    pages = {path.stem: path.read_text() for path in files}
    planned = (ROOT / "docs/proof/index.md").read_text().partition("## Not run yet")[2]
    assert set(pages) <= set(proof.EXPERIMENTS)
    assert all(f"`{name}`" in planned for name in set(proof.EXPERIMENTS) - set(pages))
    for name, text in pages.items():
        head, _, reading = text.partition(proof.READING)
        assert head.startswith(f"# {name}\n\n{proof.EXPERIMENTS[name]().question}\n"), name
        assert f"`python -m benchmarks.proof {name} --run RUN --seeds " in head
        assert proof.LEGEND in head
        assert reading.strip(), name
