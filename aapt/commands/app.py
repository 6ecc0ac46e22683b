"""The command `aapt`. Results go to standard output, everything said about them to standard error.

Exit codes: 0 done, 1 the output could not be finished, 2 bad input, 130 interrupted.
Modules that import torch are imported by the commands that need them: `aapt --help` is instant.
"""

import os
import sys

import typer

from .bench import bench
from .encode import encode
from .evaluate import evaluate, evaluate_vae
from .generate import generate
from .info import info
from .plot import plot
from .serve import serve
from .shared import InputError, say
from .train import train

UsageError = typer.BadParameter.__base__  # wherever this version of typer keeps it

app = typer.Typer(
    help="Real-time interactive video: a picture in, a world that follows your controls out.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
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


for command in (generate, serve, info, train, encode, plot):
    app.command()(command)
app.command("eval")(evaluate)
app.command("eval-vae")(evaluate_vae)
