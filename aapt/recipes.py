"""Complete named configurations, as functions."""

from dataclasses import dataclass, replace

from .config import CameraConfig, ModelConfig
from .data.procedural import ProceduralData
from .data.world import FIELD_OF_VIEW, FORWARD_STEP, YAW_STEP
from .optimization import Schedule
from .stages.adversarial import AdversarialConfig
from .stages.consistency_distillation import ConsistencyConfig
from .stages.decoder import DecoderConfig
from .stages.diffusion_adaptation import DiffusionConfig
from .stages.rollout_regression import Corruption, RolloutRegressionConfig
from .vae import VAEConfig, tiny


@dataclass(frozen=True)
class Recipe:
    """Everything `aapt train` needs to make a model from nothing."""

    name: str
    seed: int
    model: ModelConfig
    camera: CameraConfig
    vae: VAEConfig
    data: ProceduralData
    long_data: ProceduralData  # for the adversarial stage
    decoder: DecoderConfig
    diffusion: DiffusionConfig
    consistency: ConsistencyConfig
    regression: RolloutRegressionConfig
    adversarial: AdversarialConfig
    extension: AdversarialConfig


def aapt_8b() -> ModelConfig:
    """The paper's generator (SPEC 2): 736x416, N = 30."""
    return ModelConfig(
        width=3072,
        heads=24,
        head_dim=128,
        depth=36,
        text_width=4096,
        text_tokens=512,
        window_frames=30,
        reference_grid=(26, 46),
        rope_axes=(16, 56, 56),
    )


def tiny_world() -> Recipe:
    """The bundled model: 128x80, made on two CPU cores in about two hours."""
    camera = CameraConfig(
        field_of_view=FIELD_OF_VIEW,
        yaw_step=YAW_STEP,
        forward_step=FORWARD_STEP,
        origin_deviation=0.021,
        direction_deviation=0.014,
    )
    model = ModelConfig(
        width=192,
        heads=3,
        head_dim=64,
        depth=6,
        text_width=64,
        text_tokens=25,
        window_frames=8,
        reference_grid=(5, 8),
        rope_axes=(24, 20, 20),
        rope_theta=100.0,
        condition_channels=camera.channels,
        sink_distance="clamped",
        residual_head=True,
        output_clamp=8.0,
    )
    adversarial = AdversarialConfig(
        generator_schedule=Schedule(5e-5, steps=140, warmup=20),
        discriminator_schedule=Schedule(2e-4, steps=200),
        batch=2,
        segment_frames=8,
        segments=4,
        penalty=20.0,
        discriminator_warmup=60,
        average=0.98,
        max_norm=100.0,
        corruption=Corruption(),
        regression=1.0,
    )
    return Recipe(
        name="tiny-world",
        seed=0,
        model=model,
        camera=camera,
        vae=tiny(),
        data=ProceduralData(height=80, width=128, clips=3000, latent_frames=17, video_clips=300),
        long_data=ProceduralData(
            height=80, width=128, clips=1200, latent_frames=33, first_seed=200_000
        ),
        decoder=DecoderConfig(
            schedule=Schedule(1e-3, steps=1400, warmup=50, decay="cosine"),
            batch=2,
            video_frames=25,
        ),
        diffusion=DiffusionConfig(
            schedule=Schedule(1.5e-3, steps=3000, warmup=100, decay="cosine"),
            batch=8,
            frames=10,
            shift=6.0,
            betas=(0.9, 0.95),
            muon=True,
            average=0.999,
            max_norm=1.0,
        ),
        consistency=ConsistencyConfig(
            schedule=Schedule(2e-4, steps=60, warmup=15, decay="cosine"),
            batch=8,
            frames=10,
            shift=6.0,
            betas=(0.9, 0.95),
            max_norm=1.0,
        ),
        regression=RolloutRegressionConfig(
            schedule=Schedule(5e-4, steps=500, warmup=30, decay="cosine"),
            batch=4,
            segment_frames=8,
            segments=2,
            muon=True,
        ),
        adversarial=adversarial,
        extension=replace(
            adversarial,
            generator_schedule=Schedule(5e-5, steps=90, warmup=10),
            discriminator_schedule=Schedule(2e-4, steps=120),
            discriminator_warmup=30,
            corruption=Corruption(offset=1.2),
        ),
    )


RECIPES = {"tiny-world": tiny_world}
