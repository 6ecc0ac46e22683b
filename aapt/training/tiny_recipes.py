"""Recipes of the bundled world, of its successor's pilots and of their autoencoders."""

import math
from dataclasses import replace

from ..data.tiny_world.rendered_clips import ProceduralData
from ..data.tiny_world.world import FIELD_OF_VIEW, FORWARD_STEP, YAW_STEP
from ..model.config import CameraConfig, ModelConfig
from ..vae import tiny, tiny_fine, tiny_light
from .corruption import Corruption
from .curriculum import Curriculum, constant
from .optimization import Schedule
from .recipe import LightRecipe, Recipe, VAERecipe
from .stages.adversarial import AdversarialConfig
from .stages.consistency_distillation import ConsistencyConfig
from .stages.decoder import DecoderConfig
from .stages.diffusion_adaptation import DiffusionConfig
from .stages.light_decoder import LightDecoderConfig
from .stages.rollout_regression import RolloutRegressionConfig


def tiny_world() -> Recipe:
    """The bundled model: 128x80, made on two CPU cores in about four and a half hours."""
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
    regression = RolloutRegressionConfig(
        clips="clips",
        steps=500,
        batch=4,
        segment_frames=8,
        segments=2,
        schedule=Schedule(5e-4, warmup=30, decay="cosine"),
        first_frame="half",
        muon=True,
    )
    adversarial = AdversarialConfig(
        clips="long-clips",
        steps=220,
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
        discriminator_warmup=60,
        average=0.98,
        max_norm=100.0,
        corruption=Corruption(offset=1.2),
        regression=1.0,
        palette=5.0,
    )
    extension = replace(adversarial, clips="longer-clips", segments=6, mismatch=1.0)
    return Recipe(
        name="tiny-world",
        seed=0,
        model=model,
        camera=camera,
        motion_asked=(1.15, 1.3),  # by its gains on 16 walks, `aapt eval`; right on `--seed 1` too
        vae=tiny(),
        data={
            "clips": ProceduralData(
                height=80, width=128, clips=3000, latent_frames=17, video_clips=300
            ),
            "long-clips": ProceduralData(
                height=80, width=128, clips=1200, latent_frames=33, first_seed=200_000
            ),
            "longer-clips": ProceduralData(
                height=80, width=128, clips=600, latent_frames=49, first_seed=400_000
            ),
            "minute-clips": ProceduralData(
                height=80, width=128, clips=150, latent_frames=289, first_seed=600_000
            ),
        },
        decoder=DecoderConfig(
            schedule=Schedule(1e-3, warmup=50, decay="cosine"),
            steps=1400,
            batch=2,
            video_frames=25,
        ),
        light_decoder=vae_light().decoder,
        stages={
            "diffusion": DiffusionConfig(
                constant("clips", frames=10, batch=8, steps=3000),
                Schedule(1.5e-3, warmup=100, decay="cosine"),
                shift=6.0,
                betas=(0.9, 0.95),
                muon=True,
                average=0.999,
                max_norm=1.0,
                sampling_steps=8,
                guidance=3.0,  # with 10 the image is lost within seconds
            ),
            "consistency": ConsistencyConfig(
                constant("clips", frames=10, batch=8, steps=60),
                Schedule(2e-4, warmup=15, decay="cosine"),
                shift=6.0,
                betas=(0.9, 0.95),
                max_norm=1.0,
            ),
            "regression": regression,
            # Rollouts of five seconds, and offsets that turn one theme into another: the theme then
            # has to come from the prompt and the first frame.
            "long-regression": replace(
                regression,
                clips="long-clips",
                steps=210,
                batch=2,
                segments=4,
                schedule=Schedule(4e-4, warmup=10, decay="cosine"),
                corruption=Corruption(offset=1.2),
                start="regression",
            ),
            "adversarial": adversarial,
            # Eight seconds per rollout, and a discriminator that learns to look at the controls.
            "extension": replace(
                extension,
                steps=160,
                discriminator_warmup=40,
                start="adversarial",
                discriminator_start="adversarial",
            ),
            # Offsets cost motion. More regression with fewer offsets brings it back, on short
            # rollouts, which still have to follow their clips.
            "further-regression": replace(
                regression,
                clips="long-clips",
                steps=800,
                corruption=Corruption(offset=1.2, clip_chance=0.4),
                start="long-regression",
            ),
            # The adversarial stage again, with the discriminator that has learnt the most.
            "further-adversarial": replace(
                extension,
                steps=180,
                discriminator_warmup=20,
                palette=10.0,
                start="further-regression",
                discriminator_start="extension",
            ),
            # Keeps the colours for a minute: rows tell the sky from the ground, and the segments
            # are any eight seconds of the first 48.
            "final": replace(
                extension,
                clips="minute-clips",
                lead_segments=30,
                steps=90,
                discriminator_warmup=10,
                palette=0.0,
                rows=40.0,
                start="further-adversarial",
                discriminator_start="further-adversarial",
            ),
        },
    )


def on_a_gpu(recipe: Recipe, clips: int, updates: float) -> Recipe:
    """A recipe with `clips` times the clips per update and a share `updates` of the updates.

    On a GPU an update of a small model waits for the launches of its kernels, so that more clips
    cost little. Rates grow with the root of the clips (Adam), and averages span the same share of
    a stage. The gains of such a model are not known, so it is asked for no more than it is told to.
    Untried.
    """

    def faster(schedule: Schedule) -> Schedule:
        rate, warmup = schedule.learning_rate * clips**0.5, math.ceil(schedule.warmup * updates)
        return replace(schedule, learning_rate=rate, warmup=warmup)

    def larger(config):
        changes = {}
        for name, value in vars(config).items():
            if isinstance(value, Schedule):
                changes[name] = faster(value)
            elif isinstance(value, Curriculum):
                changes[name] = Curriculum(tuple(map(larger, value.phases)))
            elif name == "batch":
                changes[name] = clips * value
            elif name in ("steps", "discriminator_warmup"):
                changes[name] = math.ceil(value * updates)
            elif name == "average" and value is not None:
                changes[name] = max(0.0, 1 - (1 - value) / updates)
        return replace(config, **changes)

    return replace(
        recipe,
        motion_asked=(1.0, 1.0),
        stages={name: larger(config) for name, config in recipe.stages.items()},
        decoder=larger(recipe.decoder),
        light_decoder=larger(recipe.light_decoder),
    )


def pilot(
    name: str, updates: tuple[int, int], *, autoencoder: str = "tiny-world", **model
) -> Recipe:
    """A small generator for the next world, to compare its shape with others at equal cost.

    It learns from the bundled world's first clips. Tokens of any size are placed on the bundled
    model's grid.

    Args:
        updates: Updates of the diffusion and of the regression stage. All pilots take about 155e12
            operations, an hour on a CPU core that makes 45e9 per second. Without a diffusion stage
            the generator grows from the bundled one.
        autoencoder: As in `Recipe`.
        model: Fields of `ModelConfig` that differ from the bundled model's.
    """
    world = tiny_world()
    stages, grown = dict(world.stages), updates[0] == 0
    regression = replace(stages["regression"], steps=updates[1])
    if grown:
        kept = {"regression": replace(regression, start=None)}
    else:
        diffusion = constant("clips", frames=10, batch=8, steps=updates[0])
        distillation = constant("clips", frames=10, batch=8, steps=15)
        kept = {
            "diffusion": replace(stages["diffusion"], curriculum=diffusion),
            "consistency": replace(stages["consistency"], curriculum=distillation),
            "regression": regression,
        }
    return replace(
        world,
        name=name,
        model=replace(world.model, **model),
        motion_asked=(1.0, 1.0),
        data={"clips": replace(world.data["clips"], clips=1500, video_clips=0)},
        vae=tiny() if autoencoder == "tiny-world" else tiny_fine(),
        autoencoder=autoencoder,
        grown="tiny-world" if grown else None,
        decoder=None,
        light_decoder=None,
        stages=kept,
    )


def pilot_40() -> Recipe:
    """40 tokens per frame, twice the width and the depth of the bundled model."""
    return pilot("pilot-40", (155, 60), width=384, heads=6, depth=12)


def pilot_80() -> Recipe:
    """80 tokens per frame, each of one row and two columns of latent pixels."""
    return pilot("pilot-80", (240, 90), width=256, heads=4, depth=8, patch=(1, 2))


def pilot_160() -> Recipe:
    """160 tokens per frame, one for each latent pixel. It grows from the bundled generator."""
    return pilot("pilot-160", (0, 280), patch=1)


def pilot_160_fine() -> Recipe:
    """160 tokens per frame on the latents of `vae-fine`, whose cells have 4x4 pixels."""
    return pilot("pilot-160-fine", (205, 75), autoencoder="vae-fine")


def sharp_world() -> Recipe:
    """The bundled world of sharper pictures: 160 tokens per frame on the latents of `vae-fine`.

    It grows from the bundled generator, so that no diffusion stage is needed. Counts of updates are
    for one CPU core, which takes about three seconds for an update of the regression.
    """
    world = tiny_world()
    stages = world.stages
    # The discriminator of four times the tokens wins soon: half the rate, twice the penalty. Few
    # segments with a loss after a lead of any length: twice the updates in the same time, and far
    # frames are learnt from as often as near ones.
    adversarial = replace(
        stages["further-adversarial"],
        discriminator_schedule=Schedule(1e-4),
        penalty=40.0,
        lead_segments=4,
        segments=2,
    )
    further = replace(
        adversarial,
        clips="minute-clips",
        penalized="none",
        noised=True,
        lead_segments=6,
        average=0.985,
        corruption=Corruption(offset=1.2, clip_chance=0.3),
        regression=0.3,
        steps=110,
        discriminator_warmup=30,
        start="adversarial",
        discriminator_start="adversarial",
    )
    extension = replace(
        further,
        batch=4,
        regression=1.0,
        regression_segments=2,
        rows=5.0,
        average=0.99,
        discriminator_warmup=10,
        start="further-adversarial",
        discriminator_start="further-adversarial",
    )
    final = replace(
        extension,
        clips="far-clips",
        lead_segments=16,
        discriminator_schedule=Schedule(2e-4),
        palette=5.0,
        rows=0.0,
        average=0.985,
        steps=150,
        start="extension",
        discriminator_start="extension",
    )
    near = replace(
        final,
        lead_power=2.0,
        mismatched_gain=0.5,
        steps=100,
        start="more-regression",
        mixed_with="final",
        mixed_share=0.5,
        discriminator_start="final",
    )
    return replace(
        world,
        name="sharp-world",
        model=replace(world.model, residual_map=True),
        motion_asked=(1.25, 1.35),  # by its gains on 16 walks, `aapt eval --seed 1`
        vae=tiny_fine(),
        autoencoder="vae-fine",
        grown="tiny-world",
        decoder=None,
        light_decoder=None,
        data={
            "clips": replace(world.data["clips"], clips=900, video_clips=0),
            "long-clips": replace(world.data["long-clips"], clips=600),
            "longer-clips": replace(world.data["longer-clips"], clips=400),
            "minute-clips": replace(world.data["minute-clips"], clips=240, latent_frames=81),
            "far-clips": replace(world.data["minute-clips"], clips=130, latent_frames=145),
        },
        stages={
            "regression": replace(stages["regression"], steps=220, start=None),
            "long-regression": replace(stages["long-regression"], steps=100),
            # Until here rollouts hardly follow the controls for five seconds.
            "further-regression": replace(stages["further-regression"], steps=500),
            "more-regression": replace(
                stages["further-regression"], steps=600, start="further-regression"
            ),
            "adversarial": replace(
                adversarial,
                steps=200,
                discriminator_warmup=40,
                start="more-regression",
                discriminator_start="more-regression",
            ),
            # Noised frames in place of penalties, and less regression: rollouts stay filled.
            "further-adversarial": further,
            # Twice the clips, and regression where the clip can be foretold alone.
            "extension": extension,
            # Rollouts of 24 seconds, and the discriminator at twice the rate: far frames fill.
            "final": final,
            # Between the clear first second of regression and the filled minute, then filled again.
            "near": near,
            # The mean alone. Forty updates from the plain mean made it worse.
            "together": replace(
                near,
                steps=0,
                discriminator_warmup=0,
                start="near",
                mixed_share=0.75,  # of `final`
                discriminator_start="near",
            ),
        },
    )


def small_world() -> Recipe:
    """A third of the bundled world's model at 80x48, 15 tokens per frame, to try things out.

    The bundled autoencoder encodes its clips. Stages up to regression take about an hour of two CPU
    cores without bfloat16, estimated from the time per update.
    """
    world = tiny_world()
    stages = world.stages
    counts = {"clips": 1200, "long-clips": 400, "longer-clips": 200, "minute-clips": 60}
    # With 500 updates, and 250 of regression, rollouts did not follow their controls.
    shorter = constant("clips", frames=10, batch=8, steps=2500)
    return replace(
        world,
        name="small-world",
        motion_asked=(1.0, 1.0),
        model=replace(world.model, width=128, heads=2, depth=4, reference_grid=(3, 5)),
        autoencoder="tiny-world",
        decoder=None,
        light_decoder=None,
        data={
            name: replace(world.data[name], height=48, width=80, clips=count, video_clips=0)
            for name, count in counts.items()
        },
        stages=stages
        | {
            "diffusion": replace(stages["diffusion"], curriculum=shorter),
            "regression": replace(stages["regression"], steps=800),
        },
    )


def vae_light() -> LightRecipe:
    """The bundled world's decoder for streaming, made on one CPU core in a quarter of an hour.

    White noise on the latents stands for a generator's errors. Bundled weights are of seed 0.
    """
    return LightRecipe(
        name="vae-light",
        seed=0,
        vae="tiny-world",
        data=ProceduralData(height=80, width=128, clips=300, latent_frames=17, video_clips=300),
        decoder=LightDecoderConfig(
            shape=tiny_light(),
            schedule=Schedule(2.5e-3, warmup=100, decay="cosine"),
            steps=2500,
            batch=2,
            video_frames=25,
            squares=40.0,
            edges=0.1,
            imitation=0.0,
            seams=0.2,
            flicker=0.15,
            latent_noise=0.22,
        ),
    )


def vae_fine() -> VAERecipe:
    """The autoencoder of `sharp-world`, with cells of 4x4 pixels, made on one CPU core in ten
    minutes.

    Noise on the latents stands for a generator's errors, as in `vae_light`. A generator errs by
    token, which shows as a grid of 8x8 pixels if the decoder has not seen such noise.
    """
    light = vae_light()
    return VAERecipe(
        name="vae-fine",
        seed=0,
        vae=tiny_fine(),
        data=light.data,
        decoder=replace(
            light.decoder,
            shape=None,
            schedule=Schedule(4e-3, warmup=50, decay="cosine"),
            steps=700,
            video_frames=17,
            seams=0.4,
            sharpening=0.4,
            fit_noise=0.03,
            latent_noise=0.3,
            token_noise=1.0,
        ),
    )
