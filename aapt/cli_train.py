"""The commands that encode clips and train on them."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .command_line import MODEL, InputError, Json, bad_input, ctrl_c, load, say, table


def train(
    recipe: Annotated[str, typer.Argument(help="A named recipe, such as tiny-world.")],
    stage: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this stage; may be repeated.", show_default="all"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where results go.", show_default="runs/RECIPE"),
    ] = None,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Processes that render training clips.")
    ] = 2,
    latents: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SET=]FOLDER",
            help="Clips of `aapt encode`, for recipes of real data; repeated, several for a set.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What the first stage starts from.", show_default="random weights"
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER",
            help="What a light decoder is made for: a checkpoint, or diffusers' Wan.",
            show_default="tiny-world for vae-light; wan-light needs one",
        ),
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="What a light decoder learns from.",
            show_default="procedural clips for vae-light; wan-light needs them",
        ),
    ] = None,
    perceptual: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A TorchScript network by which a light decoder is compared, as for LPIPS.",
            show_default="none",
        ),
    ] = None,
    save_every: Annotated[
        int, typer.Option(metavar="N", min=1, help="Updates from one saved state to the next.")
    ] = 100,
    sample_every: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Updates from one sheet of samples to the next; 0 for none."
        ),
    ] = 250,
    clips_at_once: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Clips of a rank that go together.", show_default="all"
        ),
    ] = None,
    checkpoint_blocks: Annotated[
        bool, typer.Option("--checkpoint-blocks", help="Compute activations twice, keep few.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Train nothing; print what it needs of H100 GPUs, and how."),
    ] = False,
    gpus: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", min=1, help="For --plan; may be repeated.", show_default="8 and 256"
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="GPUs that share a clip's tokens.",
            show_default="1; for --plan as few as fit",
        ),
    ] = None,
):
    """Train a model by a recipe, stage after stage.

    The same command goes on after an interruption: a stage whose result is in the folder is not run
    again, and one that was stopped goes on from its last saved state, bit for bit. Each stage's
    folder gets metrics.jsonl and sheets of samples. Under torchrun all ranks train together. The
    last line printed is the checkpoint's folder, for --model. What --latents and --weights were is
    kept in inputs.json; a run does not go on with others.

    The recipes vae-light and wan-light make a light decoder for an autoencoder that there is. The
    checkpoint is then the one of --vae with that decoder.

    \b
    Examples:
      aapt train tiny-world
      aapt train tiny-world --stage adversarial --out runs/second
      aapt train tiny-world --sample-every 100 && aapt plot runs/tiny-world/diffusion --out d.png
      aapt train --plan paper-8b --gpus 8
      torchrun --nproc-per-node 8 -m aapt train paper-8b --checkpoint-blocks --context 8 \
        --clips-at-once 1 --latents clips/ --weights b.safetensors
      aapt train vae-light && aapt eval-vae runs/vae-light/vae-light
      aapt train wan-light --vae Wan2.1/vae --videos videos/ --perceptual vgg16.pt
      aapt generate --model runs/tiny-world/tiny-world --out walk.mp4
    """
    from . import light_vae, trainer
    from .checkpoint import CheckpointError
    from .parallel import Parallel
    from .recipes import LIGHT_RECIPES, RECIPES
    from .run_inputs import Inputs
    from .training_loop import Habits, TrainingError

    for_light = {"vae": vae, "videos": videos, "perceptual": perceptual}
    for_worlds = {"stage": stage, "latents": latents, "weights": weights, "plan": plan}
    with bad_input():
        known = RECIPES | LIGHT_RECIPES
        if recipe not in known:
            raise ValueError(f"recipe: expected one of {', '.join(known)}, got {recipe!r}")
        for name, value in (for_worlds if recipe in LIGHT_RECIPES else for_light).items():
            if value:
                raise ValueError(f"{name}: not for the recipe {recipe}")
        names = trainer.stage_names(RECIPES[recipe]()) if recipe in RECIPES else []
        for name in stage or ():
            if name not in names:
                raise ValueError(f"stage: expected one of {', '.join(names)}, got {name!r}")
        if gpus and not plan:
            raise ValueError("gpus: expected --plan with it")
        if plan:
            from .plan import print_plans

            return print_plans(RECIPES[recipe](), gpus or [8, 256], context)
    folder = out or Path("runs") / recipe
    habits = Habits(save_every, sample_every or None, clips_at_once, checkpoint_blocks)
    if recipe in LIGHT_RECIPES:
        make = partial(light_vae.run, LIGHT_RECIPES[recipe](), folder, **for_light)
    else:
        folders: dict[str, list[Path]] = {}
        for given in latents or ():
            name, _, path = given.rpartition("=")
            folders.setdefault(name, []).append(Path(path))
        inputs = Inputs(folders, weights)
        make = partial(trainer.run, RECIPES[recipe](), folder, stage, inputs=inputs)
    parallel = None
    try:
        parallel = Parallel.from_environment(context or 1)
        report = say if parallel.main else _quiet
        done = make(report=report, parallel=parallel, workers=workers, habits=habits)
        if parallel.main:
            print(done)
    except (TrainingError, CheckpointError, OSError) as error:
        say(f"aapt: {error}")
        raise typer.Exit(1) from None
    except ValueError as error:  # the folder holds another recipe, clips are missing, ...
        raise InputError(str(error)) from None
    finally:
        if parallel:
            parallel.close()


def _quiet(line: str) -> None:
    """What a rank says that is not the first."""


def encode(
    videos: Annotated[
        Path, typer.Argument(help="A folder of videos or tar shards, a .tar, or a video.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where shards of latents go.")
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|FOLDER",
            help="Whose VAE: a bundled model, a checkpoint, or a VAE alone such as Wan 2.1's.",
        ),
    ] = MODEL,
    bucket: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WxH[+WxH...]",
            help="A size of clips, or several that a video is encoded at; may be repeated.",
            show_default="the model's",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="S", help="Length of a clip.")] = 5.0,
    stride: Annotated[
        float | None,
        typer.Option(
            metavar="S", help="From one clip's start to the next.", show_default="a clip's length"
        ),
    ] = None,
    motion: Annotated[
        str, typer.Option(metavar="KIND", help="What moves a clip: none, camera or pose.")
    ] = "none",
    max_move: Annotated[
        float,
        typer.Option(metavar="X", min=0, help="Drop clips whose camera moves further a frame."),
    ] = 0.5,
    max_turn: Annotated[
        float,
        typer.Option(
            metavar="DEGREES", min=0, help="Drop clips whose camera turns further a frame."
        ),
    ] = 15.0,
    min_score: Annotated[
        float, typer.Option(metavar="P", help="Keypoints below this score are not drawn.")
    ] = 0.3,
    shard_clips: Annotated[int, typer.Option(metavar="N", min=1, help="Clips of a shard.")] = 256,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Threads that decode.")] = 2,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where the VAE runs: cpu, cuda, cuda:1, ...")
    ] = "cpu",
    as_json: Json = False,
):
    """Encode videos into shards of latents to train on.

    NAME.mp4 (or any container FFmpeg reads) goes with NAME.txt, its caption, or NAME.json with
    "caption" or "captions"; with NAME.camera.txt (RealEstate10K) for camera motion and
    NAME.keypoints.json (COCO-WholeBody) for pose motion. Clips of 1 + 4 * round(seconds * 24 / 4)
    frames are cut at 24 fps. What cannot be used is skipped and counted; FOLDER/videos.jsonl names
    it. The same command goes on after an interruption and makes the same bytes.

    \b
    Examples:
      aapt encode videos/ --out latents/
      aapt encode shards/ --bucket 736x416 --bucket 416x736 --model mine/ --out latents/
      aapt encode videos/ --bucket 736x416+1280x720+640x352 --model Wan2.1/vae --seconds 15 \
        --device cuda --out latents/
      aapt encode realestate/ --motion camera --stride 2.5 --device cuda --out latents/
    """
    from .data import encode as job
    from .data.buckets import Bucket
    from .data.clip_reader import CutConfig
    from .device import move

    with bad_input():
        vae, size, fps, patch = _autoencoder(model)
        if size is None and not bucket:
            raise ValueError(f"bucket: expected one or more, as {model} is a VAE of no size")
        granularity, per_latent = vae.config.space_factor * patch, vae.config.time_factor
        for name, value in (
            ("seconds", seconds),
            ("stride", seconds if stride is None else stride),
        ):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, got {value:g}")
        latent_frames = max(1, round(seconds * fps / per_latent))
        clip = 1 + per_latent * latent_frames
        config = CutConfig(
            buckets=tuple(Bucket.parse_family(family, granularity) for family in bucket or [size]),
            latent_frames=latent_frames,
            stride=clip if stride is None else max(1, round(stride * fps)),
            fps=fps,
            frames_per_latent=per_latent,
            motion=motion,
            max_move=max_move,
            max_turn=math.radians(max_turn),
            min_score=min_score,
        )
        move(vae, device)
        options = {"shard_clips": shard_clips, "workers": workers, "report": say}
        try:
            with ctrl_c() as interrupted:
                index = job.encode(
                    videos, vae, out, config, stop=lambda: bool(interrupted), **options
                )
        except job.EncodeError as error:
            say(f"aapt: {error}; the same command goes on")
            raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(index, indent=2))
    else:
        table(job.summary(index))
    if not index["complete"]:
        say("aapt: interrupted: the same command goes on")
        raise typer.Exit(130)
    if not index["buckets"]:
        say(f"aapt: {videos}: no clip could be used; {out / job.JOURNAL} says why")
        raise typer.Exit(1)


def _autoencoder(model: str):
    """The VAE of a model with the model's size, frames per second and latent pixels along a token's
    side; of one that stands alone the size is None, the others are the paper's."""
    from .checkpoint import find_checkpoint, load_config
    from .config import ModelConfig
    from .vae.wan_weights import WEIGHTS
    from .vae_folder import load_vae

    folder = find_checkpoint(model)
    if (folder / WEIGHTS).is_file() or "model" not in load_config(folder):
        return load_vae(model), None, 24, ModelConfig.patch
    generator = load(model)
    size = f"{generator.width}x{generator.height}"
    return generator.vae, size, generator.fps, generator.model.config.patch
