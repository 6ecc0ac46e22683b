"""`make gpu` without a GPU: refusals, a dry run, the results file and its words."""

import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import gpu
import pytest
import torch
from gpu_parts import Group
from gpu_results import Results, format_figures, format_summary, slug
from gpu_watch import run_group

from aapt_kernels.testing import time_by_turns

from ..progress import wait_until

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu.py"
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_without_a_part_it_says_what_there_is():
    done = subprocess.run([sys.executable, "-S", TOOL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # -S: with the standard library alone
    assert all(f"PART={part}" in done.stdout for part in gpu.PARTS)


def test_an_unknown_part_is_refused(capsys):
    assert gpu.main(["--part", "tests"]) == 2
    parts = "first, worlds, calibrate, test, kernels, stream"
    assert capsys.readouterr().err == f"make gpu: PART: expected one of {parts}, got 'tests'\n"


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


def test_an_nvcc_newer_than_the_driver_is_refused(capsys, monkeypatch):
    """Its runtime would fail in the first call of a kernel, whatever PyTorch was built for."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu, "cuda_of_driver", lambda: 12)
    monkeypatch.setattr(gpu, "output_of", lambda *command: "Cuda compiler\nrelease 13.0, V13")
    assert gpu.main(["--part", "test"]) == 2
    words = "use an nvcc of CUDA 12, or a newer driver\n"
    words = f"make gpu: the driver runs CUDA 12, nvcc builds for CUDA 13: {words}"
    assert capsys.readouterr().err == words


def test_missing_packages_are_named(capsys, monkeypatch):
    def find_spec(name):
        return None if name in ("cmake", "pytest_benchmark") else name

    monkeypatch.setattr(gpu, "find_spec", find_spec)
    assert gpu.main(["--part", "test", "--build"]) == 2
    words = f"{sys.executable} lacks pytest-benchmark, cmake: install them with its pip\n"
    assert capsys.readouterr().err == f"make gpu: {words}"


def test_a_build_that_fails_is_refused(capsys, monkeypatch):
    commands, environments = [], []

    def fails(command, env):
        commands.append(command)
        environments.append(env)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fails)
    monkeypatch.setattr(gpu, "check", lambda options: None)
    assert gpu.main(["--part", "test", "--build"]) == 2
    (command,) = commands
    assert command[0] == sys.executable
    assert {"--no-build-isolation", "--no-deps", "-e"} <= set(command)
    assert environments[0]["AAPT_CUDA"] == "on" and environments[0]["AAPT_SIM"] == "off"
    assert "make gpu: the build failed" in capsys.readouterr().err


@pytest.mark.parametrize(("dry_run", "status"), [(True, 0), (False, 1)])
def test_skipping_everything_is_no_success_on_a_gpu(tmp_path, monkeypatch, dry_run, status):
    monkeypatch.setattr(gpu, "targets", lambda path: "")
    results = Results(tmp_path / "results.json", {"part": "test", "dry_run": dry_run})
    results.end("a", "skipped", error="Skipped: no CUDA device")
    assert gpu.report(results) == status


def test_a_dry_run_records_every_case(tmp_path):
    """The whole way, with CPU tensors: a microbenchmark, a ceiling and a step of aapt-8b."""
    files = [f"benchmarks/bench_{name}.py" for name in ("kv_append", "machine", "stream")]
    command = [sys.executable, TOOL, "--part", "kernels", "--dry-run", "--out", tmp_path]
    done = subprocess.run(
        [*command, *files, "-k", "tiny or test_copy or 416"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "dry-run").glob("*-kernels.jsonl")
    results = Results(path)
    assert results.facts["dry_run"] and results.facts["versions"]["torch"]
    assert results.facts["date"] and {row["group"] for row in results.rows} == {"kernels"}
    figures = {row["case"].split("::")[1].split("[")[0]: row["result"] for row in results.rows}
    copies = {"test_copy", "test_copy_within_l2"}
    assert set(figures) == {"test_kv_append", "test_kv_append_float8", *copies, "test_aapt_8b"}
    append = figures["test_kv_append"]
    assert append["ours"]["us"] > 0 and append["ours"]["gb_per_s"] > 0
    assert append["peers"]["composition, compiled"]["difference"] < 0.02
    assert append["ceilings"]["a copy of as many bytes"]["us"] > 0
    assert figures["test_aapt_8b"]["phases_ms"]["products"] > 0
    assert "5 passed" in done.stdout
    page = path.with_suffix(".txt").read_text()
    assert "kernels: 5 passed" in page and page in done.stdout
    assert "decoder_model, device memory: 4.3 TB/s, not measured" in page  # a CPU says nothing


@pytest.mark.slow
def test_a_dry_run_calibrates_the_simulator_against_float64(tmp_path):
    """Compiles the simulator; its own tests cover the rest of the matrix."""
    command = [sys.executable, TOOL, "--part", "calibrate", "--dry-run", "--out", tmp_path]
    done = subprocess.run([*command, "-k", "fp8"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_fp8_pipeline: 0 of 20000 sums are wrong" in done.stdout


def test_time_up_ends_the_case_and_names_the_rest(tmp_path, capsys, monkeypatch):
    def killed(group, path, deadline, root):
        results = Results(path)
        results.plan(["a", "b"])
        results.begin("a")
        return -6, "out of time", ""

    path = tmp_path / "results.jsonl"
    Results(path, {"part": "test"})
    monkeypatch.setattr("gpu_watch.run_once", killed)
    monkeypatch.setattr(gpu, "targets", lambda path: "")
    run_group(Group("slow", ()), path, deadline=0)
    results = Results(path)
    (row,) = results.rows
    assert (row["case"], row["outcome"], row["group"]) == ("a", "out of time", "slow")
    assert "lost" not in row  # a deadline says nothing against the function
    assert gpu.report(results) == 1
    assert "not run, out of time: 1" in capsys.readouterr().out


def test_time_up_before_the_first_case(tmp_path):
    path = tmp_path / "results.jsonl"
    Results(path, {"part": "test"})
    run_group(Group("late", (), options=(str(tmp_path),)), path, deadline=0)
    assert [row["outcome"] for row in Results(path).rows] == ["out of time"]


def test_a_run_that_is_ended_ends_its_cases(tmp_path):
    case, pid = tmp_path / "test_case.py", tmp_path / "pid"
    program = "import os, time\n\ndef test_it():\n"
    program += f"    open({str(pid)!r}, 'w').write(f'{{os.getpid()}}.')\n    time.sleep(1000)\n"
    case.write_text(program)
    command = [sys.executable, TOOL, "--part", "calibrate", "--dry-run", "--out", tmp_path, case]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: pid.exists() and pid.read_text().endswith("."), process)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text().rstrip(".")), 0)


def test_a_selection_without_cases_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "targets", lambda path: "")
    path = tmp_path / "results.jsonl"
    Results(path, {"part": "test"})
    run_group(Group("empty", (), options=(str(tmp_path),)), path, deadline=float("inf"))
    assert gpu.report(Results(path)) == 1


def test_rows_are_on_disk_at_once(tmp_path):
    path = tmp_path / "h200" / "results.jsonl"
    results = Results(path, {"part": "kernels"})
    results.plan(["a", "b"])
    results.begin("a", patience=60)
    assert Results(path).running == {"case": "a", "patience": 60}
    facts = {"us": 2.0, "tflops": 600.0}
    peer = {"us": 3.0, "tflops": 400.0}
    result = {"ours": facts, "peers": {"SDPA": peer, "FA3": {"error": "no"}}, "ceilings": {}}
    results.end("a", "passed", result=result)
    read = Results(path)
    assert read.rows == results.rows and read.not_run == ["b"] and read.running is None
    line = "passed   a: 2.0 us (600 TFLOP/s); best peer SDPA 3.0 us (400 TFLOP/s)"
    assert format_figures(results.rows) == line


def test_a_line_cut_short_costs_only_itself(tmp_path):
    path = tmp_path / "results.jsonl"
    Results(path, {"part": "test"}).end("a", "passed")
    with open(path, "a") as file:
        file.write('{"case": "b", "outc')
    Results(path).end("c", "passed")
    assert [row["case"] for row in Results(path).rows] == ["a", "c"]


def test_a_summary_counts_by_group_and_names_what_failed(tmp_path):
    results = Results(tmp_path / "results.jsonl", {})
    results.plan(["x/a.py::test_b[9]"])
    results.end("x/a.py::test_a", "passed", group="first")
    for number in range(2):
        error = f"a.py:3: in test_b\nE   assert {number} == 7\nE    +  where"
        results.end(f"x/a.py::test_b[{number}]", "failed", group="then", error=error)
    results.end("x/c.py::test_c", "skipped", group="then", error="no device")
    assert format_summary(results).splitlines() == [
        "What ran",
        "  first: 1 passed",
        "  then: 2 failed, 1 skipped",
        "  not run, out of time: 1",
        "",
        "What failed",
        "  a.py::test_b: 2 failed: assert 0 == 7",
    ]


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
