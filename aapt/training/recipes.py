"""Complete configurations of training, as functions by name."""

from dataclasses import replace

from ..data.tiny_world.rendered_clips import ProceduralData
from ..model.conditioning import MEASURED_FIELD_OF_VIEW
from ..model.config import CameraConfig, ModelConfig
from ..model.presets import aapt_8b
from .curriculum import Curriculum, Phase, Source, constant
from .optimization import Schedule
from .puppet_recipe import tiny_puppet
from .recipe import LightRecipe, Recipe
from .stages.adversarial import AdversarialConfig
from .stages.consistency_distillation import ConsistencyConfig
from .stages.diffusion_adaptation import DiffusionConfig
from .stages.distribution_matching import DistributionMatchingConfig
from .stages.light_decoder import LightDecoderConfig, PatchAdversary
from .stages.rollout_regression import RolloutRegressionConfig
from .tiny_recipes import (
    pilot_40,
    pilot_80,
    pilot_160,
    pilot_160_fine,
    sharp_world,
    small_world,
    tiny_world,
    vae_fine,
    vae_light,
)


def paper_8b() -> Recipe:
    """The paper's training in version 2 (docs/method.md#6, #7 and #8). A second has six frames.

    Numbers that the paper does not give are ours (docs/method.md#12).
    """
    adam = {"schedule": Schedule(1e-5), "weight_decay": 0.01, "shift": 24.0}
    longest = Source("736x416", frames=15 * 6, shortest=5 * 6)
    adaptation = Curriculum(
        (
            Phase(20_000, 256, (Source("736x416", frames=5 * 6),)),
            Phase(6_000, 128, (Source("736x416", frames=5 * 6), Source("1280x720", frames=5 * 6))),
            Phase(4_000, 32, (longest, Source("1280x720", frames=5 * 6))),
        )
    )
    distillation = Curriculum((replace(adaptation.phases[-1], steps=5_000),))
    adversarial = AdversarialConfig(
        clips=(
            Source("736x416", frames=10 * 6, shortest=5 * 6),
            Source("1280x720", frames=5 * 6),  # as long as in stages 1 and 2
        ),
        steps=500,
        batch=256,
        generator_schedule=Schedule(3e-6),
        discriminator_schedule=Schedule(3e-6),
        average=0.995,
    )
    extension = replace(
        adversarial,
        start="adversarial",
        discriminator_start="adversarial",
        segments=2,  # up to 10 + 9 = 19 s
        overlap_frames=6,
        overlap_loss=True,
        batch=64,
        generator_schedule=Schedule(1e-5),
        discriminator_schedule=Schedule(1e-5),
    )
    return Recipe(
        name="paper-8b",
        seed=0,
        model=aapt_8b(),
        camera=None,
        data={},
        raw_starts=True,
        stages={
            "diffusion": DiffusionConfig(adaptation, **adam),
            "consistency": ConsistencyConfig(distillation, **adam),
            "adversarial": adversarial,
            "extension": extension,
            # up to 10 + 5 x 9 = 55 s
            "extension-5": replace(
                extension, start="extension", discriminator_start="extension", segments=6
            ),
        },
    )


def paper_8b_640() -> Recipe:
    """The training of the paper's NeurIPS supplement: `paper_8b` with stage 3 at 640x352 alone."""
    base, clips = paper_8b(), (Source("640x352", frames=10 * 6, shortest=5 * 6),)
    stages = {
        name: replace(stage, clips=clips) if isinstance(stage, AdversarialConfig) else stage
        for name, stage in base.stages.items()
    }
    return replace(base, name="paper-8b-640", stages=stages)


def paper_8b_camera() -> Recipe:
    """The paper's model for exploring worlds (supplement G), on clips with camera motion.

    Its training is that of `paper_8b` and starts from the weights of the image-to-video model.
    """
    camera = CameraConfig(
        field_of_view=MEASURED_FIELD_OF_VIEW,
        yaw_step=0.02,
        forward_step=1.0,
        origin_deviation=1.0,
        direction_deviation=1.0,
    )
    base = paper_8b()
    model = replace(base.model, condition_channels=camera.channels)
    return replace(base, name="paper-8b-camera", model=model, camera=camera, scaled_camera=True)


def paper_8b_pose() -> Recipe:
    """The paper's model of people, on clips with pose motion: latents of a drawn skeleton."""
    base = paper_8b()
    model = replace(base.model, condition_channels=base.model.latent_channels)
    return replace(base, name="paper-8b-pose", model=model)


def wan_light() -> LightRecipe:
    """A light decoder for Wan 2.1's autoencoder, from the user's videos. Untried at full size."""
    return LightRecipe(
        name="wan-light",
        seed=0,
        vae=None,
        data=ProceduralData(height=256, width=256, clips=2000, latent_frames=5, video_clips=2000),
        decoder=LightDecoderConfig(
            schedule=Schedule(1e-4, warmup=500, decay="cosine"),
            steps=50_000,
            batch=8,
            video_frames=17,
            latent_noise=0.1,
            adversary=PatchAdversary(
                Schedule(1e-4, warmup=500), weight=0.05, warmup=2000, width=64
            ),
        ),
    )


def wan_model(**changes) -> ModelConfig:
    """The shape of Wan 2.1's 1.3 B, as `aapt convert --recycle` makes it (docs/method.md#15).

    Frame 0, 19 past frames and the newest one are the 21 that Wan is trained on.
    """
    shape = ModelConfig(
        block="wan",
        width=1536,
        heads=12,
        head_dim=128,
        depth=30,
        mlp_width=8960,
        text_width=4096,
        text_tokens=512,
        text_encoder="umt5",
        window_frames=19,
        sink_distance="clamped",
        reference_grid=None,
        rope_axes=(44, 42, 42),
    )
    return replace(shape, **changes)


def wan_1_3b() -> Recipe:
    """Post-training of Wan 2.1's 1.3 B: clips of 5 s at 832x480 and 16 fps. Untried at full size.

    Numbers of updates follow those that others report (docs/post-training.md#evidence). The
    regression before the adversarial stage is theirs, too; the paper has none.
    """
    clips = "832x480"
    adam = {"schedule": Schedule(1e-5, warmup=100), "shift": 5.0, "max_norm": 1.0}
    adversarial = AdversarialConfig(
        clips=clips,
        steps=500,
        batch=64,
        segment_frames=20,
        start="regression",
        generator_schedule=Schedule(3e-6),
        discriminator_schedule=Schedule(3e-6),
        average=0.99,
    )
    return Recipe(
        name="wan-1.3b",
        seed=0,
        model=wan_model(),
        camera=None,
        data={},
        new_channels="zero",
        stages={
            "diffusion": DiffusionConfig(
                constant(clips, 20, batch=64, steps=3000, first_frame="always"),
                sampling_steps=50,
                guidance=5.0,
                **adam,
            ),
            "consistency": ConsistencyConfig(
                constant(clips, 20, batch=64, steps=1000, first_frame="always"), **adam
            ),
            "regression": RolloutRegressionConfig(
                clips=clips,
                steps=500,
                batch=64,
                segment_frames=20,
                segments=1,
                schedule=Schedule(1e-5, warmup=50),
                average=0.99,
            ),
            "adversarial": adversarial,
            # two segments of 19 frames that share 4: real clips of the second start at frame 1
            "extension": replace(
                adversarial,
                steps=300,
                segment_frames=19,
                segments=2,
                overlap_frames=4,
                start="adversarial",
                discriminator_start="adversarial",
            ),
        },
    )


def wan_1_3b_camera() -> Recipe:
    """`wan_1_3b` driven by a camera, on clips with camera motion, as `paper_8b_camera`."""
    base, camera = wan_1_3b(), paper_8b_camera().camera
    return replace(
        base,
        name="wan-1.3b-camera",
        model=wan_model(condition_channels=camera.channels),
        camera=camera,
        scaled_camera=True,
        new_channels="random",
    )


def wan_1_3b_one_step() -> Recipe:
    """The short cut from a causal model of one step, without the stages that make such a model.

    The discriminator starts from a causal diffusion model, or from the generator's weights.
    """
    base = wan_1_3b()
    regression, adversarial, extension = (
        base.stages[name] for name in ("regression", "adversarial", "extension")
    )
    return replace(
        base,
        name="wan-1.3b-one-step",
        stages={
            "regression": replace(regression, start=None),
            "adversarial": replace(adversarial, discriminator_start=None),
            "extension": extension,
        },
    )


def wan_1_3b_matched() -> Recipe:
    """`wan_1_3b` with distribution matching in place of the regression. Untried at full size.

    Rates are Self-Forcing's, whose 600 updates are the whole training; 200 are ours.
    """
    base = wan_1_3b()
    matching = DistributionMatchingConfig(
        clips="832x480",
        steps=200,
        batch=64,
        segment_frames=20,
        generator_schedule=Schedule(2e-6),
        critic_schedule=Schedule(4e-7),
    )
    stages = {
        "matching" if name == "regression" else name: stage for name, stage in base.stages.items()
    }
    adversarial = replace(base.stages["adversarial"], start="matching")
    stages |= {"matching": matching, "adversarial": adversarial}
    return replace(base, name="wan-1.3b-matched", stages=stages)


def wan_5b() -> Recipe:
    """Post-training of Wan 2.2's 5 B: clips of 5 s at 1280x704 and 24 fps. Untried at full size.

    Frame 0, 29 past frames and the newest one are the 31 that it is trained on.
    """
    base, clips = wan_1_3b(), "1280x704"
    shape = wan_model(width=3072, heads=24, mlp_width=14336, latent_channels=48, window_frames=29)
    stages = {}
    for name, stage in base.stages.items():
        if isinstance(stage, (DiffusionConfig, ConsistencyConfig)):
            steps = stage.curriculum.steps
            curriculum = constant(clips, 30, batch=64, steps=steps, first_frame="always")
            stages[name] = replace(stage, curriculum=curriculum)
        else:
            frames = stage.segment_frames + 10
            stages[name] = replace(stage, clips=clips, segment_frames=frames)
    return replace(base, name="wan-5b", model=shape, stages=stages, space_factor=16)


RECIPES = {
    "tiny-world": tiny_world,
    "tiny-puppet": tiny_puppet,
    "paper-8b": paper_8b,
    "paper-8b-640": paper_8b_640,
    "paper-8b-camera": paper_8b_camera,
    "paper-8b-pose": paper_8b_pose,
    "wan-1.3b": wan_1_3b,
    "wan-1.3b-camera": wan_1_3b_camera,
    "wan-1.3b-one-step": wan_1_3b_one_step,
    "wan-1.3b-matched": wan_1_3b_matched,
    "wan-5b": wan_5b,
    "pilot-40": pilot_40,
    "pilot-80": pilot_80,
    "pilot-160": pilot_160,
    "pilot-160-fine": pilot_160_fine,
    "sharp-world": sharp_world,
    "small-world": small_world,
}
LIGHT_RECIPES = {"vae-light": vae_light, "wan-light": wan_light}
VAE_RECIPES = {"vae-fine": vae_fine}
