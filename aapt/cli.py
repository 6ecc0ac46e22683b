"""The command `aapt`. Results go to standard output, everything said about them to standard error.

Exit codes: 0 done, 1 the output could not be finished, 2 bad input, 130 interrupted.
Modules that import torch are imported by the commands that need them: `aapt --help` is instant.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import progress
from rich.console import Console

from .cli_measure import evaluate, evaluate_vae, plot
from .cli_train import encode, train
from .command_line import MODEL, InputError, Json, Model, bad_input, ctrl_c, load, say, table

UsageError = typer.BadParameter.__base__  # wherever this version of typer keeps it
MAX_SEED = 2**63 - 1

app = typer.Typer(
    help="Real-time interactive video: a picture in, a world that follows your controls out.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure speed on this machine.")
app.add_typer(bench, name="bench")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code; whatever the user did wrong is said in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(args=arguments or ["--help"], prog_name="aapt", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        say("aapt: " + " ".join(error.format_message().split()) + hint)
        return 2
    except InputError as error:
        say("aapt: " + " ".join(str(error).split()))
        return 2
    except BrokenPipeError:  # the reader has seen enough; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        say("aapt: interrupted")
        return 130


@app.command()
def generate(
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="FILE.mp4, FILE.gif, a folder for PNG files, or - for raw rgb24.",
        ),
    ],
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="First frame: a PNG or JPEG of any size.", show_default="a sample"
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What the world is.", show_default="the model's first"),
    ] = None,
    controls: Annotated[
        str | None,
        typer.Option(metavar="PRESET|FILE", help="How to move.", show_default="walk"),
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="S", help="Length of the video.")] = 10.0,
    model: Model = MODEL,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=MAX_SEED, help="Same seed, same video.")
    ] = 0,
    scale: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=32,
            help="Enlarge frames this many times (Lanczos).",
            show_default="to at least 320 rows for mp4 and 160 for gif, else 1",
        ),
    ] = None,
):
    """Make a video from a picture, a prompt and a control script.

    The frame count is 1 + 4 * round(seconds * 24 / 4): the first frame and whole steps. Frames are
    written as they are made: Ctrl-C or a full disk leaves a file that plays as far as it got.

    \b
    Presets: walk, still, forward, back, turn-left, turn-right, look-around, circle, zigzag,
    there-and-back. A control script is a text file of '<seconds> <keys>' lines, keys from w a s d
    or - for none, or a JSON list of {"seconds": 1, "yaw": 0.5, "forward": 1}, where yaw > 0 turns
    right. One shorter than the video starts over.

    \b
    Examples:
      aapt generate --out walk.mp4
      aapt generate --image photo.jpg --controls circle --seconds 30 --out circle.mp4
      printf '2 w\\n1 wd\\n2 w\\n' > path.txt && aapt generate --controls path.txt --out path.gif
      aapt generate --seconds 5 --out frames/
      aapt generate --out - | ffplay -f rawvideo -pixel_format rgb24 -video_size 128x80 \\
        -framerate 24 -
    """
    from . import media
    from .controls import load_controls

    with bad_input():
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"seconds: expected a finite number above 0, got {seconds:g}")
        script = load_controls(controls or "walk")
        picture = media.load_image(image) if image else None
        media.output_kind(out)
    generator = load(model)
    step_seconds = generator.frames_per_step / generator.fps
    script = dataclasses.replace(script, step_seconds=step_seconds)
    if generator.driven_by != "camera":
        script = _undriven(generator, controls)
    steps = max(1, round(seconds / step_seconds))

    with bad_input():
        if picture is None:
            picture = media.load_image(generator.sample_image())
        first_frame, note = media.fit_image(picture, generator.height, generator.width)
        if note:
            say(f"{image or 'sample'}: {note}")
        stream = generator.open(first_frame, prompt=_prompt(generator, prompt), seed=seed)
        try:
            writer = media.open_video(out, generator.height, generator.width, generator.fps, scale)
        except OSError as error:
            raise ValueError(f"out: cannot open {out}: {error.strerror}") from None
    _finish(_play(stream, writer, itertools.islice(script, steps), steps))


def _undriven(generator, controls: str | None) -> Iterator:
    """What plays a model without a camera: its prompt alone."""
    with bad_input():
        if generator.driven_by == "channels":
            raise ValueError(
                "model: expected one that a camera or its prompt drives, got one driven by "
                "condition channels, which StreamingGenerator's streams take"
            )
        if controls is not None:
            raise ValueError(f"controls: expected none, the model has no camera, got {controls}")
    return itertools.repeat(generator.still())


@dataclasses.dataclass
class Played:
    """How writing a stream ended."""

    writer: Any
    total_frames: int
    step_seconds: list[float]
    elapsed: float
    interrupted: bool
    error: OSError | None


def _play(stream, writer, controls, steps: int) -> Played:
    """Write the stream's frames as they come, until the end, Ctrl-C or an output that is full."""
    total = len(stream.first_frame) + steps * stream.generator.frames_per_step
    latencies, error = [], None
    started = time.perf_counter()
    with ctrl_c() as interrupted, _progress(total) as show:
        try:
            writer.write(stream.first_frame)
            show(writer.frames, None)
            for control in controls:
                if interrupted:
                    break
                step_started = time.perf_counter()
                frames = stream.step(control)
                latencies.append(time.perf_counter() - step_started)
                writer.write(frames)
                show(writer.frames, latencies[-1])
        except KeyboardInterrupt:  # the second Ctrl-C
            interrupted.append(signal.SIGINT)
        except OSError as problem:
            error = problem
        try:
            writer.close()
        except OSError as problem:
            error = problem
    elapsed = time.perf_counter() - started
    return Played(writer, total, latencies, elapsed, bool(interrupted), error)


def _finish(played: Played) -> None:
    """Say in one line what the output holds, and exit accordingly."""
    writer, total = played.writer, played.total_frames
    if isinstance(played.error, BrokenPipeError):  # the reader has seen enough
        return
    holds = f"{writer.out} holds {writer.frames} of {total} frames"
    if not writer.frames:
        holds = f"nothing was kept of {writer.out}"
    if played.error:
        say(f"aapt: {writer.out}: {played.error.strerror or played.error}: {holds}")
        raise typer.Exit(1)
    if played.interrupted:
        say(f"aapt: interrupted: {holds}")
        raise typer.Exit(130)
    latency = 1e3 * sorted(played.step_seconds)[len(played.step_seconds) // 2]
    say(
        f"{writer.out}: {writer.frames} frames, {writer.frames / writer.fps:.1f} s at "
        f"{writer.fps} fps, {writer.width} x {writer.height}; made at "
        f"{writer.frames / played.elapsed:.0f} fps, {latency:.0f} ms a step"
    )


@contextlib.contextmanager
def _progress(total: int):
    """A bar on a terminal, nothing elsewhere. Yields show(frames, seconds of the last step)."""
    console = Console(stderr=True)
    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("frames"),
        progress.TextColumn("[green]{task.fields[rate]}[/]"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("", total=total, rate="")
        started = time.perf_counter()

        def show(frames: int, latency: float | None) -> None:
            rate = ""
            if latency is not None:
                fps = frames / (time.perf_counter() - started)
                rate = f"{fps:.1f} fps, {1e3 * latency:.0f} ms a step"
            bar.update(task, completed=frames, rate=rate)

        yield show


@app.command()
def info(model: Model = MODEL, as_json: Json = False):
    """Show the model, the backend each op runs on, devices and versions.

    \b
    Examples:
      aapt info
      aapt info --json > environment.json
    """
    from aapt_kernels import backends

    from .environment import environment

    generator = load(model)
    facts = {
        "model": _model_facts(model, generator),
        "ops": [choice._asdict() for choice in backends()],
        **environment(),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    size = facts["model"]
    parameters = {name: f"{count / 1e6:.2f} M" for name, count in size["parameters"].items()}
    table(
        [
            ("model", f"{model}: {size['width']} x {size['height']} at {size['fps']} fps"),
            ("parameters", ", ".join(f"{name} {count}" for name, count in parameters.items())),
            ("step", f"{size['frames_per_step']} frames, {size['tokens_per_step']} tokens"),
            ("window", f"the first and {size['window_frames']} latent frames"),
            ("prompts", "; ".join(size["prompts"])),
        ]
        + [
            (row["op"], f"{row['backend']} on {row['device']}  {row['reason']}".rstrip())
            for row in facts["ops"]
        ]
        + _environment_rows(facts)
    )


@bench.command("stream")
def bench_stream(
    model: Model = MODEL,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Timed steps.")] = 60,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads.", show_default="PyTorch's")
    ] = None,
    as_json: Json = False,
):
    """Time a stream of the model: first frames, steps, frames per second, memory.

    Decoding to pixels is included, encoding to a file is not. 12 untimed steps come first.

    \b
    Examples:
      aapt bench stream
      aapt bench stream --threads 2 --steps 240 --json > result.json
    """
    import torch

    from . import benchmark, media
    from .environment import environment

    if threads:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    generator = load(model)
    load_seconds = time.perf_counter() - started
    picture = media.load_image(generator.sample_image())
    first_frame, _ = media.fit_image(picture, generator.height, generator.width)
    result = benchmark.bench_stream(generator, first_frame, _prompt(generator, None), steps)
    facts = {"model": model, "load_seconds": load_seconds, **result, **environment()}
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    first, step, memory = result["first_frame_ms"], result["step_ms"], result["peak_memory_bytes"]
    rows = [
        ("model", f"{model}: {result['width']} x {result['height']} on {result['device']}"),
        ("first frames", f"{first['cold']:.0f} ms cold, {first['warm']:.0f} ms warm"),
        ("step", f"p50 {step['p50']:.1f} ms, p99 {step['p99']:.1f} ms, max {step['max']:.1f} ms"),
        ("rate", f"{result['fps']:.1f} fps, {result['real_time']:.2f} x real time"),
        ("timed", f"{steps} steps of {result['frames_per_step']} frames, decoding included"),
        ("warm-up", f"{result['warmup_steps']} steps"),
        ("peak memory", f"{memory['process'] / 2**20:.0f} MiB resident"),
    ]
    if memory["cuda"] is not None:
        rows.append(("peak CUDA memory", f"{memory['cuda'] / 2**20:.0f} MiB allocated"))
    table(rows + _environment_rows(facts))


for command in (train, encode, plot):
    app.command()(command)
app.command("eval")(evaluate)
app.command("eval-vae")(evaluate_vae)


def _prompt(generator, prompt: str | None) -> str:
    return generator.sample_prompt if prompt is None else prompt


def _model_facts(name: str, generator) -> dict[str, Any]:
    """What `aapt info` tells about a generator."""
    config = generator.model.config
    rows, columns = config.token_grid(*generator.latent_size)
    parts = {"model": generator.model, "vae": generator.vae}
    return {
        "name": name,
        "parameters": {
            part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()
        },
        "height": generator.height,
        "width": generator.width,
        "fps": generator.fps,
        "frames_per_step": generator.frames_per_step,
        "tokens_per_step": rows * columns,
        "window_frames": config.window((rows, columns)),
        "config": dataclasses.asdict(config),
        "prompts": list(generator.themes),
    }


def _environment_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cuda = facts["cuda"]
    devices = [f"{d['name']} (sm_{d['capability'].replace('.', '')})" for d in cuda["devices"]]
    versions = [f"{name} {version or '-'}" for name, version in facts["versions"].items()]
    return [
        ("cpu", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads used"),
        ("cuda", f"{', '.join(devices) or 'no device'}; torch built for {cuda['torch_built_for']}"),
        ("versions", ", ".join(versions)),
        ("commit", facts["commit"] or "not a checkout"),
    ]


if __name__ == "__main__":
    sys.exit(main())
