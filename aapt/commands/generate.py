"""`aapt generate`: make a video from an image, a prompt and a control script."""

import contextlib
import dataclasses
import itertools
import signal
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import progress
from rich.console import Console

from .shared import (
    CACHE_OPTION,
    MAX_SEED,
    MODEL,
    Device,
    Dtype,
    InputError,
    Interrupted,
    Model,
    OutputError,
    Size,
    TextDevice,
    bad_input,
    check_seconds,
    ctrl_c,
    load,
    prompt_of,
    say,
)


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
            metavar="FILE",
            help="First frame: a PNG, JPEG, ..., cropped to fit.",
            show_default="a sample, or none for a model that needs none",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The world in words.", show_default="the model's first"),
    ] = None,
    controls: Annotated[
        str | None,
        typer.Option(metavar="PRESET|FILE", help="How to move.", show_default="walk"),
    ] = None,
    pose: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET|FILE",
            help="How a figure moves, for a model that follows poses.",
            show_default="show",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="Length of the video.", show_default="10"),
    ] = None,
    model: Model = MODEL,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            max=MAX_SEED,
            help="Same seed, same video, on the same machine with the same number of threads.",
            show_default="0",
        ),
    ] = None,
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
    replay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Make the video of an action log of aapt serve."),
    ] = None,
    branch: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Branch of the log.", show_default="the last"),
    ] = None,
    original: Annotated[
        bool, typer.Option("--original", help="With --replay: decode with the original decoder.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    size: Size = None,
    cache: Annotated[str | None, CACHE_OPTION] = None,
    text_device: TextDevice = None,
):
    """Make a video from an image, a prompt and a control script.

    The frame count is 1 + 4 * round(seconds * 24 / 4): the first frame and whole steps. A few-step
    model starts from its prompt alone unless --image is given, and makes chunks. Frames are
    written as they are made: after Ctrl-C or on a full disk the file plays as far as it got. A
    prompt that is longer than the model reads is cut, and the command says where.

    --replay takes first frame and its size, prompts, controls, length, seed and cache from an
    action log of aapt serve. With the same build, device, precision and number of threads the
    video is the one that was played, bit for bit; the command names the first step that differs.
    The log of a model other than tiny-world needs --model.

    \b
    Presets: walk, still, forward, back, turn-left, turn-right, look-around, circle, zigzag,
    there-and-back. A control script is a text file of '<seconds> <keys>' lines, keys from w a s d
    or - for none, or a JSON list of {"seconds": 1, "yaw": 0.5, "forward": 1}, where yaw > 0 turns
    right. A script that is shorter than the video is repeated.

    \b
    Poses, for a model such as tiny-puppet: show, still, walk, wave, dance, jump, reach, or a JSON
    file {"fps": 24, "keypoints": [[[x, y], ...], ...]}. Each video frame has 14 points: head, neck,
    then shoulder, elbow and wrist of the right arm and of the left, then hip, knee and ankle of the
    right leg and of the left. x and y are shares of the image's width and height from the top left
    corner; null is a hidden point. Poses that are shorter than the video are played
    forwards and backwards in turn.

    \b
    Examples:
      aapt generate --out walk.mp4
      aapt generate --image photo.jpg --controls circle --seconds 30 --out circle.mp4
      printf '2 w\\n1 wd\\n2 w\\n' > path.txt && aapt generate --controls path.txt --out path.gif
      aapt generate --seconds 5 --out frames/
      aapt generate --model runs/mine/mine --device cuda --size 736x416 --out large.mp4
      aapt generate --model tiny-puppet --pose dance --out dance.mp4
      aapt generate --replay walk.jsonl --original --out walk.mp4
      aapt generate --out - | ffplay -f rawvideo -pixel_format rgb24 -video_size 128x80 \\
        -framerate 24 -
    """
    from ..media.image import fit_image, load_image
    from ..media.video import open_video, output_kind
    from ..streaming.controls import load_controls
    from ..streaming.poses import load_poses

    if replay or original or branch is not None:
        given = {"image": image, "prompt": prompt, "controls": controls}
        given |= {"pose": pose, "seconds": seconds, "seed": seed, "size": size}
        place = device, dtype, cache, text_device
        _replay(replay, branch, original, given, model, place, out, scale)
        return
    seconds = 10.0 if seconds is None else seconds
    with bad_input():
        check_seconds("seconds", seconds)
        script, poses = load_controls(controls or "walk"), load_poses(pose or "show")
        start = load_image(image) if image else None
        output_kind(out)
    options = {"text_device": text_device, "cache": cache or "model"}
    generator = load(model, device, dtype, size, **options)
    step_seconds = generator.frames_per_step / generator.fps
    script = dataclasses.replace(script, step_seconds=step_seconds)
    if not generator.poses:
        poses = _no_poses(pose)
    if generator.driven_by != "camera":
        script = _undriven(generator, controls, poses)
    steps = max(1, round(seconds / step_seconds))

    with bad_input():
        first_frame = None
        if start is None and not generator.few_step:
            start = load_image(generator.sample_image())
        if start is not None:
            first_frame, note = fit_image(start, generator.height, generator.width)
            if note:
                say(f"{image or 'sample'}: {note}")
        first = poses and poses.first
        stream = _open(generator, first_frame, prompt_of(generator, prompt), seed or 0, first)
        try:
            writer = open_video(out, generator.height, generator.width, generator.fps, scale)
        except OSError as error:
            raise ValueError(f"out: cannot open {out}: {error.strerror}") from None
    _finish(_play(stream, writer, itertools.islice(script, steps), steps))


def _replay(
    log: Path | None,
    branch: int | None,
    original: bool,
    given: dict[str, Any],
    model: str,
    place: tuple[str | None, ...],
    out: str,
    scale: int | None,
) -> None:
    """Write the video of an action log, and say where it differs from what was played.

    place: device, precision, cache and the text encoder's device, each None for the default; that
    of the cache is the log's.
    """
    from ..checkpoint import find_checkpoint, load_config
    from ..media.video import open_video, output_kind
    from ..model.caches import check_same
    from ..streaming.actions import Replay, model_digest, read_walk
    from ..vae.folder import LIGHT, ORIGINAL

    with bad_input():
        if log is None:
            raise ValueError("replay: expected an action log, got none; pass --replay FILE")
        for name in (name for name, value in given.items() if value is not None):
            raise ValueError(f"{name}: expected none with --replay, the action log has its own")
        output_kind(out)
        walk, folder = read_walk(log), find_checkpoint(model)
        digest = model_digest(folder)
        if walk.digest != digest:
            raise ValueError(
                f"replay: expected a walk of {model} {digest[:12]}, got one of {walk.model} "
                f"{walk.digest[:12]}; pass --model {walk.model}, or its folder"
            )
        if original and ORIGINAL not in load_config(folder):
            raise ValueError(f"original: expected a model with two decoders, {model} has one")
        device, dtype, cache, text_device = place
        check_same("replay", walk.cache, cache or walk.cache, "leave --cache away")
        branch = len(walk.branches) - 1 if branch is None else branch
        walk.check(branch, 0)
    drawn = walk.size if walk.first_frame is None else walk.first_frame.shape[:2]
    size = drawn and f"{drawn[1]}x{drawn[0]}"
    options = {"decoder": ORIGINAL if original else LIGHT, "cache": walk.cache}
    options["text_device"] = text_device
    generator = load(model, device, dtype, size, **options)
    path = walk.path(branch, walk.branches[branch].end)
    with bad_input():
        stream = Replay(generator, walk)
        try:
            writer = open_video(out, generator.height, generator.width, generator.fps, scale)
        except OSError as error:
            raise ValueError(f"out: cannot open {out}: {error.strerror}") from None
    played = _play(stream, writer, path, len(path))
    stream.close()
    if not original:
        say(f"{log}: {_compared(stream.differing, stream.shared, len(played.step_seconds))}")
    _finish(played)


def _compared(differing: list[int], shared: int | None, steps: int) -> str:
    compared, said = steps if shared is None else shared - 1, []
    if differing:
        said.append(
            f"step {differing[0]} differs from what was played, the first of {len(differing)}: "
            "it was made with another build, device, precision or number of threads"
        )
    elif compared or shared is None:
        said.append(f"{compared} steps, each bit for bit as it was played")
    if shared is not None:
        said.append(
            f"steps {shared} to {steps} are near what was played and not compared, because step "
            f"{shared} was made in one pass with other streams (aapt serve --batch)"
        )
    return "; ".join(said)


def _open(generator, first_frame, prompt: str, seed: int, pose):
    """Open a stream, and say if only a part of the prompt is read."""
    with bad_input():
        cut = generator.model.text_encoder.cut(prompt)
    if cut:
        say(f"aapt: {cut}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="prompt: ")  # already said
        with bad_input():
            return generator.open(first_frame, prompt=prompt, seed=seed, pose=pose)


def _no_poses(pose: str | None) -> None:
    """Raise InputError if poses were given for a model that follows none."""
    if pose is not None:
        with bad_input():
            raise ValueError(
                f"pose: expected none for a model that follows no poses, got {pose}; pass --model "
                "of one that does, such as tiny-puppet"
            )


def _undriven(generator, controls: str | None, poses) -> Iterator:
    """Return the controls of a model without a camera: poses, or none if its prompt alone drives
    it."""
    with bad_input():
        if poses is None and generator.driven_by == "channels":
            raise ValueError(
                "model: expected one that a camera or its prompt drives, got one driven by "
                "condition channels; use StreamingGenerator in Python"
            )
        if controls is not None:
            raise ValueError(f"controls: expected none for a model without camera, got {controls}")
    if poses is not None:
        return poses.steps(generator.fps, generator.frames_per_step)
    return itertools.repeat(generator.still())


@dataclasses.dataclass
class Played:
    """Says how writing a stream ended.

    Attributes:
        total_frames: Video frames that were asked for.
        step_seconds: Latency of each step.
        elapsed: Seconds from the first frame to the closed output.
        error: The error that stopped it, if any: of the output, or what a float8 cache loses.
    """

    writer: Any
    total_frames: int
    step_seconds: list[float]
    elapsed: float
    interrupted: bool
    error: Exception | None


def _play(stream, writer, controls, steps: int) -> Played:
    """Write frames as they are made, until the end, Ctrl-C or an output that is full."""
    total = stream.generator.video_frames(steps, picture=len(stream.first_frame) > 0)
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
        except (OSError, ValueError) as problem:  # a full disk, a log of another model's steps
            error = problem
        try:
            writer.close()
        except OSError as problem:
            error = problem
    elapsed = time.perf_counter() - started
    return Played(writer, total, latencies, elapsed, bool(interrupted), error)


def _finish(played: Played) -> None:
    """Say in one line what the output holds. OutputError or Interrupted if it was stopped."""
    writer, total = played.writer, played.total_frames
    if isinstance(played.error, BrokenPipeError):  # the reader has seen enough
        return
    holds = f"{writer.out} holds {writer.frames} of {total} frames"
    if not writer.frames:
        holds = f"nothing was kept of {writer.out}"
    if isinstance(played.error, ValueError):
        raise InputError(f"{played.error}: {holds}")
    if played.error:
        raise OutputError(f"{writer.out}: {played.error.strerror or played.error}: {holds}")
    if played.interrupted:
        raise Interrupted(holds)
    latency = 1e3 * statistics.median(played.step_seconds or [0.0])
    say(
        f"{writer.out}: {writer.frames} frames, {writer.frames / writer.fps:.1f} s at "
        f"{writer.fps} fps, {writer.width} x {writer.height}; made at "
        f"{writer.frames / played.elapsed:.0f} fps, {latency:.0f} ms a step"
    )


@contextlib.contextmanager
def _progress(total: int):
    """Show a bar if standard error is a terminal.

    Yields show(frames, seconds of the last step).
    """
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
