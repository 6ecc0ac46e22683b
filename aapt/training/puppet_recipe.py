"""The recipe of the puppet: a figure in a place that follows poses (docs/method.md#10)."""

from dataclasses import replace

from ..data.tiny_puppet.clips import PuppetData
from ..vae import tiny, tiny_light
from .corruption import Corruption
from .curriculum import constant
from .optimization import Schedule
from .recipe import Recipe
from .tiny_recipes import tiny_world

CHANNELS = 32  # of a latent pixel: 25.0 dB by linear maps alone, where 16 channels give 22.9


def tiny_puppet() -> Recipe:
    """A model of 96x96 that follows poses, in the stages of the bundled world.

    An image has 36 tokens, each of 16x16 pixels: an hour and a half of one CPU core. The
    autoencoder learns from clips of the puppet alone, and encodes the drawn skeletons too. Those of
    the bundled world have neither limbs nor faces among their principal components.
    """
    world = tiny_world()
    model = replace(
        world.model,
        reference_grid=(6, 6),
        latent_channels=CHANNELS,
        condition_channels=CHANNELS,
        residual_map=True,
    )
    stages = world.stages
    diffusion = replace(
        stages["diffusion"],
        curriculum=constant("clips", frames=10, batch=8, steps=1600),
        schedule=Schedule(1.5e-3, warmup=80, decay="cosine"),
        guidance=1.0,
    )
    consistency = replace(
        stages["consistency"],
        curriculum=constant("clips", frames=10, batch=8, steps=40),
        schedule=Schedule(2e-4, warmup=10, decay="cosine"),
    )
    # The discriminator learns to look at the skeletons from real clips under others.
    adversarial = replace(
        stages["adversarial"],
        steps=140,
        discriminator_warmup=40,
        corruption=Corruption(offset=0.6),
        palette=0.0,
        mismatch=1.0,
    )
    return Recipe(
        name="tiny-puppet",
        seed=0,
        model=model,
        camera=None,
        vae=replace(tiny(), latent_channels=CHANNELS),
        data={
            "clips": PuppetData(height=96, width=96, clips=1600, latent_frames=17, video_clips=300),
            "long-clips": PuppetData(
                height=96, width=96, clips=600, latent_frames=33, first_seed=200_000
            ),
            "minute-clips": PuppetData(
                height=96, width=96, clips=60, latent_frames=289, first_seed=400_000
            ),
        },
        decoder=replace(world.decoder, steps=900, video_frames=17),
        light_decoder=replace(
            world.light_decoder,
            shape=replace(tiny_light(), latent_channels=CHANNELS),
            schedule=Schedule(3e-3, warmup=50, decay="cosine"),
            steps=900,
            video_frames=17,
            sharpening=0.5,
            latent_noise=0.3,
            token_noise=1.0,
        ),
        stages={
            "diffusion": diffusion,
            "consistency": consistency,
            "regression": replace(stages["regression"], steps=300),
            # Rollouts of five seconds, and offsets of the colours: look and place then have to come
            # from the first frame and the prompt. A place that stands still shows every error that
            # is not corrected, so most updates are here.
            "long-regression": replace(
                stages["long-regression"], steps=600, corruption=Corruption(offset=0.6)
            ),
            "adversarial": adversarial,
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
                start="adversarial",
                discriminator_start="adversarial",
            ),
            # Any five seconds of the first 45.
            "final": replace(
                adversarial,
                clips="minute-clips",
                lead_segments=30,
                rows=40.0,
                steps=60,
                discriminator_warmup=10,
                start="extension",
                discriminator_start="extension",
            ),
        },
    )
