"""The commands that encode clips and train on them."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .shared import InputError, bad_input, say


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
    from ..checkpoint import CheckpointError
    from ..runs import light_decoder, run
    from ..runs.inputs import Inputs
    from ..runs.loop import RunOptions, TrainingError
    from ..runs.parallel import Parallel
    from ..training.recipes import LIGHT_RECIPES, RECIPES

    for_light = {"vae": vae, "videos": videos, "perceptual": perceptual}
    for_worlds = {"stage": stage, "latents": latents, "weights": weights, "plan": plan}
    with bad_input():
        known = RECIPES | LIGHT_RECIPES
        if recipe not in known:
            raise ValueError(f"recipe: expected one of {', '.join(known)}, got {recipe!r}")
        for name, value in (for_worlds if recipe in LIGHT_RECIPES else for_light).items():
            if value:
                raise ValueError(f"{name}: not for the recipe {recipe}")
        names = run.stage_names(RECIPES[recipe]()) if recipe in RECIPES else []
        for name in stage or ():
            if name not in names:
                raise ValueError(f"stage: expected one of {', '.join(names)}, got {name!r}")
        if gpus and not plan:
            raise ValueError("gpus: expected --plan with it")
        if plan:
            from ..runs.plan import print_plans

            return print_plans(RECIPES[recipe](), gpus or [8, 256], context)
    folder = out or Path("runs") / recipe
    options = RunOptions(save_every, sample_every or None, clips_at_once, checkpoint_blocks)
    if recipe in LIGHT_RECIPES:
        make = partial(light_decoder.run, LIGHT_RECIPES[recipe](), folder, **for_light)
    else:
        folders: dict[str, list[Path]] = {}
        for given in latents or ():
            name, _, path = given.rpartition("=")
            folders.setdefault(name, []).append(Path(path))
        inputs = Inputs(folders, weights)
        make = partial(run.run, RECIPES[recipe](), folder, stage, inputs=inputs)
    parallel = None
    try:
        parallel = Parallel.from_environment(context or 1)
        report = say if parallel.main else _quiet
        done = make(report=report, parallel=parallel, workers=workers, options=options)
        if parallel.main:
            print(done)
    except (TrainingError, CheckpointError, OSError) as error:
        say(f"aapt: {error}")
        raise typer.Exit(1) from None
    except ValueError as error:  # the folder holds another recipe, clips are missing, ...
        raise InputError(str(error)) from None
    except KeyboardInterrupt:
        say("aapt: interrupted: the same command resumes")
        raise typer.Exit(130) from None
    finally:
        if parallel:
            parallel.close()


def _quiet(line: str) -> None:
    """What a rank says that is not the first."""
