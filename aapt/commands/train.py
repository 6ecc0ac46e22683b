"""`aapt train`: train a model by a recipe."""

import shlex
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .shared import (
    MAX_GPUS,
    MAX_THREADS,
    RESUMES,
    InputError,
    Interrupted,
    OutputError,
    bad_input,
    check_inputs,
    check_out_folder,
    printed_at_once,
    reason,
    say,
)

LESS_MEMORY = f"{RESUMES}, and takes less with --clips-at-once 1 or --checkpoint-blocks"


def train(
    recipe: Annotated[
        str, typer.Argument(help="A named recipe, such as tiny-world, or a TOML file.")
    ],
    stage: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this stage; may be repeated.", show_default="all"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a number of the recipe, as in a file; may be repeated.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The folder for results.", show_default="runs/RECIPE"),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=MAX_THREADS, help="Processes that render training clips."
        ),
    ] = 2,
    latents: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SET=]FOLDER",
            help="Clips of `aapt encode`, for recipes of real data; may be repeated.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="Weights of the first stage: a file, or a folder of `aapt convert`.",
            show_default="random weights",
        ),
    ] = None,
    discriminator_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="Weights of the first discriminator, for wan-1.3b-one-step.",
            show_default="--weights",
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER",
            help="The autoencoder of sharp-world, a pilot, small-world or a light decoder: a "
            "bundled model, a checkpoint, or diffusers' Wan.",
            show_default="tiny-world; sharp-world, pilot-160-fine and wan-light need one",
        ),
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Training videos of a light decoder.",
            show_default="procedural clips for vae-light; wan-light needs them",
        ),
    ] = None,
    perceptual: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A TorchScript network for a perceptual loss of a light decoder, as for LPIPS.",
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
            metavar="N", min=1, help="Clips of a rank per forward pass.", show_default="all"
        ),
    ] = None,
    checkpoint_blocks: Annotated[
        bool, typer.Option("--checkpoint-blocks", help="Save memory: compute activations twice.")
    ] = False,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SWITCH",
            help="Save memory: offload, eight-bit, lora[=RANK], discriminator-lora[=RANK] or "
            "frozen-trunk; may be repeated.",
            show_default="none",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Make two updates per phase, keep nothing, and say how long all updates take.",
        ),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Train nothing; print the H100 GPUs that training needs, and the commands.",
        ),
    ] = False,
    gpus: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MAX_GPUS,
            help="For --plan; may be repeated.",
            show_default="8 and 256",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MAX_GPUS,
            help="GPUs that share a clip's tokens.",
            show_default="1; for --plan as few as fit",
        ),
    ] = None,
):
    """Train a model by a recipe, stage after stage.

    After an interruption the same command resumes: a finished stage is not run again, and a stage
    that was stopped continues from its last saved state, bit for bit. Each stage's folder gets
    metrics.jsonl and sheets of samples. Under torchrun all ranks train together. The last line
    printed is the checkpoint's folder, for --model. inputs.json records --latents and --weights; a
    run cannot be resumed with others.

    A recipe of your own is a file, NAME.toml, with `base`, the recipe that it changes, and a table
    for each part that differs, such as [stages.adversarial]. --set changes one number more.

    --memory changes every stage, and so the result: parameters and optimizer on the CPU, moments of
    the optimizer in 8 bits, low-rank adaptations of the generator or the discriminator, or a
    discriminator whose heads alone learn. --plan says what each switch saves.

    The recipes vae-light and wan-light train a light decoder for an existing autoencoder. Their
    checkpoint is that of --vae with the new decoder. The recipe vae-fine makes an autoencoder
    alone. Pilots train generators of other shapes for about an hour each, to compare them.

    \b
    Examples:
      aapt train tiny-world
      aapt train tiny-world --stage adversarial --out runs/second
      aapt train tiny-world --sample-every 100 && aapt plot runs/tiny-world/diffusion --out d.png
      aapt train tiny-world --dry-run
      aapt train --plan paper-8b --gpus 256
      aapt train --plan paper-8b-640 --gpus 8 --memory eight-bit --memory lora=64
      aapt train foxes.toml --set stages.adversarial.steps=800 --latents clips/ --weights wan-start
      torchrun --nproc-per-node 8 -m aapt train paper-8b-640 --checkpoint-blocks --context 8 \\
        --clips-at-once 1 --latents clips/ --weights b.safetensors
      aapt train vae-light && aapt eval-vae runs/vae-light/vae-light
      aapt train vae-fine && aapt eval-vae runs/vae-fine/vae-fine
      aapt train sharp-world --vae runs/vae-fine/vae-fine
      aapt train pilot-160-fine --vae runs/vae-fine/vae-fine
      aapt train wan-light --vae Wan2.1/vae --videos videos/ --perceptual vgg16.pt
      aapt generate --model runs/tiny-world/tiny-world --out walk.mp4
    """
    from ..checkpoint import CheckpointError
    from ..device import is_out_of_memory
    from ..runs import autoencoder, light_decoder, run
    from ..runs.dry_run import dry_run as try_stages
    from ..runs.inputs import Inputs
    from ..runs.loop import RunOptions, TrainingError
    from ..runs.parallel import Parallel
    from ..runs.stage_order import check_stages
    from ..training.recipe import LightRecipe, Recipe, VAERecipe
    from ..training.recipe_file import load_recipe
    from ..training.savings import with_switches

    for_light = {"videos": videos, "perceptual": perceptual}
    for_worlds = {"stage": stage, "latents": latents, "weights": weights, "plan": plan}
    for_worlds |= {"discriminator_weights": discriminator_weights}
    for_worlds |= {"memory": memory, "dry_run": dry_run, "checkpoint_blocks": checkpoint_blocks}
    with bad_input():
        made = load_recipe(recipe, settings or ())
        light, world = isinstance(made, LightRecipe), isinstance(made, Recipe)
        refused = {} if light else dict(for_light)
        refused |= {} if world else for_worlds
        refused |= {"vae": vae} if isinstance(made, VAERecipe) else {}
        for name, value in refused.items():
            if value:
                raise ValueError(f"{name}: expected none for the recipe {made.name}, got {value}")
        made = with_switches(made, memory or ()) if world else made
        if world:
            check_stages(made, stage or ())
        if dry_run and plan:
            raise ValueError("dry_run: expected none with --plan, which trains nothing")
        if dry_run and stage:
            raise ValueError("stage: expected none with --dry-run, which tries every stage")
        if plan:
            given = dict(stage=stage, out=out, latents=latents, weights=weights)
            given |= dict(discriminator_weights=discriminator_weights, vae=vae, videos=videos)
            for name in (name for name, value in given.items() if value):
                raise ValueError(f"{name}: expected none with --plan, which trains nothing")
        if gpus and not plan:
            raise ValueError("gpus: expected with --plan only; add --plan")
        if plan:
            from ..runs.plan_table import print_plans

            given = [f"--set={setting}" for setting in settings or ()]
            given += [f"--memory={switch}" for switch in memory or ()]
            words = shlex.join([recipe, *given])
            with printed_at_once():
                refused = print_plans(made, gpus or [8, 256], context, words)
            if refused:
                raise ValueError("; ".join(refused))
            return
        folder = out or Path("runs") / made.name
        folders = folders_by_set(latents or (), made.stages.values() if world else ())
        for path in (path for paths in folders.values() for path in paths):
            check_inputs(latents=path)
        check_inputs(weights=weights, discriminator_weights=discriminator_weights)
        check_inputs(vae=vae, videos=videos, perceptual=perceptual)
        check_out_folder(folder)
    options = RunOptions(save_every, sample_every or None, clips_at_once, checkpoint_blocks)
    if world:
        inputs = Inputs(folders, weights, discriminator_weights, vae)
        make = partial(run.run, made, folder, stage, inputs=inputs)
        if dry_run:
            make = partial(try_stages, made, folder, inputs=inputs)
    elif light:
        make = partial(light_decoder.run, made, folder, vae=vae, **for_light)
    else:
        make = partial(autoencoder.run, made, folder)
    parallel = None
    try:
        parallel = Parallel.from_environment(context or 1)
        report = say if parallel.main else _quiet
        done = make(report=report, parallel=parallel, workers=workers, options=options)
        if parallel.main and done:
            print(done)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(reason(error)) from None
    except (TrainingError, CheckpointError) as error:
        full = error.__cause__ is not None and is_out_of_memory(error.__cause__)
        raise OutputError(f"{error}; {LESS_MEMORY}" if full else str(error)) from None
    except ValueError as error:  # the folder holds another recipe, clips are missing, ...
        raise InputError(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutputError(f"out of memory; {LESS_MEMORY}") from None
    except KeyboardInterrupt:
        raise Interrupted("nothing was kept" if dry_run else RESUMES) from None
    finally:
        if parallel:
            parallel.close()


def folders_by_set(latents: Iterable[str], stages: Iterable) -> dict[str, list[Path]]:
    """Sort what --latents was given by set of the stages; a path may hold "=" itself."""
    from ..runs.inputs import ANY_SET

    sets = {name for stage in stages for name in stage.needs}
    folders: dict[str, list[Path]] = {}
    for given in latents:
        name, _, path = given.partition("=")
        name, path = (name, path) if name in sets else (ANY_SET, given)
        folders.setdefault(name, []).append(Path(path))
    return folders


def _quiet(line: str) -> None:
    """Drop a line of a rank that is not the first."""
