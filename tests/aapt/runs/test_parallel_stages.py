"""Stages on several ranks have the metrics, gradients and norms of one rank."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from aapt.data.clips import LatentClips
from aapt.data.randomness import ClipRandom
from aapt.model.discriminator import Discriminator
from aapt.model.low_rank import LoRA, adapt
from aapt.runs.parallel import Parallel
from aapt.training.curriculum import constant
from aapt.training.optimization import Schedule
from aapt.training.stages import (
    adversarial,
    consistency_distillation,
    diffusion_adaptation,
    distribution_matching,
    rollout_regression,
)

from ..helpers import CONFIG, SIZE, tiny_model
from . import ranks

BATCH = 4
RATE = Schedule(1e-3)
BRIEF = constant("clips", frames=4, batch=BATCH, steps=2)
STUDENT = {"clips": "clips", "steps": 2, "batch": BATCH, "segment_frames": 3, "segments": 2}
RIVALS = {"generator_schedule": RATE, "discriminator_schedule": RATE, "penalty": 10.0}

LORA = LoRA(3, alpha=6.0)


def model(seed: int):
    net = tiny_model(residual_head=True, output_clamp=4.0).float()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.01 * seed)
    return net


def generator(parallel: Parallel, lora: LoRA | None = None, offload: bool = False):
    """A generator that rolls out, sharded before its stage is built."""
    net = model(0)
    if lora:
        adapt(net, lora)
    parallel.shard(net, keep_gathered=True, offload=offload)
    return net


def plain(parallel: Parallel):
    net = model(0)
    parallel.shard(net)
    return net


def adversary(config: dict, parallel: Parallel) -> adversarial.Adversarial:
    config = adversarial.AdversarialConfig(**{**STUDENT, **RIVALS, **config})
    discriminator = Discriminator(model(1), config.judgement)
    if config.frozen_trunk:
        discriminator.freeze_trunk()
    if config.discriminator_lora:
        adapt(discriminator.world, config.discriminator_lora)
    parallel.shard(discriminator, offload=config.offload)
    networks = generator(parallel, config.lora, config.offload), discriminator
    return adversarial.Adversarial(config, *networks, torch.ones(4))


def matching(parallel: Parallel, lora: LoRA | None = None):
    """A stage in which both networks learn from the second update."""
    config = distribution_matching.DistributionMatchingConfig(
        "clips",
        steps=1,
        batch=BATCH,
        segment_frames=3,
        generator_schedule=RATE,
        critic_schedule=RATE,
        critic_updates=2,
        lora=lora,
    )
    critic, teacher = model(1), model(2)
    if lora:
        adapt(critic, lora)
    for network in (critic, teacher):
        parallel.shard(network)
    networks = generator(parallel, lora), critic, teacher
    return distribution_matching.DistributionMatching(config, *networks)


STAGES = {
    "diffusion": lambda parallel: diffusion_adaptation.DiffusionAdaptation(
        diffusion_adaptation.DiffusionConfig(BRIEF, RATE), plain(parallel)
    ),
    "consistency": lambda parallel: consistency_distillation.ConsistencyDistillation(
        consistency_distillation.ConsistencyConfig(BRIEF, RATE),
        plain(parallel),
        plain(parallel),
    ),
    "regression": lambda parallel: rollout_regression.RolloutRegression(
        rollout_regression.RolloutRegressionConfig(**STUDENT, schedule=RATE),
        generator(parallel),
        torch.ones(4),
    ),
    "matching": lambda parallel: matching(parallel),
    "matching adapted": lambda parallel: matching(parallel, LORA),
    "adversarial": lambda parallel: adversary({"overlap_frames": 1}, parallel),
    "adapted": lambda parallel: adversary(
        {"overlap_frames": 1, "lora": LORA, "discriminator_lora": LORA}, parallel
    ),
    "offloaded": lambda parallel: adversary(
        {"overlap_frames": 1, "lora": LORA, "state_bits": 8, "offload": True}, parallel
    ),
    "frozen": lambda parallel: adversary({"overlap_frames": 1, "frozen_trunk": True}, parallel),
    "teacher-forced": lambda parallel: adversary({"segments": 1, "forcing": "teacher"}, parallel),
}


def clips() -> LatentClips:
    random = torch.Generator().manual_seed(5)
    return LatentClips(
        torch.randn(6, CONFIG.latent_channels, 9, *SIZE, generator=random),
        torch.rand(6, 8, 2, generator=random) * 2 - 1,
        [("ab", "abc")] * 6,
    )


def updates(contexts: list[int], half: bool = False) -> dict[str, dict[str, Tensor]]:
    """Make the second update of every stage, in half precision only if `half`: it hides errors."""
    for module in (
        ()
        if half
        else (
            adversarial,
            consistency_distillation,
            diffusion_adaptation,
            distribution_matching,
            rollout_regression,
        )
    ):
        module.mixed_precision = lambda device: nullcontext()
    results = {}
    for context in contexts:
        parallel = Parallel.from_environment(context)
        for name, make in STAGES.items():
            torch.manual_seed(0)  # of the logit heads
            stage = make(parallel)
            mine = ClipRandom(0, 1, parallel.clips(BATCH))
            metrics = parallel.mean(stage.accumulate({"clips": clips()}, mine, 1))
            result = {}
            for network, part in stage.trained.items():
                for key, p in part.module.named_parameters():
                    if p.grad is not None:
                        grad = p.grad
                        whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                        result[f"{network} {key}"] = whole.clone()
            metrics |= stage.update(1)
            result |= {key: torch.tensor(value) for key, value in metrics.items()}
            results[f"{name}, context {context}"] = {k: x.numpy() for k, x in result.items()}
    return results


@pytest.fixture(scope="module")
def alone():
    (results,) = ranks.run(1, updates, [1])
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_stages_on_many_ranks_equal_one(world, alone):
    for rank, results in enumerate(ranks.run(world, updates, [world // 2])):
        for name, result in results.items():
            expected = alone[f"{name.split(',')[0]}, context 1"]
            for key, value in result.items():
                message = f"{world} ranks, rank {rank}, {name}: {key}: "
                torch.testing.assert_close(
                    torch.from_numpy(value),
                    torch.from_numpy(expected[key]),
                    rtol=1e-3,
                    atol=1e-5,
                    msg=lambda text, m=message: m + text,
                )
            assert set(expected) - set(result) == set()


def test_half_precision_loses_no_gradient():
    """Weights that are cast without gradient first must still have gradients reduced later."""
    (expected,) = ranks.run(1, updates, [1], True)
    results, _ = ranks.run(2, updates, [1], True)
    for name, result in results.items():
        norms = [key for key in result if key.endswith("gradient")]
        assert norms
        for key in norms:
            assert result[key] == pytest.approx(expected[name][key], rel=0.05), (name, key)
