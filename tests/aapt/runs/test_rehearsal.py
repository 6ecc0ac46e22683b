"""Long runs, rehearsed: a recipe is ended again and again, and its results stay the same.

A timer ends a process after some processor time, wherever it is, in Python or in native code. An
audit hook ends it just before it renames a file that it has written. Either way no handler and no
`finally` runs, as after kill -9. The moments are drawn anew each time.
"""

import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch

from aapt.checkpoint import save_module, save_tensors
from aapt.runs.loop import RunOptions
from aapt.runs.parallel import Parallel
from aapt.runs.run import run
from aapt.vae import CausalVAE

from . import ranks
from .test_run import small_recipe

BRIEF = ["diffusion", "consistency"]
EACH_UPDATE = RunOptions(save_every=1, sample_every=None)


def prepare(out: Path) -> Path:
    """Write an autoencoder and sets of random clips, so that no attempt has to render them."""
    recipe, draw = small_recipe(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    save_module(out / "encoder" / "weights.safetensors", CausalVAE(recipe.vae))
    for name, data in recipe.data.items():
        frames = data.latent_frames
        tensors = {
            "latents": torch.randn(3, 16, frames, 6, 8, generator=draw).half(),
            "controls": torch.rand(3, frames - 1, 2, generator=draw) * 2 - 1,
            "themes": torch.arange(3),
        }
        save_tensors(out / name / "weights.safetensors", tensors)
    return out


def attempt(out: Path, stages: list[str], victim: int, moment: float | None, rename: int) -> float:
    """Train to the end, unless the rank `victim` ends before.

    moment: processor seconds after which it ends; None for never. rename: the number of the rename
    before which it ends; 0 for none. Returns the processor seconds of the call.
    """
    parallel = Parallel.single()
    if os.environ["WORLD_SIZE"] != "1":
        parallel = Parallel.from_environment()
    if parallel.rank == victim:
        end_before(rename)
        signal.setitimer(signal.ITIMER_PROF, moment or 0)
    begun = processor_seconds()
    given = {"parallel": parallel, "options": EACH_UPDATE, "report": lambda line: None}
    run(small_recipe(), out, stages, **given)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return processor_seconds() - begun


def end_before(rename: int) -> None:
    """End this process just before its n-th rename; never for 0."""
    seen = 0

    def watch(event: str, _) -> None:
        nonlocal seen
        if event == "os.rename":
            seen += 1
            if seen == rename:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rehearse(out: Path, stages: list[str], seconds: float, kills: int, world: int = 1) -> int:
    """Start a run that is ended `kills` times, then let it finish. Returns how often it ended.

    seconds: processor seconds of a run that nothing ends.
    """
    moments, ended = random.Random(kills), 0
    for number in range(kills):
        victim = moments.randrange(world)
        moment, rename = moments.uniform(0.02, 2 * seconds / kills), 0
        if number % 2:  # the first rank alone renames
            victim, moment, rename = 0, None, moments.randint(1, 4)
        found = ranks.run(world, attempt, out, stages, victim, moment, rename)
        ended += any(isinstance(result, signal.Signals) for result in found)
    ranks.run(world, attempt, out, stages, 0, None, 0)
    return ended


def results(out: Path) -> dict[str, bytes | list]:
    """The files of a finished run: networks byte for byte, and metrics without their times.

    A rank whose peer was killed keeps the inputs of the update that failed; they are left out.
    """
    found: dict[str, bytes | list] = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*.safetensors")
        if not path.name.startswith("inputs-")
    }
    for path in out.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.relative_to(out).as_posix()] = [
            {key: value for key, value in line.items() if key != "seconds"} for line in lines
        ]
    return found


def leftovers(out: Path) -> list[str]:
    """Names of files that only an unfinished run has."""
    parts = ("partial", "states", ".lock")
    return [path.name for path in out.rglob("*") if any(part in path.name for part in parts)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A brief run that nothing ended: its folder and its processor seconds."""
    out = prepare(tmp_path_factory.mktemp("unbroken"))
    return out, ranks.run(1, attempt, out, BRIEF, 0, None, 0)[0]


def test_a_run_that_is_killed_again_and_again(unbroken, tmp_path):
    whole, seconds = unbroken
    assert rehearse(prepare(tmp_path), BRIEF, seconds, kills=4) >= 2
    assert results(tmp_path) == results(whole)
    assert not leftovers(tmp_path)


def on_a_full_disk(out: Path, stages: list[str], limit: int) -> tuple[int, str]:
    """Train by the command while no file may grow beyond `limit` bytes.

    Returns the command's exit code and what it said.
    """
    from aapt.commands.app import main
    from aapt.training.recipes import RECIPES

    RECIPES["small"] = small_recipe
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    chosen = [word for stage in stages for word in ("--stage", stage)]
    options = ["--out", str(out), "--save-every", "1", "--sample-every", "0"]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(["train", "small", *chosen, *options])
    return code, said.getvalue()


def test_a_run_on_a_full_disk(unbroken, tmp_path):
    """Whatever file does not fit, the run says so in one line, and resumes once there is room."""
    whole, _ = unbroken
    prepare(tmp_path)
    for limit in (10, 3_000, 50_000, 200_000):
        ((code, said),) = ranks.run(1, on_a_full_disk, tmp_path, BRIEF, limit)
        *progress, last = said.splitlines()
        assert code == 1 and "File too large" in last, said
        assert all(line.startswith(("diffusion", "consistency", "encoder")) for line in progress)
    ranks.run(1, attempt, tmp_path, BRIEF, 0, None, 0)
    assert results(tmp_path) == results(whole)
    assert not leftovers(tmp_path)


@pytest.mark.slow
def test_twenty_kills_of_all_stages(tmp_path_factory):
    """Every kind of stage, with discriminators, averages and optimizers of their own."""
    whole, broken = (prepare(tmp_path_factory.mktemp(name)) for name in ("whole", "broken"))
    stages = list(small_recipe().stages)
    (seconds,) = ranks.run(1, attempt, whole, stages, 0, None, 0)
    assert rehearse(broken, stages, seconds, kills=20) >= 10
    assert results(broken) == results(whole)
    assert not leftovers(broken)


@pytest.mark.slow
def test_one_of_two_ranks_is_killed(tmp_path_factory):
    """The other rank ends too, and both resume."""
    whole, broken = (prepare(tmp_path_factory.mktemp(name)) for name in ("whole", "broken"))
    seconds = max(ranks.run(2, attempt, whole, BRIEF, 0, None, 0))
    assert rehearse(broken, BRIEF, seconds, kills=4, world=2) >= 2
    assert results(broken) == results(whole)
    assert not leftovers(broken)
