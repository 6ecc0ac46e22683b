"""Progress and metrics of a run, interrupted and resumed."""

import io
import itertools
import json
import math
import time

import pytest
from rich.console import Console

from aapt.runs.monitor import Monitor, read_metrics


def run(folder, updates, steps=10, **options):
    """Make updates with loss = step / 4. Returns the lines shown without a terminal."""
    shown = io.StringIO()
    options = {"console": Console(file=shown), "seconds_between_lines": 0.0} | options
    with Monitor(folder, "diffusion", steps, updates.start, **options) as monitor:
        for step in updates:
            monitor.update(step, {"loss": step / 4, "gradient": 1e-5})
    return shown.getvalue()


def test_each_update_is_a_line_of_strict_json(tmp_path):
    run(tmp_path / "new" / "folder", range(3))
    lines = (tmp_path / "new" / "folder" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0], parse_constant=lambda name: pytest.fail(name))
    assert list(first) == ["step", "seconds", "loss", "gradient"]
    assert [json.loads(line)["loss"] for line in lines] == [0, 0.25, 0.5]


def test_lines_are_there_before_the_run_ends(tmp_path):
    with Monitor(tmp_path, "a", 2, console=Console(file=io.StringIO())) as monitor:
        monitor.update(0, {"loss": 1.0})
        assert [line["loss"] for line in read_metrics(monitor.path)] == [1.0]


def test_numbers_that_are_not_finite_survive(tmp_path):
    with Monitor(tmp_path, "a", 1, console=Console(file=io.StringIO())) as monitor:
        monitor.update(0, {"nan": math.nan, "up": math.inf, "down": -math.inf})
    json.loads(monitor.path.read_text(), parse_constant=lambda name: pytest.fail(name))
    (line,) = read_metrics(monitor.path)
    assert math.isnan(line["nan"]) and (line["up"], line["down"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("half", ["", '{"step": 6, "secon', '{"step": 6, "seconds": 1.0}'])
def test_a_resumed_run_replaces_the_lines_of_its_updates(tmp_path, half):
    run(tmp_path, range(6))
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + half.encode())  # killed while it wrote
    assert len(read_metrics(path)) == 6
    run(tmp_path, range(4, 7))
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert path.read_bytes().startswith(b"".join(before.splitlines(keepends=True)[:4]))


def test_a_run_that_starts_over_leaves_nothing_of_the_old_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("of something else\n")
    run(tmp_path, range(2))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]


def test_seconds_continue_after_a_resume(tmp_path, monkeypatch):
    """An update takes two seconds of this clock, which is read once at the start."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(1000, 2).__next__)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "seconds": 100.5}\n{"step": 1, "seconds": 300}\n')
    run(tmp_path, range(1, 4))
    assert [line["seconds"] for line in read_metrics(path)] == [100.5, 102.5, 104.5, 106.5]


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("hello", "'hello'"),
        ("[1, 2]", r"'\[1, 2\]'"),
        ('{"step": 1}', "'{\"step\": 1}'"),
        ('{"step": 1, "seconds": 2, "loss": "small"}', ".*small"),
        ('{"step": 1, "seconds": 2, "loss": [1]}', ".*loss"),
    ],
)
def test_a_foreign_line_is_named(tmp_path, line, got):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "seconds": 0}\n' + line + "\n")
    expected = rf"metrics\.jsonl: line 2: expected a JSON object .* seconds, got {got}"
    with pytest.raises(ValueError, match=expected):
        read_metrics(path)
    before = path.read_text()
    with pytest.raises(ValueError, match=expected):
        run(tmp_path, range(1, 2))
    assert path.read_text() == before


def test_missing_metrics_and_wrong_starts_are_said(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl: expected a file of metrics, which is mis"):
        read_metrics(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="start_step: expected 0 to 5, got 6"):
        Monitor(tmp_path, "a", 5, 6)


def test_a_log_file_gets_plain_lines(tmp_path, monkeypatch):
    """Seven more updates of two seconds each take 14."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(1000, 2).__next__)
    assert run(tmp_path, range(2, 4)).splitlines() == [
        "diffusion 3/10  0.5 it/s  ETA 0:00:14  loss 0.5  gradient 1e-05",
        "diffusion 4/10  0.5 it/s  ETA 0:00:12  loss 0.75  gradient 1e-05",
    ]


def test_a_log_file_gets_no_more_lines_than_were_asked_for(tmp_path):
    lines = run(tmp_path, range(10), seconds_between_lines=3600).splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "10/10"]


def test_a_terminal_gets_a_live_bar_and_all_metrics(tmp_path):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=60)
    run(tmp_path, range(10), console=console)
    assert "10/10" in shown.getvalue() and "loss 2.25" in shown.getvalue()
    assert "it/s  ETA" in shown.getvalue()


def test_what_fails_inside_is_raised_and_the_file_closed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with Monitor(tmp_path, "a", 3, console=Console(file=io.StringIO())) as monitor:
            monitor.update(0, {"loss": 1.0})
            raise KeyboardInterrupt
    assert len(read_metrics(monitor.path)) == 1
    with pytest.raises(ValueError, match="closed"):
        monitor.update(1, {"loss": 1.0})
