"""The part `first` of `make gpu`, rehearsed: every case is found on a bare machine, and a fault
costs no case but its own."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import gpu
import gpu_parts
import gpu_watch
import pytest
from gpu_parts import PARTS, Group, Part
from gpu_results import Results
from gpu_watch import run_group

ROOT = Path(__file__).parents[2]
PLUGINS = ["-p", "bare_machine", "-p", "pytest_benchmark.plugin", "-p", "gpu_record"]


def collect(path: Path, *arguments: str) -> Results:
    """Collect with the packages of a bare machine and a stand-in for its device."""
    Results(path, {})
    folders = (ROOT / "tests" / "build" / "fixtures", ROOT / "tools", ROOT)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", *PLUGINS, f"--record={path}", "--collect-only", "-q"]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return Results(path)


def test_every_part_is_found_on_a_bare_machine(tmp_path):
    groups = [group for part in PARTS.values() for group in part.groups]
    cases = dict.fromkeys(case for group in groups for case in group.cases)
    files = dict.fromkeys(file for group in groups for file in group.files)
    arguments = [*(f"--case={case}" for case in cases), *files, "--device=cuda"]
    results = collect(tmp_path / "results.jsonl", *arguments)
    assert results.rows == []  # no file that cannot be imported, no beginning without a case
    for file in files:
        assert any(case.startswith(f"{file}::") for case in results.planned)
    assert not any("[sim" in case for case in results.planned)


def test_a_bare_machine_lacks_what_is_not_listed(tmp_path):
    """The rehearsal itself: a file that needs more is an error, and costs no other file."""
    absent, present = tmp_path / "test_absent.py", tmp_path / "test_present.py"
    absent.write_text("import typer\n\ndef test_it():\n    pass\n")
    present.write_text("import numpy\n\ndef test_it():\n    pass\n")
    results = collect(
        tmp_path / "results.jsonl",
        "--import-mode=importlib",
        f"--rootdir={tmp_path}",
        str(tmp_path),
    )
    (row,) = results.rows
    assert row["outcome"] == "error" and "No module named 'typer'" in row["error"]
    assert results.planned == ["test_present.py::test_it"]


def test_the_page_needs_no_more_than_a_bare_machine_has(tmp_path):
    path = tmp_path / "results.jsonl"
    Results(path, {})
    program = "import bare_machine; from benchmarks.targets import main; print(main(%r))"
    folders = (ROOT / "tests" / "build" / "fixtures", ROOT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", program % str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "decoder_model, large products: 790 TFLOP/s, not measured" in done.stdout
    assert "Error" not in done.stdout


def test_the_deadlines_leave_time_for_what_comes_last():
    """All fits the ten minutes that a command may take, its build included."""
    part = PARTS["first"]
    assert part.seconds <= 540
    *measured, sm90, triton = part.groups
    assert all(45 <= group.seconds <= 60 and group.patience <= 20 for group in measured)
    assert sm90.turns and triton.turns and {"not slow"} < {*sm90.options, *triton.options}
    assert all("triton" in file for file in triton.files)


FAULTS = """
import os
import time
import weakref

import pytest

def idle():
    with open("idle", "w") as file:
        file.write(str(os.getpid()))

def test_good():
    pass

HELD = []

class Held:
    pass  # stands for gigabytes of weights

def test_wrong_result():
    held = Held()
    HELD.append(weakref.ref(held))
    assert sum([1, 1]) == 3

def test_freed():
    assert [held() for held in HELD] == [None]

def test_crash():
    os.abort()

@pytest.mark.parametrize("number", range(4))
def test_hang(number):
    idle()
    while True:
        time.sleep(0.01)

@pytest.mark.parametrize("number", range(3))
def test_lost_context(number):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.patience(100)
def test_patient():
    idle()
    while not os.path.exists("looked"):  # longer than the group allows
        time.sleep(0.01)
    os.remove("idle")

def test_measured(record_property):
    record_property("result", {"summary": "a figure"})
"""


class Idle:
    """The watcher's clock of a machine as slow as it likes.

    A process is idle for 6 s as soon as the case says so, and until it ends; else for none.
    """

    def __init__(self, root):
        self.idle, self.looked = root / "idle", root / "looked"

    def __call__(self, path, begun):
        try:
            process = int(self.idle.read_text())
            os.kill(process, 0)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return 0.0
        running = Results(path).running
        if running is not None and "test_patient" in running["case"]:
            self.looked.touch()
        return 6.0


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A part that runs planted faults, on a stand-in for the device; the results' folder."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "test_faults.py").write_text(FAULTS)
    (root / "test_absent.py").write_text("import no_such_package\n\ndef test_it():\n    pass\n")
    (root / "test_after.py").write_text("def test_after():\n    pass\n")
    faults = Group(
        "faults",
        ("test_absent.py", "test_faults.py", "test_faults.py::test_gone"),
        patience=5,
        turns=True,
    )
    part = Part("planted faults", (faults, Group("after", ("test_faults.py", "test_after.py"))))
    monkeypatch.setitem(gpu_parts.PARTS, "first", part)
    monkeypatch.setattr(gpu, "run_group", partial(run_group, root=root))
    monkeypatch.setattr(gpu_watch, "idle_seconds", Idle(root))
    monkeypatch.setattr(gpu_watch, "DUMP_SECONDS", 300.0)
    monkeypatch.setattr(gpu, "machine", lambda device: {"device": {"name": "NVIDIA stand-in"}})
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    return tmp_path / "out"


def test_every_fault_costs_its_own_case_alone(planted, capsys, monkeypatch):
    monkeypatch.setenv("OUT", str(planted))
    assert gpu.main(["--part", "first", "--seconds", "600"]) == 1
    paths = [path for path in planted.rglob("*") if path.is_file()]
    assert {path.suffix for path in paths} == {".jsonl", ".txt"} and len(paths) == 2
    (path,) = (path for path in paths if path.suffix == ".jsonl")
    assert path.parent == planted / "stand-in"
    results = Results(path)
    outcomes = {
        row["case"].removeprefix("test_faults.py::"): row["outcome"] for row in results.rows
    }
    assert outcomes == {
        "test_absent.py": "error",
        "test_gone": "missing",
        "test_good": "passed",
        "test_wrong_result": "failed",
        "test_freed": "passed",  # of what the failed one held
        "test_crash": "crashed",
        "test_hang[0]": "hung",
        "test_hang[1]": "hung",
        "test_hang[2]": "given up",
        "test_hang[3]": "given up",
        "test_lost_context[0]": "failed",
        "test_lost_context[1]": "failed",
        "test_lost_context[2]": "given up",
        "test_patient": "passed",
        "test_measured": "passed",
        "test_after.py::test_after": "passed",
    }
    assert len(results.rows) == len(outcomes)  # nothing ran twice
    assert results.running is None and results.not_run == []
    words = {row["case"]: row.get("error", "") for row in results.rows}
    assert "no_such_package" in words["test_absent.py"]
    assert "in test_crash" in words["test_faults.py::test_crash"]  # where Python was
    assert "in test_hang" in words["test_faults.py::test_hang[0]"]
    page = path.with_suffix(".txt").read_text()
    assert "test_faults.py::test_hang: 2 hung" in page and "after: 1 passed" in page
    assert "large products: 790 TFLOP/s, not measured" in page
    assert capsys.readouterr().out.rstrip().splitlines()[-3].startswith("  decoder_model")


def test_a_deadline_ends_a_group_and_not_the_next(planted, monkeypatch):
    monkeypatch.setattr(gpu, "targets", lambda path: "")
    slow = Group("slow", ("test_faults.py::test_hang",), seconds=0, patience=100)
    part = Part("a deadline", (slow, Group("after", ("test_after.py",))))
    monkeypatch.setitem(gpu_parts.PARTS, "first", part)
    assert gpu.main(["--part", "first", "--out", str(planted)]) == 1
    (path,) = planted.rglob("*.jsonl")
    outcomes = [(row["group"], row["outcome"]) for row in Results(path).rows]
    assert outcomes == [("slow", "out of time"), ("after", "passed")]
