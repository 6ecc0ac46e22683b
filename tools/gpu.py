"""Builds, tests and measures on a CUDA machine with an sm_90 device: what `make gpu` runs.

    make gpu PART=calibrate     the simulator against the chip; the chip's own ceilings
    make gpu PART=test          the tests that need the GPU
    make gpu PART=kernels       every microbenchmark against its peers
    make gpu PART=stream        whole steps: the bundled model, and aapt-8b with random weights

    PYTHON=python3 make gpu PART=test     with that interpreter and its PyTorch; needs no network
    OUT=/somewhere make gpu PART=test     results there, not in benchmarks/results
    COMMIT=1a2b3c4 make gpu PART=test     for a copy of the files without their history

Each part takes less than 8 minutes and writes one file, <gpu>/<commit>-<part>.json, case by case.
Further arguments go to pytest; files or folders among them replace the part's own selection:

    python tools/gpu.py --part kernels benchmarks/bench_kv_append.py -k "24 heads"
    python tools/gpu.py --part kernels --dry-run     # on a CPU, cases cut down: checks this tool

Exit status: 0 all passed, 1 a case failed, 2 this machine or these arguments will not do.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from gpu_results import ROOT, Results, commit, format_table, machine, slug
from gpu_watch import run_cases

SECONDS = 450.0  # of one part, the build included
TEST_MODULES = ("pytest", "pytest_benchmark", "triton", "numpy")
BUILD_MODULES = ("setuptools", "cmake", "ninja", "pybind11")
HINTS = {"pytest_benchmark": "pytest-benchmark"}  # where pip's name differs


@dataclass(frozen=True)
class Part:
    what: str
    selection: tuple[str, ...]  # what pytest is told
    modules: tuple[str, ...] = ()  # besides TEST_MODULES
    benchmark: bool = True  # takes --device


PARTS = {
    "calibrate": Part(
        "the simulator against the chip; the chip's own ceilings",
        ("benchmarks/bench_machine.py", "benchmarks/bench_calibration.py"),
    ),
    "test": Part(
        "the tests that need the GPU",
        ("tests/kernels", "-k", "(cuda or sm90 or triton) and not [sim and not -sim"),
        benchmark=False,
    ),
    "kernels": Part(
        "every microbenchmark against its peers",
        (
            "benchmarks/bench_cached_attention.py",
            "benchmarks/bench_kv_append.py",
            "benchmarks/bench_qk_norm_rope.py",
            "benchmarks/bench_vae_decoder.py",
        ),
    ),
    "stream": Part(
        "whole steps: the bundled model, and aapt-8b with random weights",
        ("benchmarks/bench_stream.py",),
        modules=("einops", "safetensors", "nvtx", "PIL"),
    ),
}


class Refusal(Exception):
    """Why nothing was run, in one line."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", default="", help=", ".join(PARTS))
    parser.add_argument("--build", action="store_true", help="install in place first, no network")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, cases cut down")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the part's time")
    options, options.selection = parser.parse_known_args(arguments)
    return options


def check(options: argparse.Namespace) -> None:
    """Raise Refusal if this cannot run here."""
    if options.part not in PARTS:
        raise Refusal(f"PART: expected one of {', '.join(PARTS)}, got {options.part!r}")
    missing = [name for name in ("torch", *TEST_MODULES, *PARTS[options.part].modules)]
    missing += BUILD_MODULES if options.build else ()
    missing = [HINTS.get(name, name) for name in missing if find_spec(name) is None]
    if missing:
        raise Refusal(f"{sys.executable} lacks {', '.join(missing)}: install them with its pip")
    if options.build and int(version("setuptools").split(".")[0]) < 77:
        raise Refusal(f"expected setuptools 77 or newer, got {version('setuptools')}")
    if options.dry_run:
        return
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        raise Refusal(f"expected PyTorch 2.11 or newer, got {torch.__version__}")
    if not torch.cuda.is_available():
        raise Refusal(f"no CUDA device that PyTorch {torch.__version__} can use")
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        given = f"{torch.cuda.get_device_name()} with {capability}"
        raise Refusal(f"expected a device with compute capability 9.0, got {given}")
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        raise Refusal("no nvcc on PATH or in CUDA_HOME: the sm_90a kernels cannot be built")


def build() -> None:
    """Install this checkout in place with this interpreter. Raises Refusal where pip fails."""
    print("== building the operators in place", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation"]
    command += ["--no-deps", "--no-compile", "-e", str(ROOT)]
    done = subprocess.run(command, env=os.environ | {"AAPT_CUDA": "on"})
    if done.returncode:
        raise Refusal("the build failed; what pip printed above says why")


def run(options: argparse.Namespace, seconds: float) -> int:
    part = PARTS[options.part]
    facts = {"part": options.part, "dry_run": options.dry_run}
    facts |= machine("cpu" if options.dry_run else "cuda")
    name = "dry-run" if options.dry_run else slug(facts["device"]["name"])
    # A dry run measures nothing: its file has no place among results.
    folder = options.out or (
        Path(tempfile.mkdtemp(prefix="gpu-")) if options.dry_run else ROOT / "benchmarks/results"
    )
    path = (folder / name / f"{commit()[0]}-{options.part}.json").resolve()
    Results(path, facts)
    selection = list(options.selection)
    if not any((ROOT / argument.split("::")[0]).exists() for argument in selection):
        selection = [*part.selection, *selection]  # only options, such as -k
    if part.benchmark:
        selection += [f"--device={'dry' if options.dry_run else 'cuda'}", "--benchmark-quiet"]
    print(f"== {options.part}: {part.what}\n   {path}", flush=True)
    run_cases(["-q", "--no-header", *selection], path, seconds)
    return report(Results(path))


def report(results: Results) -> int:
    """Print the table; 1 if a case failed or did not run. All skipped is no success on a GPU."""
    print(f"\n== {results.path}\n{format_table(results.rows)}")
    outcomes = [row["outcome"] for row in results.rows]
    print("\n" + ", ".join(f"{outcomes.count(one)} {one}" for one in dict.fromkeys(outcomes)))
    if results.not_run:
        print(f"{len(results.not_run)} not run: out of time")
        results.note(not_run=results.not_run)
    needed = "skipped" if results.content.get("dry_run") else "passed"
    good = set(outcomes) <= {"passed", "skipped"} and not results.not_run
    if not set(outcomes) & {"passed", needed}:
        print("nothing ran")
        good = False
    return 0 if good else 1


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not options.part:
        print(__doc__.strip())
        return 0
    begun = time.monotonic()
    try:
        check(options)
        if options.build:
            build()
    except Refusal as refusal:
        print(f"make gpu: {refusal}", file=sys.stderr)
        return 2
    return run(options, options.seconds - (time.monotonic() - begun))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
