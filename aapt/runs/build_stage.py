"""Builds a stage, for a run from its networks and for a plan from networks without memory."""

from typing import Protocol

import torch
from torch import Tensor

from ..model.discriminator import Discriminator
from ..model.low_rank import LoRA, adapt
from ..model.world_model import WorldModel
from ..training.recipe import StageConfig
from ..training.stages import Stage
from ..training.stages.adversarial import Adversarial, AdversarialConfig
from ..training.stages.consistency_distillation import ConsistencyConfig, ConsistencyDistillation
from ..training.stages.diffusion_adaptation import DiffusionAdaptation, DiffusionConfig
from ..training.stages.distribution_matching import (
    DistributionMatching,
    DistributionMatchingConfig,
)
from ..training.stages.rollout_regression import RolloutRegression, RolloutRegressionConfig


class Networks(Protocol):
    """Makes the networks of one stage."""

    def network(
        self,
        config: StageConfig,
        start: str | None,
        lora: LoRA | None = None,
        rolls_out: bool = False,
    ) -> WorldModel:
        """Make a generator with the weights of the stage `start`, or of the run's start for None.

        Under `lora` it is adapted. rolls_out: it makes its own frames in training.
        """

    def discriminator(self, config: AdversarialConfig) -> Discriminator:
        """Make the discriminator that an adversarial stage starts from."""

    def pixel_deviation(self) -> Tensor:
        """Return the deviation of pixels per unit of a latent channel, (C,)."""


def restrict(discriminator: Discriminator, config: AdversarialConfig) -> None:
    """Leave the weights of a discriminator that its stage trains: all, its heads, or its heads and
    an adaptation of its trunk."""
    if config.frozen_trunk:
        discriminator.freeze_trunk()
    elif config.discriminator_lora:
        adapt(discriminator.world, config.discriminator_lora)


@torch.no_grad()
def mix(model: WorldModel, other: WorldModel, share: float) -> None:
    """Move the weights of a model by `share` of the way to those of another."""
    for parameter, target in zip(model.parameters(), other.parameters(), strict=True):
        parameter.lerp_(target, share)


def build_stage(config: StageConfig, networks: Networks) -> Stage:
    """Build a stage with new networks. A generator that rolls out keeps its parameters gathered
    (docs/method.md#11)."""
    match config:
        case DiffusionConfig():
            return DiffusionAdaptation(config, networks.network(config, config.start, config.lora))
        case ConsistencyConfig():
            model = networks.network(config, config.start, config.lora)
            return ConsistencyDistillation(config, model, networks.network(config, config.start))
        case RolloutRegressionConfig():
            model = networks.network(config, config.start, config.lora, rolls_out=True)
            return RolloutRegression(config, model, networks.pixel_deviation())
        case DistributionMatchingConfig():
            model = networks.network(config, config.start, config.lora, rolls_out=True)
            critic = networks.network(config, config.teacher, config.lora)
            return DistributionMatching(
                config, model, critic, networks.network(config, config.teacher)
            )
        case AdversarialConfig():
            student = config.forcing == "student"
            model = networks.network(config, config.start, config.lora, rolls_out=student)
            if config.mixed_with:
                other = networks.network(config, config.mixed_with, config.lora, rolls_out=student)
                mix(model, other, config.mixed_share)
            discriminator = networks.discriminator(config)
            return Adversarial(config, model, discriminator, networks.pixel_deviation())
