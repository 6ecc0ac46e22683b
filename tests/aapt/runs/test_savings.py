"""Stages that save memory: what learns, and how they resume on one rank and on two.

Distribution matching resumes between two turns of its generator.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from aapt.model.discriminator import Discriminator
from aapt.model.low_rank import LoRA, LowRankLinear, adapt, merged
from aapt.runs.loop import RunOptions, train
from aapt.runs.parallel import Parallel
from aapt.runs.state import load_training_state, save_training_state
from aapt.training.optimization import (
    MovingAverage,
    Schedule,
    Trained,
    adamw,
    learning,
    rmsprop,
)
from aapt.training.stages import Stage
from aapt.training.stages.adversarial import Adversarial, AdversarialConfig
from aapt.training.stages.distribution_matching import (
    DistributionMatching,
    DistributionMatchingConfig,
)

from ..helpers import draws
from . import ranks
from .counting import diffusion_weights, model
from .test_loop import sets, single_precision

STEPS = 4
KINDS = {
    "adapted": {"lora": LoRA(2, alpha=4.0), "discriminator_lora": LoRA(3), "state_bits": 8},
    "heads": {"frozen_trunk": True},
}


def stage(kind: str) -> Adversarial:
    """A small stage, as a run builds it."""
    rate = {name: Schedule(1e-2) for name in ("generator_schedule", "discriminator_schedule")}
    brief = {"steps": STEPS, "batch": 2, "segment_frames": 3}
    config = AdversarialConfig("clips", **brief, **rate, **KINDS[kind])
    torch.manual_seed(0)
    generator, discriminator = model(), Discriminator(diffusion_weights())
    if config.lora:
        adapt(generator, config.lora)
    if config.frozen_trunk:
        discriminator.freeze_trunk()
    elif config.discriminator_lora:
        adapt(discriminator.world, config.discriminator_lora)
    return Adversarial(config, generator, discriminator, torch.ones(4))


def matching() -> DistributionMatching:
    """A small stage of four updates, in which the generator learns from the second and fourth."""
    rate = {name: Schedule(1e-2) for name in ("generator_schedule", "critic_schedule")}
    brief = {"steps": STEPS // 2, "critic_updates": 2, "batch": 2, "segment_frames": 3}
    config = DistributionMatchingConfig("clips", **brief, **rate, lora=LoRA(2), state_bits=8)
    torch.manual_seed(0)
    generator, critic = model(), diffusion_weights()
    for network in (generator, critic):
        adapt(network, config.lora)
    return DistributionMatching(config, generator, critic, diffusion_weights())


BUILT = {**{kind: partial(stage, kind) for kind in KINDS}, "matching": matching}


def weights(made: Stage) -> dict[str, torch.Tensor]:
    """The weights of both networks, with adaptations merged."""
    modules = [part.module for part in made.trained.values()]
    states = [merged(module, module.state_dict()) for module in modules]
    return {f"{i}.{key}": x.clone() for i, state in enumerate(states) for key, x in state.items()}


def trained(kind: str, folder: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
    """Weights after training, which ends with an exception in update `stop`."""
    made = BUILT[kind]()
    accumulate = made.accumulate

    def stopping(sets, random, step, share):
        if step == stop:
            raise KeyboardInterrupt
        return accumulate(sets, random, step, share)

    made.accumulate = stopping
    options = RunOptions(save_every=2)
    with single_precision():
        train(made, sets(), folder, seed=3, parallel=Parallel.single(), options=options)
    return weights(made)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of every kind after a run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return {kind: trained(kind, folder / kind / "run") for kind in BUILT}


@pytest.mark.parametrize("kind", BUILT)
def test_a_stopped_run_resumes_bit_for_bit(kind, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(kind, tmp_path / "run", stop=3)
    again = trained(kind, tmp_path / "run")
    assert all(torch.equal(again[name], x) for name, x in whole[kind].items())


class Coded:
    """An adapted layer with moments in 8 bits, whose gradient is that of every rank."""

    def __init__(self, parallel: Parallel, kind: Callable, offload: bool = False):
        torch.manual_seed(0)
        net = nn.Sequential(LowRankLinear(nn.Linear(300, 5), LoRA(3)), nn.Linear(5, 7))
        parallel.shard(net, offload=offload)
        self.trained = {"net": Trained(net, kind(learning(net)), MovingAverage(net, 0.5))}
        self.parallel = parallel

    def run(self, folder: Path, steps: int) -> dict[str, np.ndarray]:
        """Resume up to `steps` updates, and save. Returns the whole numbers of the state."""
        part = self.trained["net"]
        for step in range(load_training_state(folder, self.trained, self.parallel), steps):
            random = torch.Generator().manual_seed(step)
            part.module(torch.randn(4, 300, generator=random)).square().sum().backward()
            part.update(1e-2, max_norm=None)
        save_training_state(folder, steps, self.trained, self.parallel)
        found = dict(part.module.named_parameters())
        found |= {f"average {name}": x for name, x in part.average.shadow.items()}
        for index, p in enumerate(part.parameters):
            found |= {f"{index} {key}": x for key, x in part.optimizer.state[p].items()}
        whole = {k: x.full_tensor() if hasattr(x, "full_tensor") else x for k, x in found.items()}
        return {key: x.detach().numpy().copy() for key, x in whole.items()}


OPTIMIZERS = {
    "adamw": partial(adamw, betas=(0.9, 0.95), weight_decay=0.1, state_bits=8),
    "plain": partial(adamw, betas=(0.9, 0.95), weight_decay=0.1),
    "rmsprop": partial(rmsprop, alpha=0.9, state_bits=8),
}


def of_two(
    kind: str, folder: Path, offload: bool = False, steps: tuple[int, ...] = (3,)
) -> dict[str, np.ndarray]:
    """Train up to each number of steps, from the state on the disk every time."""
    parallel = Parallel.from_environment()
    return [Coded(parallel, OPTIMIZERS[kind], offload).run(folder, count) for count in steps][-1]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_two_ranks_have_the_codes_of_one(kind, tmp_path):
    """Shards of rows, one of them without rows, are coded as the whole. One rank resumes."""
    alone = Parallel.single()
    made = ranks.run(2, of_two, kind, tmp_path / "two")
    expected = Coded(alone, OPTIMIZERS[kind]).run(tmp_path / "one", 3)
    for numbers in made:
        assert numbers.keys() == expected.keys()
        assert all(np.array_equal(numbers[name], x) for name, x in expected.items())
    resumed = Coded(alone, OPTIMIZERS[kind]).run(tmp_path / "two", 5)
    longer = Coded(alone, OPTIMIZERS[kind]).run(tmp_path / "one", 5)
    assert all(np.array_equal(resumed[name], x) for name, x in longer.items())
    assert not all(np.array_equal(longer[name], x) for name, x in expected.items())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_offloaded_run_resumes_bit_for_bit(kind, tmp_path):
    """Its states are those of a run that is not offloaded, too, and can be read by one."""
    at_once = ranks.run(2, of_two, kind, tmp_path / "plain", False, (5,))
    made = ranks.run(2, of_two, kind, tmp_path / "run", True, (3, 5))
    for ours, theirs in zip(made, at_once, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], x) for name, x in theirs.items())
    (tmp_path / "alone").mkdir()
    shutil.copytree(tmp_path / "run" / "step-00000003", tmp_path / "alone" / "step-00000003")
    resumed = Coded(Parallel.single(), OPTIMIZERS[kind]).run(tmp_path / "alone", 5)
    assert all(np.array_equal(resumed[name], x) for name, x in made[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_does_not_move(kind, whole):
    begun, config = weights(stage(kind)), KINDS[kind]
    moved = {name for name, x in begun.items() if not torch.equal(whole[kind][name], x)}
    trunk = {name for name in moved if name.startswith("1.world")}
    assert {name.split(".")[1] for name in moved if name.startswith("1.")} >= {"heads", "logit"}
    assert bool(trunk) == ("frozen_trunk" not in config)
    if config.get("discriminator_lora"):
        assert trunk <= adapted_names("1.world.transformer", depth=3)
    generator = {name for name in moved if name.startswith("0.")}
    assert generator
    if config.get("lora"):
        assert generator <= adapted_names("0.transformer", depth=3)


def adapted_names(transformer: str, depth: int) -> set[str]:
    """Weights that LoRA may change, with those of the layer of inputs."""
    layers = ("qkv", "out", "mlp_up", "mlp_down")
    blocks = itertools.product(range(depth), ("video", "text"), layers)
    names = {f"{transformer}.blocks.{i}.{stream}.{x}.weight" for i, stream, x in blocks}
    return names | {f"{transformer}.video_in.{name}" for name in ("weight", "bias")}


def test_a_frozen_trunk_keeps_no_activations_for_the_discriminator():
    """The generator still gets its gradient through the trunk."""
    kept = {}
    for kind in KINDS:
        made, sizes = stage(kind), []
        real = made.train_discriminator

        def counting(*arguments, real=real, sizes=sizes):
            def pack(x):
                sizes.append(x.nbytes)
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                return real(*arguments)

        made.train_discriminator = counting
        with single_precision():
            metrics = made.accumulate(sets(), draws(2), 0) | made.update(0)
        assert metrics["generator_gradient"] > 0 and metrics["discriminator_gradient"] > 0
        kept[kind] = sum(sizes)
    assert kept["heads"] < 0.25 * kept["adapted"]


def test_a_frozen_trunk_and_its_adaptation_exclude_each_other():
    config = stage("heads").config
    with pytest.raises(ValueError, match="discriminator_lora: expected None with frozen_trunk"):
        dataclasses.replace(config, discriminator_lora=LoRA(2))
