"""`make gpu` as far as it goes without a GPU: refusals, a dry run, and what becomes of cases that
hang, crash or lose the CUDA context."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import gpu
import pytest
import torch
from gpu_results import Results, format_table, slug
from gpu_watch import run_cases

from aapt_kernels.testing import time_by_turns

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu.py"
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_without_a_part_it_says_what_there_is():
    done = subprocess.run([sys.executable, "-S", TOOL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # -S: with the standard library alone
    assert all(f"PART={part}" in done.stdout for part in gpu.PARTS)


def test_an_unknown_part_is_refused(capsys):
    assert gpu.main(["--part", "tests"]) == 2
    words = "make gpu: PART: expected one of calibrate, test, kernels, stream, got 'tests'\n"
    assert capsys.readouterr().err == words


@WITHOUT_CUDA
def test_a_machine_without_a_gpu_is_refused(capsys):
    assert gpu.main(["--part", "test"]) == 2
    words = f"make gpu: no CUDA device that PyTorch {torch.__version__} can use\n"
    assert capsys.readouterr().err == words


def test_another_gpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100")
    assert gpu.main(["--part", "test"]) == 2
    words = "expected a device with compute capability 9.0, got NVIDIA A100 with (8, 0)\n"
    assert capsys.readouterr().err == f"make gpu: {words}"


def test_missing_packages_are_named(capsys, monkeypatch):
    def find_spec(name):
        return None if name in ("cmake", "pytest_benchmark") else name

    monkeypatch.setattr(gpu, "find_spec", find_spec)
    assert gpu.main(["--part", "test", "--build"]) == 2
    words = f"{sys.executable} lacks pytest-benchmark, cmake: install them with its pip\n"
    assert capsys.readouterr().err == f"make gpu: {words}"


def test_a_build_that_fails_is_refused(capsys, monkeypatch):
    commands = []

    def fails(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fails)
    monkeypatch.setattr(gpu, "check", lambda options: None)
    assert gpu.main(["--part", "test", "--build"]) == 2
    (command,) = commands
    assert command[0] == sys.executable
    assert {"--no-build-isolation", "--no-deps", "-e"} <= set(command)
    assert "make gpu: the build failed" in capsys.readouterr().err


@pytest.mark.parametrize(("dry_run", "status"), [(True, 0), (False, 1)])
def test_skipping_everything_is_no_success_on_a_gpu(tmp_path, dry_run, status):
    results = Results(tmp_path / "results.json", {"part": "test", "dry_run": dry_run})
    results.end("a", "skipped", error="Skipped: no CUDA device")
    assert gpu.report(results) == status


def test_a_dry_run_records_every_case(tmp_path):
    """The whole way, with CPU tensors: a microbenchmark, a ceiling and a step of aapt-8b."""
    files = [f"benchmarks/bench_{name}.py" for name in ("kv_append", "machine", "stream")]
    command = [sys.executable, TOOL, "--part", "kernels", "--dry-run", "--out", tmp_path]
    done = subprocess.run(
        [*command, *files, "-k", "tiny or copy or 416"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "dry-run").glob("*-kernels.json")
    content = json.loads(path.read_text())
    assert content["dry_run"] and content["versions"]["torch"] and content["date"]
    results = {row["case"].split("::")[1].split("[")[0]: row["result"] for row in content["rows"]}
    assert set(results) == {"test_kv_append", "test_copy", "test_aapt_8b"}
    append = results["test_kv_append"]
    assert append["ours"]["us"] > 0 and append["ours"]["gb_per_s"] > 0
    assert append["peers"]["composition, compiled"]["difference"] < 0.02
    assert append["ceilings"]["a copy of as many bytes"]["us"] > 0
    assert results["test_aapt_8b"]["phases_ms"]["products"] > 0
    assert "3 passed" in done.stdout


@pytest.mark.slow
def test_a_dry_run_calibrates_the_simulator_against_float64(tmp_path):
    """Compiles the simulator; its own tests cover the rest of the matrix."""
    command = [sys.executable, TOOL, "--part", "calibrate", "--dry-run", "--out", tmp_path]
    done = subprocess.run([*command, "-k", "fp8"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_fp8_pipeline: simulator: 0 wrong" in done.stdout


CASES = """
import os, time

def test_first():
    pass

def test_crash():
    os._exit(9)

def test_wrong():
    assert 1 == 2

def test_hang():
    time.sleep(1000)

def test_lost_context():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_last(record_property):
    record_property("result", {"process": os.getpid()})
"""


def test_cases_that_hang_or_crash_cost_only_themselves(tmp_path):
    cases = tmp_path / "test_cases.py"
    cases.write_text(CASES)
    path = tmp_path / "results.json"
    Results(path, {"part": "test"})
    run_cases(["-q", "--rootdir", str(tmp_path), str(cases)], path, seconds=300, case_seconds=5)
    results = Results(path)
    outcomes = {row["case"].split("::")[1]: row["outcome"] for row in results.rows}
    assert outcomes == {
        "test_first": "passed",
        "test_crash": "crashed (9)",
        "test_wrong": "failed",
        "test_hang": "hung",
        "test_lost_context": "failed",
        "test_last": "passed",
    }
    assert results.running is None and results.not_run == []
    assert "assert 1 == 2" in next(row["error"] for row in results.rows if "wrong" in row["case"])
    assert gpu.report(results) == 1


def test_time_up_ends_the_case_and_names_the_rest(tmp_path, capsys, monkeypatch):
    def killed(selection, path, deadline, case_seconds):
        results = Results(path)
        results.plan(["a", "b"])
        results.begin("a")
        return -6, "out of time"

    path = tmp_path / "results.json"
    Results(path, {"part": "test"})
    monkeypatch.setattr("gpu_watch.run_once", killed)
    run_cases([], path, seconds=0)
    results = Results(path)
    assert [(row["case"], row["outcome"]) for row in results.rows] == [("a", "out of time")]
    assert gpu.report(results) == 1
    assert "1 not run: out of time" in capsys.readouterr().out


def test_time_up_before_the_first_case(tmp_path):
    path = tmp_path / "results.json"
    Results(path, {"part": "test"})
    run_cases([str(tmp_path)], path, seconds=0)
    assert [row["outcome"] for row in Results(path).rows] == ["out of time"]


def test_a_selection_without_cases_is_a_failure(tmp_path):
    path = tmp_path / "results.json"
    Results(path, {"part": "test"})
    run_cases(["-q", str(tmp_path)], path, seconds=60)
    assert gpu.report(Results(path)) == 1


def test_rows_are_on_disk_at_once(tmp_path):
    path = tmp_path / "h200" / "results.json"
    results = Results(path, {"part": "kernels"})
    results.plan(["a", "b"])
    results.begin("a")
    assert Results(path).running == "a"
    facts = {"us": 2.0, "tflops": 600.0}
    peer = {"us": 3.0, "tflops": 400.0}
    result = {"ours": facts, "peers": {"SDPA": peer, "FA3": {"error": "no"}}, "ceilings": {}}
    results.end("a", "passed", result=result)
    assert Results(path).rows == results.rows and Results(path).not_run == ["b"]
    line = "passed   a: 2.0 us (600 TFLOP/s); best peer SDPA 3.0 us (400 TFLOP/s)"
    assert format_table(results.rows) == line


def test_folders_are_named_after_the_device():
    assert slug("NVIDIA H200") == "h200"
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.conftest").compare


def test_a_peer_that_fails_is_recorded(compare):
    x = torch.ones(4)
    peers = {
        "exact": lambda: x,
        "off": lambda: 1.1 * x,
        "copies": lambda: None,
        "absent": ImportError("no such package"),
        "raises": lambda: x.view(3),
    }
    result = compare(lambda: x, peers, torch.device("cpu"), rounds=2, work=import_work(flops=8))
    assert result["ours"]["us"] > 0 and result["ours"]["tflops"] > 0
    assert result["peers"]["exact"]["difference"] == 0
    assert result["peers"]["off"]["difference"] == pytest.approx(1 / 11)
    assert "difference" not in result["peers"]["copies"]
    assert result["peers"]["absent"] == {"error": "ImportError: no such package"}
    assert result["peers"]["raises"]["error"].startswith("RuntimeError: shape '[3]'")


def import_work(**amounts):
    return import_module("benchmarks.conftest").Work(**amounts)


def test_functions_are_timed_by_turns():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = time_by_turns(functions, torch.device("cpu"), rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert times["a"].p20 <= times["a"].median <= times["a"].p80
