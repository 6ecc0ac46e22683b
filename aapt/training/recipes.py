"""Complete configurations of training, as functions by name."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..data.tiny_world.rendered_clips import ProceduralData
from ..data.tiny_world.world import FIELD_OF_VIEW, FORWARD_STEP, YAW_STEP
from ..model.conditioning import MEASURED_FIELD_OF_VIEW
from ..model.config import CameraConfig, ModelConfig
from ..model.presets import aapt_8b
from ..vae import VAEConfig, tiny, tiny_light
from .corruption import Corruption
from .curriculum import Curriculum, Phase, Source, constant
from .optimization import Schedule
from .stages.adversarial import AdversarialConfig
from .stages.consistency_distillation import ConsistencyConfig
from .stages.decoder import DecoderConfig
from .stages.diffusion_adaptation import DiffusionConfig
from .stages.light_decoder import LightDecoderConfig, PatchAdversary
from .stages.rollout_regression import RolloutRegressionConfig

StageConfig = DiffusionConfig | ConsistencyConfig | RolloutRegressionConfig | AdversarialConfig


@dataclass(frozen=True)
class Recipe:
    """All numbers of a training run that makes a model.

    Attributes:
        camera: The camera that drives the model; None for a model without one.
        data: Sets of clips that the run renders, by name. Stages name the sets they learn from.
        stages: Stages by name, in order. Each names the stage whose weights it starts from.
        vae: Shape of the autoencoder that the run makes; None if clips come encoded.
        decoder: Training of its decoder; None if clips come encoded.
        light_decoder: Training of a cheaper decoder for it, with which the checkpoint streams; None
            for none.
        scaled_camera: Scale the camera's rays and pace to the encoded clips of the run.
        raw_starts: A stage starts from the last weights of the stage before, and the average is
            only exported; False to start from the average.
        new_channels: Columns of the patch embedding for input channels that the weights of the
            start do not have: "random" as a new layer's (docs/method.md#10), or "zero", with which
            the model computes at first what it computed without them.
        space_factor: Pixels per latent pixel of encoded clips.
    """

    name: str
    seed: int
    model: ModelConfig
    camera: CameraConfig | None
    stages: Mapping[str, StageConfig]
    data: Mapping[str, ProceduralData]
    vae: VAEConfig | None = None
    decoder: DecoderConfig | None = None
    light_decoder: LightDecoderConfig | None = None
    scaled_camera: bool = False
    raw_starts: bool = False
    new_channels: Literal["random", "zero"] = "random"
    space_factor: int = 8

    def __post_init__(self):
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
    "paper-8b": paper_8b,
    "paper-8b-640": paper_8b_640,
    "paper-8b-camera": paper_8b_camera,
    "paper-8b-pose": paper_8b_pose,
    "wan-1.3b": wan_1_3b,
    "wan-1.3b-camera": wan_1_3b_camera,
    "wan-1.3b-one-step": wan_1_3b_one_step,
    "wan-5b": wan_5b,
}
LIGHT_RECIPES = {"vae-light": vae_light, "wan-light": wan_light}
