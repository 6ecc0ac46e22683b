"""The training loop: what a stage leaves behind, stopped, split or on several ranks."""

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
from aapt.runs.loop import STATES, Habits, TrainingError, drop_states, parts, train
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
    """So that the order of sums shows little after RMSProp has divided by what it sums up to."""
    return patch("aapt.training.stages.adversarial.mixed_precision", lambda device: nullcontext())


def trained(
    folder: Path, habits: Habits, parallel: Parallel | None = None
) -> dict[str, torch.Tensor]:
    """The whole weights of both networks after five updates."""
    parallel = parallel or Parallel.single()
    made = stage(parallel)
    with single_precision():
        train(made, sets(), folder, seed=3, parallel=parallel, habits=habits)
    states = [parallel.gather(part.module) for part in made.trained.values()]
    return {f"{i}.{key}": x for i, state in enumerate(states) for key, x in state.items()}


def of_a_rank(folder: Path, context: int) -> dict[str, np.ndarray]:
    state = trained(folder, Habits(save_every=2), Parallel.from_environment(context))
    return {key: tensor.numpy() for key, tensor in state.items()}


def moved_alike(expected: dict, actual: dict) -> bool:
    """Whether both are as far from the start, up to rounding: 5 % of the way."""
    parts = stage().trained.values()
    start = {f"{i}.{k}": x for i, p in enumerate(parts) for k, x in p.module.state_dict().items()}
    way = sum((expected[k] - x).square().sum() for k, x in start.items())
    off = sum((actual[k] - expected[k]).square().sum() for k in start)
    return bool(off < 0.05**2 * way)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "adversarial"
    return trained(folder, Habits(save_every=None)), folder


def killed_in(step: int, folder: Path) -> None:
    """Train, and die at the beginning of an update, as if the power had gone."""
    made = stage()
    accumulate = made.accumulate

    def die(sets, random, number, share):
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return accumulate(sets, random, number, share)

    made.accumulate = die
    with single_precision():
        habits = Habits(save_every=2)
        train(made, sets(), folder, seed=3, parallel=Parallel.single(), habits=habits)


def test_a_killed_run_goes_on_bit_for_bit(undisturbed, tmp_path):
    expected, whole = undisturbed
    folder = tmp_path / "adversarial"
    assert ranks.run(1, killed_in, 3, folder) == [signal.SIGKILL]
    actual = trained(folder, Habits(save_every=2))
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").open()] for f in (whole, folder)]
    for a, b in zip(*lines, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    drop_states(folder)
    assert not (folder / STATES).exists()


def test_what_does_not_fit_at_once_adds_up(undisturbed, tmp_path):
    """Two clips at a time instead of four: the same update."""
    habits = Habits(save_every=None, clips_at_once=2)
    assert moved_alike(undisturbed[0], trained(tmp_path / "adversarial", habits))


@pytest.mark.parametrize("context", [1, 2])
def test_two_ranks_train_as_one(undisturbed, tmp_path, context):
    """The whole stage, sharded: each rank with half of the clips, or half of every clip."""
    made, nothing = ranks.run(2, of_a_rank, tmp_path / "adversarial", context)
    assert not nothing  # the main rank has it all
    made = {key: torch.from_numpy(array) for key, array in made.items()}
    assert moved_alike(undisturbed[0], made)
    # And what they have left half way is a state that one rank goes on from.
    actual = trained(tmp_path / "adversarial", Habits())
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
            habits=Habits(),
        )
    kept = read_tensors(tmp_path / "adversarial" / "inputs-0-rank-0.safetensors")
    assert kept["0.latents"].shape[:3] == (4, 4, 3)
    line = json.loads((tmp_path / "adversarial" / "metrics.jsonl").read_text() or "{}")
    assert line == {}
