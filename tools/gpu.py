"""Builds, tests and measures on a CUDA machine with an sm_90 device: what `make gpu` runs.

    make gpu PART=first         all of it in small, for a quarter of an hour
    make gpu PART=worlds        train the bundled world in larger batches; resumes
    make gpu PART=calibrate     descriptors and fragments on the chip; the chip's own ceilings
    make gpu PART=test          the tests that need the GPU
    make gpu PART=kernels       every microbenchmark against its peers
    make gpu PART=stream        whole steps: the bundled model, and aapt-8b with random weights

    PYTHON=python3 make gpu PART=test     with that interpreter and its PyTorch; needs no network
    OUT=/somewhere make gpu PART=test     results there, not in benchmarks/results
    COMMIT=1a2b3c4 make gpu PART=test     for a copy of the files without their history

Without make: python3 tools/gpu.py --part first --build

A part takes at most 9 minutes. Each case is written to <gpu>/<commit>-<part>.jsonl as it ends; the
page printed last is kept beside it as <commit>-<part>.txt. Further arguments go to pytest; files or
folders among them replace the part's own selection:

    python tools/gpu.py --part kernels benchmarks/bench_kv_append.py -k "24 and heads"
    python tools/gpu.py --part kernels --dry-run     # on a CPU, cases cut down: checks this tool

Exit status: 0 all passed, 1 a case failed, 2 this machine or these arguments will not do.
"""

import argparse
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from math import inf
from pathlib import Path

from gpu_parts import PARTS, Group
from gpu_results import (
    GOOD,
    ROOT,
    Results,
    commit,
    format_figures,
    format_summary,
    function_of,
    machine,
    output_of,
    slug,
)
from gpu_watch import run_group

TEST_MODULES = ("pytest", "pytest_benchmark", "triton", "numpy")
BUILD_MODULES = ("setuptools", "cmake", "ninja")
HINTS = {"pytest_benchmark": "pytest-benchmark", "PIL": "pillow"}  # where pip's name differs


class Refusal(Exception):
    """Why nothing was run, in one line."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    parser.add_argument("--part", default="", help=", ".join(PARTS))
    parser.add_argument("--build", action="store_true", help="install in place first, no network")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, cases cut down")
    parser.add_argument(
        "--out", type=Path, default=results, help="default: $OUT, else benchmarks/results"
    )
    parser.add_argument("--seconds", type=float, help="the part's time, the build included")
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
    if shutil.which("nvcc") is None and "CUDA_HOME" in os.environ:
        # Whatever this process starts finds it too
        os.environ["PATH"] += os.pathsep + str(Path(os.environ["CUDA_HOME"]) / "bin")
    if shutil.which("nvcc") is None:
        raise Refusal("no nvcc on PATH or in CUDA_HOME/bin: the sm_90a kernels cannot be built")
    driver, compiler = cuda_of_driver(), cuda_of_nvcc()
    if driver and compiler and driver < compiler:
        words = f"the driver runs CUDA {driver}, nvcc builds for CUDA {compiler}"
        raise Refusal(f"{words}: use an nvcc of CUDA {driver}, or a newer driver")


def cuda_of_driver() -> int | None:
    """The newest major version of CUDA that the driver runs; None without a driver."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return number.value // 1000


def cuda_of_nvcc() -> int | None:
    """The major version of CUDA that nvcc builds for; None if nvcc is not on PATH."""
    found = re.search(r"release (\d+)", output_of("nvcc", "--version") or "")
    return int(found[1]) if found else None


def build() -> None:
    """Install this checkout in place with this interpreter. Raises Refusal if pip fails.

    Without the simulator: on a GPU nothing runs it, and it is half of the build.
    """
    print("== building the operators in place", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation"]
    command += ["--no-deps", "--no-compile", "-e", str(ROOT)]
    done = subprocess.run(command, env=os.environ | {"AAPT_CUDA": "on", "AAPT_SIM": "off"})
    if done.returncode:
        raise Refusal("the build failed; what pip printed above says why")


def groups_of(options: argparse.Namespace) -> tuple[Group, ...]:
    """The part's groups with all their options; of one that `selection` replaces, only the name."""
    groups = PARTS[options.part].groups
    selection = tuple(options.selection)
    files = tuple(a for a in selection if (ROOT / a.split("::")[0]).exists())
    if files:
        groups = (Group(options.part, ()),)
    mode = "dry" if options.dry_run else "cuda"

    def complete(group: Group) -> Group:
        given = (*group.options, *selection)
        if any(file.startswith("benchmarks") for file in (*group.files, *files)):
            given += (f"--device={mode}", "--benchmark-quiet")
        if not options.dry_run:
            return replace(group, options=given)
        # On a CPU shapes have other names, and deadlines say nothing.
        cases = tuple(dict.fromkeys(map(function_of, group.cases)))
        return replace(group, cases=cases, options=given, seconds=inf, patience=inf)

    return tuple(map(complete, groups))


def run(options: argparse.Namespace, deadline: float) -> int:
    """Run the part until `deadline` (on time.monotonic()) and print its page."""
    part = PARTS[options.part]
    facts = {"part": options.part, "dry_run": options.dry_run}
    facts |= machine("cpu" if options.dry_run else "cuda")
    name = "dry-run" if options.dry_run else slug(facts["device"]["name"])
    # A dry run measures nothing: its file has no place among results.
    folder = options.out or (
        Path(tempfile.mkdtemp(prefix="gpu-")) if options.dry_run else ROOT / "benchmarks/results"
    )
    path = (folder / name / f"{commit()[0]}-{options.part}.jsonl").resolve()
    Results(path, facts)
    print(f"== {options.part}: {part.what}\n   {path}", flush=True)
    for group in groups_of(options):
        print(f"== {group.name}, {deadline - time.monotonic():.0f} s left", flush=True)
        run_group(group, path, deadline)
    return report(Results(path))


def report(results: Results) -> int:
    """Print the page; 1 if a case failed or did not run. All skipped is no success on a GPU."""
    if results.not_run:
        results.note(not_run=results.not_run)
    if figures := format_figures(results.rows):
        print(f"\n== every figure\n{figures}")
    page = f"{format_summary(results)}\n\n{targets(results.path)}"
    results.path.with_suffix(".txt").write_text(page + "\n")
    outcomes = [row["outcome"] for row in results.rows]
    counts = ", ".join(f"{outcomes.count(one)} {one}" for one in dict.fromkeys(outcomes))
    print(f"\n== {results.path}\n{page}\n\n{counts}")
    needed = "skipped" if results.facts.get("dry_run") else "passed"
    good = set(outcomes) <= GOOD and not results.not_run
    if not set(outcomes) & {"passed", needed}:
        print("nothing ran")
        good = False
    return 0 if good else 1


def targets(path: Path) -> str:
    """The figures of a results file beside the targets and the models' assumptions.

    In a process of its own: an error there must not cost the page.
    """
    command = [sys.executable, "-m", "benchmarks.targets", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return f"targets: {done.stderr.strip()[-500:]}"
    return done.stdout.strip()


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
    seconds = options.seconds or (inf if options.dry_run else PARTS[options.part].seconds)
    return run(options, begun + seconds)


def stop(signum, frame):
    """Leave as an error does, so that the process of the running group ends as well."""
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    raise SystemExit(main(sys.argv[1:]))
