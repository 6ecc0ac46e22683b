"""The part that commands share: options, the checks of paths, and how errors are said."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..placement import DTYPES, placement

MODEL = "tiny-world"
RESUMES = "the same command resumes"
MAX_SEED = 2**63 - 1
MAX_SECONDS = 10_000_000  # four months of video
MAX_THREADS = 4096
MAX_GPUS = 1_000_000
Model = Annotated[str, typer.Option(metavar="NAME|FOLDER", help="A bundled model or a checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N.", show_default="cpu"),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Precision of the networks: {', '.join(DTYPES)}.",
        show_default="bfloat16 on CUDA, else float32",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(metavar="WxH", help="Size of the video.", show_default="the model's"),
]
TextDevice = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="Where UMT5 stays, if the model reads it.",
        show_default="the model's device, left after each new prompt",
    ),
]
CACHE_OPTION = typer.Option(
    metavar="NAME",
    help="Precision of keys and values: model, float8 or float8-past.",
    show_default="model",
)
Cache = Annotated[str, CACHE_OPTION]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, max=MAX_THREADS, help="CPU threads.", show_default="PyTorch's"
    ),
]


class InputError(Exception):
    """Says what is wrong with the user's input, beyond the checks of typer: exit code 2."""


class OutputError(Exception):
    """Says why the output could not be finished: exit code 1."""


class Interrupted(Exception):
    """Says what Ctrl-C has left: exit code 130."""


def missing_extra(error: ModuleNotFoundError) -> InputError:
    """Return the error for a missing package of the extra `serve`, or of `browser`."""
    if error.name and error.name.startswith("playwright"):
        return InputError(
            "browser: expected Playwright, which is missing; pip install 'aapt[browser]'"
        )
    return InputError(
        f"serve: expected FastAPI and uvicorn, {error.name} is missing; pip install 'aapt[serve]'"
    )


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Turn every error of reading the user's input into an InputError."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise InputError(str(error)) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(reason(error)) from None


def reason(error: OSError, place: str = "") -> str:
    """Return an error of the system as `path: reason`; `place` is named if it has no path."""
    name = error.filename if error.filename is not None else place
    said = error.strerror or str(error)
    return f"{os.fsdecode(name)}: {said}" if name and error.strerror else said


def say(line: str) -> None:
    """Write one line to standard error; if nobody can read it, the work continues."""
    with contextlib.suppress(OSError):
        print(" ".join(map(str.strip, line.splitlines())), file=sys.stderr)


@contextlib.contextmanager
def ctrl_c() -> Iterator[list[int]]:
    """Collect the first Ctrl-C in a list; the second raises KeyboardInterrupt.

    The first cannot then stop a write in its middle.
    """
    seen: list[int] = []

    def handle(number, _):
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def printed_at_once() -> Iterator[None]:
    """Collect what rich prints, and print it at the end.

    If the reader of standard output has left, rich exits with code 1; print raises.
    """
    terminal = sys.stdout is not None and sys.stdout.isatty()
    collected = io.StringIO()
    collected.isatty = lambda: terminal  # type: ignore[method-assign]
    with contextlib.redirect_stdout(collected):
        yield
    print(collected.getvalue(), end="")


def check_seconds(name: str, seconds: float) -> None:
    """Raise ValueError unless a length of time is above 0 and at most MAX_SECONDS."""
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {seconds:g}")
    if seconds > MAX_SECONDS:
        raise ValueError(f"{name}: expected at most {MAX_SECONDS:g}, got {seconds:g}")


def check_inputs(**paths: str | Path | None) -> None:
    """Raise ValueError for a path that the system refuses, such as one in a locked folder.

    A path that does not exist passes: the code that reads it says what it should be.
    """
    for name, path in paths.items():
        if path is None:
            continue
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"{name}: cannot read {path}: {error.strerror}") from None
        if not os.access(path, os.R_OK):
            raise ValueError(f"{name}: cannot read {path}: Permission denied")


def check_out_folder(folder: Path) -> None:
    """Raise ValueError unless a folder can be made, or written in, at this path."""
    problem = None
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            os.stat(place)
        except FileNotFoundError:
            continue
        except OSError as error:
            problem = error.strerror
        else:
            if not place.is_dir():
                problem = f"{place} is a file"
            elif not os.access(place, os.W_OK | os.X_OK):
                problem = "Permission denied"
        break
    if problem:
        raise ValueError(f"out: expected a folder that can be written, got {folder}: {problem}")


def load(
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    size: str | None = None,
    **options: Any,
):
    """Load a StreamingGenerator; InputError if the checkpoint, the device, the precision, the size
    or the cache cannot be used.

    options: further ones of `StreamingGenerator.from_pretrained`.
    """
    with bad_input():
        from ..streaming.generator import StreamingGenerator

        options |= placement(device, dtype, size)
        return StreamingGenerator.from_pretrained(model, **options)


def table(rows: list[tuple[str, str]]) -> None:
    """Print rows of (name, value), the values in one column."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def prompt_of(generator, prompt: str | None) -> str:
    """Return the user's prompt, or the model's sample if there is none."""
    return generator.sample_prompt if prompt is None else prompt


def environment_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows of a table for the facts of `environment`."""
    cuda = facts["cuda"]
    devices = [f"{d['name']} (sm_{d['capability'].replace('.', '')})" for d in cuda["devices"]]
    versions = [f"{name} {version or '-'}" for name, version in facts["versions"].items()]
    return [
        ("cpu", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads used"),
        ("cuda", f"{', '.join(devices) or 'no device'}; torch built for {cuda['torch_built_for']}"),
        ("versions", ", ".join(versions)),
        ("commit", facts["commit"] or "not a checkout"),
    ]
