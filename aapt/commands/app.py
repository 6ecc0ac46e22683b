"""The command `aapt`: results on standard output, everything else that is said on standard error.

Exit codes: 0 done, 1 the output could not be finished, 2 bad input, 130 interrupted. Commands
import the modules that import torch when they run, so that `aapt --help` is instant.
"""

import os
import sys
import warnings
from typing import Annotated

import typer

from .. import __version__
from .bench import bench
from .convert import convert
from .encode import encode
from .evaluate import compare, evaluate, evaluate_vae
from .generate import generate
from .info import info
from .plot import plot
from .quantise import quantise
from .serve import serve
from .shared import InputError, Interrupted, OutputError, reason, say
from .streams import discard_unwritten, open_closed_streams
from .train import train
from .vbench import vbench

UsageError = typer.BadParameter.__base__  # wherever this version of typer keeps it
COMPLETION = "_AAPT_COMPLETE"  # set by the shell's script, which `--show-completion` prints

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")


def _spin_briefly() -> None:
    """Let OpenMP threads spin for some microseconds, then sleep, unless the user has decided.

    Threads that spin for long starve a busy machine; threads that sleep at once lose a third of the
    rate on an idle one (docs/streaming.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code; every error is said in one line."""
    _spin_briefly()
    open_closed_streams()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # those are for programmers
        warnings.showwarning = lambda message, *_, **__: say(f"aapt: {message}")
        try:
            code = _run(sys.argv[1:] if arguments is None else arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except UsageError as error:
            hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            say(f"aapt: {error.format_message()}{hint}")
            return 2
        except InputError as error:
            say(f"aapt: {error}")
            return 2
        except BrokenPipeError:  # the reader has seen enough
            return 0
        except OutputError as error:
            say(f"aapt: {error}")
            return 1
        except OSError as error:
            say(f"aapt: {reason(error, 'standard output')}")
            return 1
        except (MemoryError, RuntimeError) as error:
            from ..device import is_out_of_memory  # PyTorch is slow to import

            if not is_out_of_memory(error):
                raise
            say("aapt: out of memory")
            return 1
        except Interrupted as how:
            say(f"aapt: interrupted: {how}")
            return 130
        except (KeyboardInterrupt, typer.Abort):
            say("aapt: interrupted")
            return 130
        finally:
            discard_unwritten()


def _run(arguments: list[str]) -> int:
    """Run the command that the arguments name.

    Typer's own `main` would turn an interruption and a closed pipe into exit codes without a word.
    """
    command = typer.main.get_command(app)
    if os.environ.get(COMPLETION):
        command.main(prog_name="aapt")  # prints what could come next, and exits
    try:
        with command.make_context("aapt", arguments or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    return 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"aapt {__version__}")
        raise typer.Exit


@app.callback(
    help="Real-time interactive video: an image in, a world that follows your controls out."
)
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
):
    """Hold the options of `aapt` itself."""


commands = (generate, serve, info, train, encode, convert, quantise, plot, compare, vbench)
for command in commands:
    app.command()(command)
app.command("eval")(evaluate)
app.command("eval-vae")(evaluate_vae)
