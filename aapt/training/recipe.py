"""The kinds of recipe: all numbers of a training run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..data.rendered import RenderedData
from ..data.tiny_world.rendered_clips import ProceduralData
from ..model.config import CameraConfig, ModelConfig
from ..vae import VAEConfig
from .stages.adversarial import AdversarialConfig
from .stages.consistency_distillation import ConsistencyConfig
from .stages.decoder import DecoderConfig
from .stages.diffusion_adaptation import DiffusionConfig
from .stages.distribution_matching import DistributionMatchingConfig
from .stages.light_decoder import LightDecoderConfig
from .stages.rollout_regression import RolloutRegressionConfig

StageConfig = (
    DiffusionConfig
    | ConsistencyConfig
    | RolloutRegressionConfig
    | DistributionMatchingConfig
    | AdversarialConfig
)
STARTS = ("start", "discriminator_start", "teacher")  # fields that name a stage before


def stages_before(config: StageConfig) -> dict[str, str | None]:
    """Return the stages that a stage takes weights from, by field; None for the run's start."""
    before = {field: getattr(config, field) for field in STARTS if hasattr(config, field)}
    mixed_with = getattr(config, "mixed_with", None)
    return before | ({"mixed_with": mixed_with} if mixed_with else {})


@dataclass(frozen=True)
class Recipe:
    """All numbers of a training run that makes a model.

    Attributes:
        camera: The camera that drives the model; None for a model without one.
        data: Sets of clips that the run renders, by name. Stages name the sets they learn from.
        stages: Stages by name, in order. Each names the stage whose weights it starts from.
        vae: Shape of the autoencoder; None if clips come encoded.
        autoencoder: The bundled model or the recipe whose autoencoder encodes the rendered clips;
            None if the run makes its own, or if clips come encoded.
        grown: The bundled model whose generator grows into the first weights, if any. Its tokens
            cover at least as many pixels of video (`WorldModel.load_grown`).
        decoder: Training of the decoder of an autoencoder that the run makes; None otherwise.
        light_decoder: Training of a cheaper decoder for it, with which the checkpoint streams; None
            for none.
        scaled_camera: Scale the camera's rays and pace to the encoded clips of the run.
        raw_starts: A stage starts from the last weights of the stage before, and the average is
            only exported; False to start from the average.
        new_channels: Columns of the patch embedding for input channels that the weights of the
            start do not have: "random" as a new layer's (docs/method.md#10), or "zero", with which
            the model computes at first what it computed without them.
        space_factor: Pixels per latent pixel of encoded clips.
        motion_asked: Factors of the turns and of the walks that the exported model is asked for.
            A small generator moves less than it is asked to (the gains of `aapt eval`).
    """

    name: str
    seed: int
    model: ModelConfig
    camera: CameraConfig | None
    stages: Mapping[str, StageConfig]
    data: Mapping[str, RenderedData]
    vae: VAEConfig | None = None
    decoder: DecoderConfig | None = None
    light_decoder: LightDecoderConfig | None = None
    scaled_camera: bool = False
    raw_starts: bool = False
    new_channels: Literal["random", "zero"] = "random"
    space_factor: int = 8
    autoencoder: str | None = None
    grown: str | None = None
    motion_asked: tuple[float, float] = (1.0, 1.0)

    @property
    def played_camera(self) -> CameraConfig | None:
        """The camera of the exported model."""
        return self.camera and self.camera.asking(*self.motion_asked)

    def __post_init__(self):
        if not all(0 < factor < math.inf for factor in self.motion_asked):
            raise ValueError(
                f"motion_asked: expected finite numbers above 0, got {self.motion_asked}"
            )
        for name, stage in self.stages.items():
            if self.model.block == "wan" and not getattr(stage, "discriminator_recycled", True):
                raise ValueError(
                    f"stages.{name}.discriminator_recycled: expected true for Wan's block, whose "
                    "input has no channels to leave empty, got false"
                )


@dataclass(frozen=True)
class LightRecipe:
    """All numbers of a training run that makes a light decoder for an existing autoencoder.

    Attributes:
        vae: Name of a bundled model with the autoencoder; None if the user gives an autoencoder and
            videos.
        data: Clips of the procedural world. Clips of videos have the same number and size.
    """

    name: str
    seed: int
    vae: str | None
    data: ProceduralData
    decoder: LightDecoderConfig


@dataclass(frozen=True)
class VAERecipe:
    """All numbers of a training run that makes an autoencoder with a linear encoder.

    Attributes:
        vae: Shape of the autoencoder.
        data: Clips of the procedural world.
        decoder: Training of the decoder, without `shape` and without imitation.
    """

    name: str
    seed: int
    vae: VAEConfig
    data: ProceduralData
    decoder: LightDecoderConfig
