"""`python -m aapt.evaluate CHECKPOINT --out DIR`: the report as a table, JSON and a sheet."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from .evaluation import evaluate


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m aapt.evaluate",
        description="Measures a checkpoint on worlds that no training has seen.",
    )
    parser.add_argument("checkpoint", help="checkpoint folder, or the name of a bundled model")
    parser.add_argument("--baseline", help="another checkpoint, measured on the same starts")
    parser.add_argument("--out", type=Path, required=True, help="folder for report and sheet")
    parser.add_argument("--starts", type=int, default=16, help="worlds (default: 16)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of video (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of worlds and noise (default: 0)")
    given = parser.parse_args(arguments)
    try:
        report = evaluate(
            given.checkpoint,
            given.out,
            baseline=given.baseline,
            starts=given.starts,
            seconds=given.seconds,
            seed=given.seed,
            log=lambda line: print(line, file=sys.stderr),
        )
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    Console().print(report.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
