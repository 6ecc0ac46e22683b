"""The training loop: results of a stage that is interrupted, split or on several ranks."""

import errno
import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from aapt.checkpoint import read_tensors
from aapt.lock import FolderInUse
from aapt.runs.loop import (
    STATES,
    RunOptions,
    TrainingError,
    claim,
    drop_states,
    locked,
    parts,
    train,
)
from aapt.runs.parallel import Parallel

from ..helpers import clips
from . import ranks
from .counting import adversarial_stage


def sets():
    torch.manual_seed(5)
    return {"clips": clips()}


def stage(parallel: Parallel | None = None):
    return adversarial_stage(
        batch=4,
        segments=2,
        overlap_frames=1,
        discriminator_warmup=1,
        place=parallel and parallel.shard,
    )


def single_precision():
    """Run in float32, because RMSProp amplifies differences in the order of sums."""
    return patch("aapt.training.stages.adversarial.mixed_precision", lambda device: nullcontext())


def trained(
    folder: Path, options: RunOptions, parallel: Parallel | None = None
) -> dict[str, torch.Tensor]:
    """The whole weights of both networks after five updates."""
    parallel = parallel or Parallel.single()
    made = stage(parallel)
    with single_precision():
        train(made, sets(), folder, seed=3, parallel=parallel, options=options)
    states = [parallel.gather(part.module) for part in made.trained.values()]
    return {f"{i}.{key}": x for i, state in enumerate(states) for key, x in state.items()}


def of_a_rank(folder: Path, context: int) -> dict[str, np.ndarray]:
    state = trained(folder, RunOptions(save_every=2), Parallel.from_environment(context))
    return {key: tensor.numpy() for key, tensor in state.items()}


def moved_alike(expected: dict, actual: dict) -> bool:
    """True if two networks differ by less than 5 % of their way from the start."""
    parts = stage().trained.values()
    start = {f"{i}.{k}": x for i, p in enumerate(parts) for k, x in p.module.state_dict().items()}
    way = sum((expected[k] - x).square().sum() for k, x in start.items())
    off = sum((actual[k] - expected[k]).square().sum() for k in start)
    return bool(off < 0.05**2 * way)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adversarial"
    return trained(folder, RunOptions(save_every=None)), folder


def killed_in(step: int, folder: Path) -> None:
    """Train, and die at the beginning of an update, as in a power cut."""
    made = stage()
    accumulate = made.accumulate

    def die(sets, random, number, share):
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return accumulate(sets, random, number, share)

    made.accumulate = die
    with single_precision():
        options = RunOptions(save_every=2)
        train(made, sets(), folder, seed=3, parallel=Parallel.single(), options=options)


def test_a_killed_run_resumes_bit_for_bit(undisturbed, tmp_path):
    expected, whole = undisturbed
    folder = tmp_path / "adversarial"
    assert ranks.run(1, killed_in, 3, folder) == [signal.SIGKILL]
    actual = trained(folder, RunOptions(save_every=2))
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").open()] for f in (whole, folder)]
    for a, b in zip(*lines, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    drop_states(folder)
    assert not (folder / STATES).exists()


def test_passes_of_fewer_clips_add_up(undisturbed, tmp_path):
    """Two passes of two clips make the update of four clips."""
    options = RunOptions(save_every=None, clips_at_once=2)
    assert moved_alike(undisturbed[0], trained(tmp_path / "adversarial", options))


@pytest.mark.parametrize("context", [1, 2])
def test_two_ranks_train_as_one(undisturbed, tmp_path, context):
    """Each rank has half of the clips, or half of every clip."""
    made, nothing = ranks.run(2, of_a_rank, tmp_path / "adversarial", context)
    assert not nothing  # the main rank has it all
    made = {key: torch.from_numpy(array) for key, array in made.items()}
    assert moved_alike(undisturbed[0], made)
    # One rank resumes from their last state.
    actual = trained(tmp_path / "adversarial", RunOptions())
    assert moved_alike(undisturbed[0], actual)


def test_shares_of_a_batch():
    ways = parts(stage(), 0, 0, Parallel.single(), 3)
    assert [(len(random), share) for random, share in ways] == [(3, 0.75), (1, 0.25)]
    assert [(len(r), share) for r, share in parts(stage(), 0, 0, Parallel.single(), None)] == [
        (4, 1.0)
    ]


def test_a_metric_that_is_not_finite_stops_the_run(tmp_path):
    made = stage()
    made.accumulate = lambda sets, random, step, share: (
        sets["clips"].sample(random, 2),
        {"loss": float("nan")},
    )[1]
    made.update = lambda step: {}
    with pytest.raises(TrainingError, match="adversarial: step 0: not finite; its inputs are in"):
        train(
            made,
            sets(),
            tmp_path / "adversarial",
            seed=3,
            parallel=Parallel.single(),
            options=RunOptions(),
        )
    kept = read_tensors(tmp_path / "adversarial" / "inputs-0-rank-0.safetensors")
    assert kept["0.latents"].shape[:3] == (4, 4, 3)
    line = json.loads((tmp_path / "adversarial" / "metrics.jsonl").read_text() or "{}")
    assert line == {}


class Stopped(Exception):
    """Not an error of training."""


@pytest.mark.parametrize("end", [Stopped, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("part", ["accumulate", "update"])
def test_an_update_that_is_interrupted_leaves_the_run_resumable(undisturbed, tmp_path, end, part):
    """An update fails between gradients and step, or between the steps of the two networks.

    The same stage object resumes: gradients of the interrupted update do not count.
    """
    made, folder = stage(), tmp_path / "adversarial"
    owner, name = (
        (made, "accumulate") if part == "accumulate" else (made.trained["generator"], part)
    )
    method, calls = getattr(owner, name), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == (4 if part == "accumulate" else 3):  # in update 3, of 0 to 4
            if part == "accumulate":
                method(*arguments)
            raise end
        return method(*arguments)

    setattr(owner, part, interrupted)
    given = {"seed": 3, "parallel": Parallel.single(), "options": RunOptions(save_every=2)}
    with single_precision(), pytest.raises(end):
        train(made, sets(), folder, **given)
    with single_precision():
        train(made, sets(), folder, **given)
    for index, network in enumerate(made.trained.values()):
        for key, tensor in network.module.state_dict().items():
            assert torch.equal(tensor, undisturbed[0][f"{index}.{key}"]), key


def test_a_full_disk_does_not_hide_why_an_update_failed(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(*arguments):
        raise RuntimeError("out of memory")

    made = stage()
    made.accumulate = broken
    monkeypatch.setattr("aapt.runs.loop.save_inputs", full)
    given = {"seed": 3, "parallel": Parallel.single(), "options": RunOptions()}
    message = "adversarial: step 0: out of memory; its inputs could not be kept: .*No space left"
    with pytest.raises(TrainingError, match=message):
        train(made, sets(), tmp_path / "adversarial", **given)


def test_samples_that_fail_can_be_left_out(undisturbed, tmp_path):
    """The error says how; the updates before them are not lost."""

    def broken(done):
        raise RuntimeError("out of memory")

    folder = tmp_path / "adversarial"
    given = {"seed": 3, "parallel": Parallel.single(), "sample": broken}
    message = "samples after 4 updates: out of memory; resume with --sample-every 0"
    with single_precision(), pytest.raises(TrainingError, match=message):
        train(stage(), sets(), folder, options=RunOptions(save_every=2, sample_every=4), **given)
    actual = trained(folder, RunOptions(sample_every=None))
    assert all(torch.equal(actual[name], tensor) for name, tensor in undisturbed[0].items())


def refused_on_ranks(folder: Path) -> list[str]:
    """Errors of two runs of these ranks, one within the other."""
    parallel, errors = Parallel.from_environment(), []
    with locked(folder, parallel):
        try:
            with locked(folder, parallel):
                pass
        except FolderInUse as error:
            errors.append(str(error))
    with locked(folder, parallel):
        return errors


def test_a_locked_folder_is_refused_on_every_rank(tmp_path):
    for errors in ranks.run(2, refused_on_ranks, tmp_path / "run"):
        assert len(errors) == 1 and "expected a folder in use by no other run" in errors[0]
    assert not list((tmp_path / "run").iterdir())


def test_a_recipe_of_an_older_version_is_compared_by_its_new_names(tmp_path):
    """`judge` was the name of `discriminator_start`."""
    stages = {"adversarial": {"judge": "diffusion", "judge_recycled": True}}
    (tmp_path / "recipe.json").write_text(json.dumps({"stages": stages}))

    def recipe(start):
        names = {"discriminator_start": start, "discriminator_recycled": True}
        return {"stages": {"adversarial": names}}

    assert claim(tmp_path, recipe("diffusion")) is None
    difference = claim(tmp_path, recipe("consistency"))
    assert difference.endswith(
        "recipe.json: stages.adversarial.discriminator_start: expected consistency, got diffusion"
    )
