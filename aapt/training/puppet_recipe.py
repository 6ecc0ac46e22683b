"""The recipe of the puppet: a figure in a place that follows poses (docs/method.md#10)."""

from dataclasses import replace

from ..data.tiny_puppet.clips import PuppetData
from ..model.config import ModelConfig
from ..vae import tiny
from .corruption import Corruption
from .curriculum import constant
from .optimization import Schedule
from .recipe import Recipe
from .stages.adversarial import AdversarialConfig
from .stages.consistency_distillation import ConsistencyConfig
from .stages.decoder import DecoderConfig
from .stages.diffusion_adaptation import DiffusionConfig
from .stages.rollout_regression import RolloutRegressionConfig

CHANNELS = 32  # of a latent pixel: 25.0 dB by linear maps alone, where 16 channels give 22.9


def tiny_puppet() -> Recipe:
    """A model of 96x96 that follows poses, in the stages of the bundled world.

    An image has 36 tokens, each of 16x16 pixels: about two hours of one CPU core, estimated from
    the time per update and untried at full length. The autoencoder learns from clips of the puppet
    alone, and encodes the drawn skeletons too. Those of the bundled world have neither limbs nor
    faces among their principal components.
    """
    vae = replace(tiny(), latent_channels=CHANNELS)
    model = ModelConfig(
        width=192,
        heads=3,
        head_dim=64,
        depth=6,
        text_width=64,
        text_tokens=25,
        window_frames=8,
        reference_grid=(6, 6),
        rope_axes=(24, 20, 20),
        rope_theta=100.0,
        latent_channels=CHANNELS,
        condition_channels=CHANNELS,
        sink_distance="clamped",
        residual_head=True,
        output_clamp=8.0,
    )
    regression = RolloutRegressionConfig(
        clips="clips",
        steps=600,
        batch=4,
        segment_frames=8,
        segments=2,
        schedule=Schedule(5e-4, warmup=30, decay="cosine"),
        first_frame="half",
        muon=True,
    )
    adversarial = AdversarialConfig(
        clips="long-clips",
        steps=120,
        batch=2,
        segment_frames=8,
        segments=4,
        whole_clips=True,
        first_frame="half",
        perturb_known=False,
        generator_schedule=Schedule(5e-5, warmup=20),
        discriminator_schedule=Schedule(2e-4),
        start="long-regression",
        penalty=20.0,
        discriminator_warmup=40,
        average=0.98,
        max_norm=100.0,
        corruption=Corruption(offset=0.6),
        regression=1.0,
    )
    return Recipe(
        name="tiny-puppet",
        seed=0,
        model=model,
        camera=None,
        vae=vae,
        data={
            "clips": PuppetData(height=96, width=96, clips=1600, latent_frames=17, video_clips=300),
            "long-clips": PuppetData(
                height=96, width=96, clips=600, latent_frames=33, first_seed=200_000
            ),
        },
        decoder=DecoderConfig(
            schedule=Schedule(1e-3, warmup=50, decay="cosine"),
            steps=900,
            batch=2,
            video_frames=17,
        ),
        stages={
            "diffusion": DiffusionConfig(
                constant("clips", frames=10, batch=8, steps=1600),
                Schedule(1.5e-3, warmup=80, decay="cosine"),
                shift=6.0,
                betas=(0.9, 0.95),
                muon=True,
                average=0.999,
                max_norm=1.0,
                sampling_steps=8,
                guidance=1.0,
            ),
            "consistency": ConsistencyConfig(
                constant("clips", frames=10, batch=8, steps=40),
                Schedule(2e-4, warmup=10, decay="cosine"),
                shift=6.0,
                betas=(0.9, 0.95),
                max_norm=1.0,
            ),
            "regression": regression,
            # Rollouts of five seconds, and offsets of the colours: look and place then have to come
            # from the first frame and the prompt.
            "long-regression": replace(
                regression,
                clips="long-clips",
                steps=120,
                batch=2,
                segments=4,
                schedule=Schedule(4e-4, warmup=10, decay="cosine"),
                corruption=Corruption(offset=0.6),
                start="regression",
            ),
            # The discriminator learns to look at the skeletons from real clips under others.
            "adversarial": replace(adversarial, mismatch=1.0),
            # Rollouts that leave their clips: poses turn back where the clip ends
            # (docs/method.md#8), and look and place have to stay.
            "extension": replace(
                adversarial,
                clips="clips",
                segments=6,
                whole_clips=False,
                regression=0.0,
                steps=40,
                discriminator_warmup=10,
                mismatch=1.0,
                start="adversarial",
                discriminator_start="adversarial",
            ),
        },
    )
