"""What the commands share: options, and how they speak of what went wrong."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

MODEL = "tiny-world"
Model = Annotated[str, typer.Option(metavar="NAME|FOLDER", help="A bundled model or a checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class InputError(Exception):
    """What a command found wrong with its input, beyond what typer checks."""


def missing_extra(error: ModuleNotFoundError) -> InputError:
    """What to say when a package of the extra `serve` is missing."""
    return InputError(
        f"serve: expected FastAPI and uvicorn, {error.name} is missing; pip install 'aapt[serve]'"
    )


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Turn the ValueErrors of what reads the user's input into exit code 2."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


def say(line: str) -> None:
    print(line, file=sys.stderr)


@contextlib.contextmanager
def ctrl_c() -> Iterator[list[int]]:
    """Collect the first Ctrl-C in a list instead of raising at some random place, such as the
    middle of a write; the second raises."""
    seen: list[int] = []

    def handle(number, _):
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def load(model: str, **options):
    with bad_input():
        from ..streaming.generator import StreamingGenerator

        return StreamingGenerator.from_pretrained(model, **options)


def table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def prompt_of(generator, prompt: str | None) -> str:
    """The prompt that the user gave, or the sample of the model."""
    return generator.sample_prompt if prompt is None else prompt


def environment_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of a table for the facts of `environment`."""
    cuda = facts["cuda"]
    devices = [f"{d['name']} (sm_{d['capability'].replace('.', '')})" for d in cuda["devices"]]
    versions = [f"{name} {version or '-'}" for name, version in facts["versions"].items()]
    return [
        ("cpu", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads used"),
        ("cuda", f"{', '.join(devices) or 'no device'}; torch built for {cuda['torch_built_for']}"),
        ("versions", ", ".join(versions)),
        ("commit", facts["commit"] or "not a checkout"),
    ]
