"""Every way a command can end: standard streams that are closed, full or left, and Ctrl-C."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import aapt
from aapt import __main__ as entry
from aapt.commands.app import main
from aapt.runs import run as runs
from aapt.runs.loop import TrainingError

from ...progress import children, wait_until
from .fake_generator import script

COMMAND = [sys.executable, "-m", "aapt"]
CLOSED = {"stdin": 0, "stdout": 1, "stderr": 2}


def closing(*names):
    """Return a function for `preexec_fn` that closes standard streams."""
    return lambda: [os.close(CLOSED[name]) for name in names]


def test_a_video_is_made_without_standard_streams(tmp_path):
    """The video's file would else get one of their numbers, and messages would follow."""
    process = script(
        *("generate", "--seconds", 0.2, "--out", tmp_path / "frames"),
        preexec_fn=closing("stdin", "stdout", "stderr"),
    )
    assert process.wait() == 0
    assert len(list((tmp_path / "frames").iterdir())) == 5


def test_raw_video_holds_no_text_without_standard_error():
    process = script(
        *("generate", "--seconds", 0.2, "--out", "-"),
        stdout=subprocess.PIPE,
        preexec_fn=closing("stderr"),
    )
    assert len(process.communicate()[0]) == 5 * 128 * 80 * 3 and process.returncode == 0


def test_raw_video_without_standard_output_is_refused():
    process = script("generate", "--out", "-", preexec_fn=closing("stdout"))
    said = process.communicate()[1].decode()
    assert process.returncode == 2
    assert said == "aapt: out: expected an open standard output for -, got a closed one\n"


def test_a_video_is_made_if_nobody_can_read_what_is_said(tmp_path):
    with open("/dev/full", "wb") as full:
        process = script("generate", "--seconds", 0.2, "--out", tmp_path / "frames", stderr=full)
        assert process.wait() == 0
    assert len(list((tmp_path / "frames").iterdir())) == 5


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_a_full_standard_output_is_said_in_one_line(arguments):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"aapt: standard output: No space left on device\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "paper-8b", "--plan"]])
def test_a_reader_of_results_that_leaves_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        done = subprocess.run([*COMMAND, *arguments], stdout=pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"aapt {aapt.__version__}\n"


def test_the_shell_completes_commands(tmp_path):
    environment = {**os.environ, "_AAPT_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    environment["COMP_WORDS"] = "aapt eval"
    done = subprocess.run(COMMAND, env=environment, stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout.split() == [b"eval", b"eval-vae"]


def test_threads_wait_without_spinning_unless_the_user_says_so(monkeypatch):
    for given, expected in ((None, ("PASSIVE", "3000")), ("ACTIVE", ("ACTIVE", None))):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        if given:
            monkeypatch.setenv("OMP_WAIT_POLICY", given)
        assert main(["--version"]) == 0
        assert tuple(map(os.environ.get, ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))) == expected


def test_warnings_are_one_line(monkeypatch, capsys):
    def warn(arguments):
        warnings.warn("one\n  and two", stacklevel=1)
        return 0

    monkeypatch.setattr("aapt.commands.app._run", warn)
    assert main([]) == 0
    assert capsys.readouterr().err == "aapt: one and two\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=["Python", "host", "device"],
)
def test_memory_that_ends_is_one_line(monkeypatch, tmp_path, capsys, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(runs, "run", full)
    assert main(["train", "tiny-world", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "aapt: out of memory; the same command resumes, and takes less with --clips-at-once 1 or "
        "--checkpoint-blocks\n"
    )
    monkeypatch.setattr("aapt.streaming.generator.StreamingGenerator.from_pretrained", full)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "aapt: out of memory\n"


def test_an_update_without_memory_says_what_takes_less(monkeypatch, tmp_path, capsys):
    def full(*_, **__):
        raise TrainingError("adversarial: step 3: no memory") from torch.OutOfMemoryError()

    monkeypatch.setattr(runs, "run", full)
    assert main(["train", "tiny-world", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("aapt: adversarial: step 3: no memory; the same command resumes, and ")
    assert "takes less with --clips-at-once 1" in said


def test_other_errors_of_pytorch_are_no_lack_of_memory(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr("aapt.streaming.generator.StreamingGenerator.from_pretrained", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["info"])


def test_ctrl_c_in_train_says_how_to_resume(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", interrupted)
    assert main(["train", "tiny-world", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "aapt: interrupted: the same command resumes\n"


@pytest.mark.parametrize(
    "command, place",
    [
        (["eval", "tiny-world", "--out", "out"], "aapt.evaluate.evaluate"),
        (["eval-vae", "tiny-world"], "aapt.evaluate.decoders.compare_decoders"),
        (["bench", "stream"], "aapt.streaming.generator.StreamingGenerator.from_pretrained"),
        (["info"], "aapt.streaming.generator.StreamingGenerator.from_pretrained"),
        (["plot", ".", "--out", "a.png"], "aapt.runs.curves.read_runs"),
        (["generate", "--out", "a.mp4"], "aapt.streaming.controls.load_controls"),
    ],
)
def test_ctrl_c_in_every_command_is_one_line(monkeypatch, tmp_path, capsys, command, place):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(place, interrupted)
    assert main(command) == 130
    assert capsys.readouterr().err == "aapt: interrupted\n"


def test_ctrl_c_while_modules_load_is_one_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("aapt.commands.app.main", interrupted)
    try:
        assert entry.main() == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "aapt: interrupted\n"


def test_ctrl_c_within_an_exec_keeps_the_code(tmp_path):
    """Dataclasses are made by `exec` while modules load; CPython remembers a Ctrl-C in one."""
    (tmp_path / "aapt_kernels.py").write_text('exec("raise KeyboardInterrupt")')
    (tmp_path / "aapt").symlink_to(Path(aapt.__file__).parent)
    done = subprocess.run([*COMMAND, "info"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "aapt: interrupted\n")


def test_ctrl_c_on_a_terminal_reaches_workers_without_a_word(tmp_path):
    """A terminal sends it to the whole group; workers that are starting must not print traces."""
    process = subprocess.Popen(
        [*COMMAND, "train", "tiny-world", "--out", str(tmp_path / "run"), "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    # Two workers, and Python's resource tracker
    wait_until(lambda: len(children(process.pid)) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[0].decode()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "aapt: interrupted: the same command resumes"
    assert "Traceback" not in said
