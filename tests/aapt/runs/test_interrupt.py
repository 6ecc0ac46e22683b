"""Ctrl-C ends `aapt train` in one line, and none of its processes stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from aapt.checkpoint import save_module, save_tensors
from aapt.vae import CausalVAE

from ...progress import Progress, children, finish, wait_until
from .test_run import small_recipe

ROOT = Path(__file__).parents[3]
COMMAND = """
import signal
import sys
from dataclasses import replace
from aapt.commands.app import main
from aapt.training.curriculum import constant
from aapt.training.recipes import RECIPES
from tests.aapt.runs.test_run import small_recipe

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of the background
recipe = small_recipe()
long = constant("clips", frames=4, batch=2, steps=10_000)
diffusion = replace(recipe.stages["diffusion"], curriculum=long)
data = {"clips": replace(recipe.data["clips"], clips=10_000)}
RECIPES["small"] = lambda: replace(recipe, data=data, stages={"diffusion": diffusion})
sys.exit(main(["train", "small", *sys.argv[1:]]))
"""


def start(out: Path, *arguments) -> subprocess.Popen:
    """The command in a group of processes of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "--out", str(out), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt(process: subprocess.Popen) -> list[str]:
    """Send Ctrl-C to the group, as a terminal does. Returns the lines on standard error."""
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    out, said = finish(process)
    assert process.returncode == 130 and out == "" and "Traceback" not in said
    progress = Progress(*workers)
    while any(map(alive, workers)):
        progress.check()
        time.sleep(0.05)
    return said.splitlines()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_while_render_workers_start(tmp_path):
    """Workers that are still importing modules end without a traceback."""
    process = start(tmp_path)
    wait_until(lambda: len(children(process.pid)) > 2, process)  # with the resource tracker
    *progress, last = interrupt(process)
    assert last == "aapt: interrupted: the same command resumes"
    assert all(line.startswith("encoder: ") for line in progress)


def test_between_updates(tmp_path):
    """A run that has its clips already, and so needs no workers."""
    recipe = small_recipe()
    save_module(tmp_path / "encoder" / "weights.safetensors", CausalVAE(recipe.vae))
    tensors = {
        "latents": torch.randn(3, 16, 6, 6, 8).half(),
        "controls": torch.zeros(3, 5, 2),
        "themes": torch.zeros(3, dtype=torch.long),
    }
    save_tensors(tmp_path / "clips" / "weights.safetensors", tensors)
    process = start(tmp_path, "--stage", "diffusion", "--save-every", "2")
    states = tmp_path / "diffusion" / "states"
    wait_until(lambda: (states / "step-00000004").is_dir(), process)
    *progress, last = interrupt(process)
    assert last == "aapt: interrupted: the same command resumes"
    assert all(line.startswith("diffusion ") for line in progress)
    lines = (tmp_path / "diffusion" / "metrics.jsonl").read_text().splitlines()
    resumed = start(tmp_path, "--stage", "diffusion", "--save-every", "2")
    wait_until(lambda: (states / f"step-{len(lines) // 2 * 2 + 4:08d}").is_dir(), resumed)
    interrupt(resumed)
