"""Training states are read as they were written, whatever happened in between."""

import errno
import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from aapt.checkpoint import CheckpointError
from aapt.data.randomness import ClipRandom
from aapt.runs.parallel import Parallel
from aapt.runs.state import load_training_state, save_training_state
from aapt.training.optimization import MovingAverage, MuonAdamW, Trained, frozen

from ..helpers import tiny_model
from . import ranks

ALONE = Parallel.single()
STEPS, STOP = 4, 2  # updates of a run, and after how many it is interrupted


class Pair:
    """Two networks that learn from each other, with every kind of state.

    There are Muon, AdamW and RMSProp, averages, and parameters that are frozen or get no gradient.
    """

    def __init__(self, parallel: Parallel = ALONE):
        self.parallel = parallel
        model = tiny_model(depth=1, width=16, heads=1).float()
        discriminator = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1), nn.Linear(2, 2))
        for index, parameter in enumerate(discriminator.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
        discriminator[0].bias.requires_grad_(False)
        parallel.shard(model)
        parallel.shard(discriminator)
        learning = [p for p in discriminator.parameters() if p.requires_grad]
        self.trained = {
            "generator": Trained(
                model, MuonAdamW(model, (0.9, 0.95), 0.01), MovingAverage(model, 0.5, True)
            ),
            "discriminator": Trained(discriminator, torch.optim.RMSprop(learning, alpha=0.9)),
        }

    def update(self, step: int) -> None:
        generator, discriminator = (part.module for part in self.trained.values())
        share = self.parallel.clips(4)
        random = ClipRandom(3, step, share)
        x, text = random.normal(4, 2, 4, 6), generator.text_encoder(["ab"] * len(share))
        condition = random.normal(generator.config.condition_channels, 2, 4, 6)
        fake = generator.transformer(x, x, condition, *text, random.uniform())
        (
            discriminator[:3](fake.detach().movedim(1, -1)) - discriminator[:3](x.movedim(1, -1))
        ).mean().backward()
        with frozen(discriminator):
            (discriminator[:3](fake.movedim(1, -1)).mean() + fake.square().mean()).backward()
        for part in self.trained.values():
            part.update(1e-2, max_norm=1.0)

    def numbers(self) -> dict[str, torch.Tensor]:
        """All tensors of the state of training, whole."""
        found = {}
        for name, part in self.trained.items():
            found |= {f"{name} {key}": p for key, p in part.module.named_parameters()}
            if part.average:
                found |= {f"{name} average {key}": p for key, p in part.average.shadow.items()}
                found[f"{name} averaged"] = torch.tensor(part.average.updates)
            optimizer = part.optimizer
            for each in getattr(optimizer, "optimizers", [optimizer]):
                for index, p in enumerate(each.param_groups[0]["params"]):
                    kind = type(each).__name__
                    state = each.state.get(p, {})
                    found |= {f"{name} {kind} {index} {key}": x for key, x in state.items()}
        whole = {k: x.full_tensor() if hasattr(x, "full_tensor") else x for k, x in found.items()}
        return {key: x.detach().clone() for key, x in whole.items()}


def same(ours: dict, theirs: dict) -> bool:
    """True if two states are equal bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def train(folder: Path, parallel: Parallel, steps: int, kill: int | None = None) -> dict:
    """Resume up to `steps` updates, saving each. Die before file operation `kill` of a save."""
    pair = Pair(parallel)
    done = load_training_state(folder, pair.trained, parallel)
    if kill is not None:
        kill_before(kill)
    for step in range(done, steps):
        pair.update(step)
        save_training_state(folder, step + 1, pair.trained, parallel)
    return {key: x.numpy() for key, x in pair.numbers().items()}


def kill_before(count: int) -> None:
    """End this process like kill -9, before its file operation number `count`."""
    left = [count]

    def counted(operation):
        def wrapper(*arguments, **options):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return operation(*arguments, **options)

        return wrapper

    for owner, name in (
        (os, "fsync"),
        (os, "rename"),
        (os, "mkdir"),
        (os, "unlink"),
        (os, "rmdir"),
        (shutil, "rmtree"),
        (Path, "open"),
        (Path, "rename"),
        (Path, "mkdir"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


@pytest.fixture(scope="module")
def history():
    """The state after every update of a run without interruption."""
    pair, numbers = Pair(), []
    for step in range(STEPS):
        numbers.append(pair.numbers())
        pair.update(step)
    return [*numbers, pair.numbers()]


@pytest.fixture
def saved(tmp_path):
    """A folder with the states after one and after two updates."""
    pair = Pair()
    for step in range(STOP):
        pair.update(step)
        save_training_state(tmp_path, step + 1, pair.trained, ALONE)
    return tmp_path


def test_a_resumed_run_is_the_same_run(saved, history):
    pair = Pair()
    assert not same(pair.numbers(), history[STOP])
    assert load_training_state(saved, pair.trained, ALONE) == STOP
    assert same(pair.numbers(), history[STOP])
    for step in range(STOP, STEPS):
        pair.update(step)
    assert same(pair.numbers(), history[STEPS])


def test_a_state_replaces_what_a_network_has_become(saved, history):
    """The state of an optimizer that has made steps is replaced too."""
    pair = Pair()
    for step in range(STEPS):
        pair.update(step)
    load_training_state(saved, pair.trained, ALONE)
    assert same(pair.numbers(), history[STOP])


def test_the_last_two_are_kept(saved):
    pair = Pair()
    for step in (7, 30):
        save_training_state(saved, step, pair.trained, ALONE)
    assert sorted(os.listdir(saved)) == ["step-00000007", "step-00000030"]
    assert load_training_state(saved, pair.trained, ALONE) == 30


def test_no_state_is_no_update(tmp_path):
    assert load_training_state(tmp_path / "none", Pair().trained, ALONE) == 0


def shards(state: Path) -> list[Path]:
    return sorted(state.glob("*.distcp"))


def truncate(state: Path) -> None:
    os.truncate(shards(state)[0], 1000)


def flip_a_bit(state: Path) -> None:
    data = bytearray(shards(state)[0].read_bytes())
    data[len(data) // 2] ^= 4
    shards(state)[0].write_bytes(data)


DAMAGE = {
    "a file is truncated": (truncate, "distcp: expected .* bytes with .*, got 1000 bytes"),
    "a bit is flipped": (flip_a_bit, "distcp: expected .* bytes with checksum"),
    "a file is gone": (lambda state: shards(state)[0].unlink(), "distcp: expected a file"),
    "no metadata": (lambda state: (state / ".metadata").unlink(), "metadata: expected a file"),
    "no manifest": (lambda state: (state / "manifest.json").unlink(), "manifest.json: expected"),
    "half a manifest": (
        lambda state: os.truncate(state / "manifest.json", 20),
        "manifest.json: expected sizes and checksums",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_skipped(saved, history, damage):
    break_, said = DAMAGE[damage]
    break_(saved / "step-00000002")
    pair = Pair()
    with pytest.warns(UserWarning, match=f"{said}.*; trying the state before"):
        assert load_training_state(saved, pair.trained, ALONE) == 1
    assert same(pair.numbers(), history[1])
    pair.update(1)
    save_training_state(saved, 2, pair.trained, ALONE)  # in place of the damaged one
    assert load_training_state(saved, pair.trained, ALONE) == 2
    assert sorted(os.listdir(saved)) == ["step-00000001", "step-00000002"]


def test_only_damaged_states_are_an_error(saved):
    for step in (1, 2):
        truncate(saved / f"step-0000000{step}")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="got damaged ones only"):
        load_training_state(saved, Pair().trained, ALONE)


def test_a_state_of_other_networks_is_refused(saved):
    pair = Pair()
    before = pair.numbers()
    generator = pair.trained["generator"]
    with pytest.raises(CheckpointError, match="generator.* belongs to none of discriminator"):
        load_training_state(saved, {"discriminator": pair.trained["discriminator"]}, ALONE)
    with pytest.raises(
        CheckpointError, match="expected tensor other.module.0.weight, which is missing"
    ):
        load_training_state(
            saved, {"generator": generator, "other": pair.trained["discriminator"]}, ALONE
        )
    other = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 1), nn.Linear(2, 2))
    wider = Trained(other, torch.optim.RMSprop(other.parameters()))
    with pytest.raises(CheckpointError, match=r"module.0.weight: expected \(8, 5\), got \(8, 4\)"):
        load_training_state(saved, {"generator": generator, "discriminator": wider}, ALONE)
    assert same(pair.numbers(), before)


def test_a_full_disk_keeps_what_there_is(saved, history, monkeypatch):
    pair = Pair()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_training_state(saved, 3, pair.trained, ALONE)
    monkeypatch.undo()
    assert load_training_state(saved, pair.trained, ALONE) == STOP
    assert same(pair.numbers(), history[STOP])
    save_training_state(saved, 3, pair.trained, ALONE)
    assert sorted(os.listdir(saved)) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_of_a_save(saved, history, tmp_path_factory, stride):
    """The newest state can be read between any two file operations, and is its update's.

    The resumed run ends as if nothing had happened.
    """
    for count in range(0, 100, stride):
        folder = tmp_path_factory.mktemp("killed") / "states"
        shutil.copytree(saved, folder)
        (ended,) = ranks.run(1, train_alone, folder, STOP + 1, count)
        pair = Pair()
        found = load_training_state(folder, pair.trained, ALONE)
        assert found in (STOP, STOP + 1) and same(pair.numbers(), history[found])
        if ended != signal.SIGKILL:
            break
        for step in range(found, STEPS):
            pair.update(step)
            save_training_state(folder, step + 1, pair.trained, ALONE)
        assert same(pair.numbers(), history[STEPS])
        assert sorted(os.listdir(folder)) == ["step-00000003", "step-00000004"]
    assert count > 10 and found == STOP + 1


def train_alone(folder: Path, steps: int, kill: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(folder, Parallel.single(), steps, kill)


def train_together(folder: Path, steps: int, kill: int | None = None, victim: int = 0) -> dict:
    parallel = Parallel.from_environment()
    return train(folder, parallel, steps, kill if parallel.rank == victim else None)


def test_killed_ranks_resume_bit_for_bit(tmp_path):
    """One of two ranks is killed in the middle of a save; then other numbers of ranks resume."""
    whole, _ = ranks.run(2, train_together, tmp_path / "whole", STEPS)
    folder = tmp_path / "killed"
    assert signal.SIGKILL in ranks.run(2, train_together, folder, STEPS, 6, 1)
    assert sorted(os.listdir(folder)) == ["step-00000001", "step-00000002.partial"]
    resumed, _ = ranks.run(2, train_together, folder, STEPS)
    assert resumed.keys() == whole.keys()
    assert all((resumed[key] == whole[key]).all() for key in whole)
    pair = Pair()
    assert load_training_state(tmp_path / "whole", pair.trained, ALONE) == STEPS
    assert all((value.numpy() == whole[key]).all() for key, value in pair.numbers().items())
    save_training_state(tmp_path / "whole", STEPS + 1, pair.trained, ALONE)
    for numbers in ranks.run(4, train_together, tmp_path / "whole", STEPS):
        assert all((numbers[key] == whole[key]).all() for key in whole)
