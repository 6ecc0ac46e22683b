"""Comparisons over seeds, from invented reports."""

import json
from pathlib import Path

import pytest

from aapt.checkpoint import write_json
from aapt.commands.app import main
from aapt.evaluate.compare import Comparison, Interval, compare
from aapt.lock import FolderInUse, folder_lock

WORLDS = {0: 1.0, 1: 2.0, 2: 6.0, 3: 5.0}  # what a seed's worlds add to every checkpoint
GAINS = {"a": 0.0, "b": 0.2}

HERE = {"device": "cpu", "dtype": "float32", "size": "128x80", "cache": "model"}
WEIGHTS = {}  # by path, where they are not the first


def digests(checkpoints):
    return {Path(path).name: WEIGHTS.get(str(path), "first") for path in checkpoints}


@pytest.fixture
def evaluated(monkeypatch):
    """Replace evaluations by reports, and list the seeds that were evaluated.

    Checkpoint b is 0.2 above a, more or less, on worlds that differ by whole units.
    """
    seeds = []

    def evaluate(checkpoints, out, *, seed, log, starts=16, seconds=60.0, **settings):
        seeds.append(seed)
        noise = 0.01 * (-1) ** seed
        measured = {
            name: {"sharpness": WORLDS[seed] + gain * (1 + noise), "psnr": None, "fvd": None}
            for name, gain in GAINS.items()
        }
        measured["truth"] = {"sharpness": 1.0, "psnr": None, "fvd": 3.0 if seed == 0 else None}
        given = {name: str(value) for name, value in settings.items() if value is not None}
        report = {
            "checkpoints": {Path(path).name: str(path) for path in checkpoints},
            "digests": digests(checkpoints),
            "settings": {"starts": starts, "seconds": seconds, "seed": seed} | HERE | given,
            "windows": {"4-6 s": measured},
        }
        out.mkdir(parents=True)
        write_json(out / "report.json", report)

    def load(checkpoint, **where):
        return HERE | {name: str(value) for name, value in where.items() if value is not None}

    for name, stub in (("evaluate", evaluate), ("checkpoint_digests", digests), ("placed", dict)):
        monkeypatch.setattr(f"aapt.evaluate.compare.{name}", stub)
    monkeypatch.setattr("aapt.evaluate.compare.StreamingGenerator.from_pretrained", load)
    return seeds


def silent(_: str) -> None:
    """Say nothing."""


def test_an_interval_by_hand():
    """Student's t for two degrees of freedom is 4.303, and the deviation of 1, 2, 3 is 1."""
    found = Interval.of([1.0, 2.0, 3.0])
    assert (found.mean, found.half) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert not found.clear and Interval.of([2.0, 2.1, 1.9]).clear
    assert Interval.of([1.0]) is None
    many = Interval.of([0.0, 1.0] * 50)
    assert many.half == pytest.approx(2.179 * (0.25 * 100 / 99 / 100) ** 0.5)


def test_differences_are_taken_seed_by_seed(evaluated, tmp_path):
    """Worlds differ by far more than checkpoints, whose difference is clear all the same."""
    found = compare(["x/a", "x/b"], tmp_path, [0, 1, 2, 3], log=silent)
    assert evaluated == [0, 1, 2, 3]
    means, differences = found.means["4-6 s"], found.differences["4-6 s"]
    assert means["a"]["sharpness"].mean == pytest.approx(3.5)
    assert means["b"]["sharpness"].half > 3
    assert set(differences) == {"b"}
    assert differences["b"]["sharpness"].mean == pytest.approx(0.2)
    assert differences["b"]["sharpness"].half < 0.01 and differences["b"]["sharpness"].clear
    assert set(means["truth"]) == {"sharpness"}  # one seed alone has an FVD
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert saved["means"]["4-6 s"]["a"]["sharpness"]["mean"] == pytest.approx(3.5)
    assert saved["settings"] == {"starts": 16, "seconds": 60.0, "seeds": [0, 1, 2, 3]} | HERE
    table = found.table()
    assert [column.header for column in table.columns] == ["window", "source", "sharpness"]
    cells = list(table.columns[2].cells)
    assert [cell.endswith("*") for cell in cells] == [False, True, False]
    assert cells[2] == "1.00 ± 0.00"


def test_reports_that_are_there_are_read(evaluated, tmp_path):
    compare(["a", "b"], tmp_path, [0, 1], log=silent)
    more = compare(["a", "b"], tmp_path, [0, 1, 2], log=silent)
    assert evaluated == [0, 1, 2] and isinstance(more, Comparison)
    other = "seed-0/report.json: expected a report of these checkpoints, .* got another"
    with pytest.raises(ValueError, match=other):
        compare(["a", "other/b"], tmp_path, [0, 1], log=silent)
    with pytest.raises(ValueError, match=other):
        compare(["a", "b"], tmp_path, [0, 1], starts=3, log=silent)
    for where in ({"dtype": "bfloat16"}, {"device": "cuda"}, {"size": "256x160"}):
        with pytest.raises(ValueError, match=f"{other}; pass another folder as --out"):
            compare(["a", "b"], tmp_path, [0, 3], **where, log=silent)
    assert evaluated == [0, 1, 2]  # refused before seed 3 was evaluated


def test_reports_of_other_weights_are_refused(evaluated, tmp_path, monkeypatch):
    """A checkpoint that was trained again keeps its path, and has other weights."""
    compare(["a", "b"], tmp_path, [0, 1], log=silent)
    monkeypatch.setitem(WEIGHTS, "b", "second")
    with pytest.raises(ValueError, match="expected a report of these checkpoints, their weights"):
        compare(["a", "b"], tmp_path, [0, 1, 2], log=silent)
    assert evaluated == [0, 1]


def test_reports_of_another_machine_are_compared_and_not_completed(evaluated, tmp_path):
    compare(["a", "b"], tmp_path, [0, 1], log=silent, device="cuda:0")
    compare(["a", "b"], tmp_path, [0, 1], log=silent)
    with pytest.raises(ValueError, match="seed-0/report.json: expected a report of these"):
        compare(["a", "b"], tmp_path, [0, 1, 2], log=silent)
    assert evaluated == [0, 1]


def test_two_comparisons_never_work_in_one_folder(evaluated, tmp_path):
    with folder_lock(tmp_path), pytest.raises(FolderInUse):
        compare(["a", "b"], tmp_path, [0, 1], log=silent)
    assert not evaluated


def test_a_report_of_another_seed_or_none_at_all_is_refused(evaluated, tmp_path):
    compare(["a", "b"], tmp_path, [0, 1], log=silent)
    report = tmp_path / "seed-1" / "report.json"
    words = "seed-1/report.json: expected a report of these checkpoints, .*, got another"
    for content in ((tmp_path / "seed-0" / "report.json").read_text(), "[]", "{}", "{"):
        report.write_text(content)
        with pytest.raises(ValueError, match=words):
            compare(["a", "b"], tmp_path, [0, 1], log=silent)


def test_reports_of_another_cache_are_refused(evaluated, tmp_path):
    compare(["a", "b"], tmp_path / "model", [0, 1], log=silent)
    compare(["a", "b"], tmp_path / "model", [0, 1], log=silent, cache="model")
    compare(["a", "b"], tmp_path / "float8", [0, 1], log=silent, cache="float8")
    assert evaluated == [0, 1, 0, 1]
    for folder, cache in (("model", "float8"), ("float8", "model"), ("float8", "float8-past")):
        with pytest.raises(ValueError, match="expected a report of these checkpoints, .*"):
            compare(["a", "b"], tmp_path / folder, [0, 1], log=silent, cache=cache)


@pytest.mark.parametrize(
    ("checkpoints", "seeds", "message"),
    [
        (["a"], [0, 1], "checkpoints: expected two or more to compare, got 1"),
        (["a", "b"], [0], "seed: expected two or more different seeds, got 0"),
        (["a", "b"], [1, 1], "seed: expected two or more different seeds, got 1, 1"),
        (["a", "a"], [0, 1], "expected different paths, got a, a"),
    ],
)
def test_what_cannot_be_compared(evaluated, tmp_path, checkpoints, seeds, message):
    with pytest.raises(ValueError, match=message):
        compare(checkpoints, tmp_path, seeds, log=silent)
    assert not evaluated


def test_the_command(evaluated, tmp_path, capsys):
    assert main(["compare", "a", "b", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert evaluated == [0, 1, 2] and "* differs from a" in said.out and "seed 0" in said.err
    again = ["compare", "a", "b", "--seed", "0", "--seed", "1", "--out", str(tmp_path / "out")]
    assert main([*again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["seeds"] == [0, 1]
    assert main(["compare", "a", "--out", str(tmp_path / "out")]) == 2
    assert "aapt: checkpoints: expected two or more" in capsys.readouterr().err
