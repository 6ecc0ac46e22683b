"""Build the wheels of a release into dist/, and check what is in them.

    python tools/wheels.py pure x86_64 aarch64

`pure` has no compiled kernels and serves every platform. `x86_64` and `aarch64` have those for
sm_90a; aarch64 is cross-compiled (Debian's g++-aarch64-linux-gnu). Needs pip, and for the compiled
ones nvcc, auditwheel, patchelf and wheel.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import cubin

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
GLIBC = (2, 34)
TORCH = ("libtorch.so", "libtorch_cpu.so")
SYSTEM = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2")
SYSTEM += ("ld-linux-aarch64.so.1", "libdl.so.2", "libpthread.so.0", "librt.so.1")
MACHINES = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}
CROSS = "aarch64-linux-gnu-g++"


class WheelError(RuntimeError):
    """A wheel that cannot be built or is not what it should be; the message says why."""


def build(kind: str, dist: Path = DIST, namespace: str = "aapt") -> Path:
    """Builds one wheel, checks it and returns its path. WheelError if it is not as it should be.

    namespace: of the compiled operators.
    """
    dist.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="aapt-wheel-") as folder:
        work = Path(folder)
        environment = {"AAPT_BUILD": f"wheel-{kind}", **os.environ}
        environment["AAPT_CUDA"] = "off" if kind == "pure" else "on"
        arguments = [f"-DAAPT_NAMESPACE={namespace}"]
        if kind == "aarch64":
            stubs = work / "aarch64"
            make_stubs(stubs)
            environment |= {"AAPT_AARCH64": str(stubs), "_PYTHON_HOST_PLATFORM": "linux-aarch64"}
            arguments += [f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'tools' / 'aarch64.cmake'}"]
            arguments += [f"-DAAPT_TORCH_LIB={stubs}"]
        environment["CMAKE_ARGS"] = " ".join(arguments)
        for old in (ROOT / "build").glob("lib*"):  # setuptools packs whatever is there
            shutil.rmtree(old)
        run(
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", work, ROOT),
            environment=environment,
        )
        (made,) = work.glob("*.whl")
        if kind != "pure":
            made = repair(made, kind, work / "repaired")
        check(made, kind)
        return Path(shutil.copy(made, dist))


def make_stubs(folder: Path) -> None:
    """Writes what a library for aarch64 is compiled and linked with: CUDA's headers and static
    runtime, and PyTorch's libraries without contents."""
    if not shutil.which(CROSS):
        raise WheelError(
            f"aarch64: expected {CROSS} on PATH, got none; apt-get install g++-aarch64-linux-gnu"
        )
    folder.mkdir()
    version = re.search(r"release ([\d.]+)", run("nvcc", "--version")).group(1)
    name = "nvidia-cuda-runtime" + ("-cu12" if version.startswith("12") else "")
    run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder),
        *("--platform", "manylinux2014_aarch64", "--only-binary=:all:", f"{name}=={version}.*"),
    )
    # The nvcc on PATH may be a script; what it would do names the toolkit's folder.
    plan = run("nvcc", "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", folder / "none.o")
    toolkit = Path(re.search(r"TOP=(\S+)", plan).group(1)).resolve()
    (folder / "include").symlink_to(toolkit / "include")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".a"):
                (folder / Path(name).name).write_bytes(archive.read(name))
    for library in TORCH:  # for their names alone: symbols are looked up when PyTorch is loaded
        run(
            *(CROSS, "-shared", "-nostdlib", "-x", "c++", "/dev/null"),
            *(f"-Wl,-soname,{library}", "-o", folder / library),
        )


def tag_of(machine: str) -> str:
    """Returns the platform tag of a compiled wheel."""
    return f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"


def repair(wheel: Path, machine: str, folder: Path) -> Path:
    """Gives a wheel the tag that its symbols deserve; PyTorch's libraries stay outside.

    auditwheel serves its own machine alone; for another, `check` compares the symbols with the tag.
    """
    tag = tag_of(machine)
    if machine != platform.machine():
        tags = ("tags", "--remove", "--platform-tag", tag)
        run(sys.executable, "-m", "wheel", *tags, wheel)
        (made,) = wheel.parent.glob("*.whl")
        return made
    excluded = [f"--exclude={library}" for library in TORCH]
    run(
        *(sys.executable, "-m", "auditwheel", "repair", "--plat", tag, *excluded),
        *("--wheel-dir", folder, wheel),
    )
    (made,) = folder.glob("*.whl")
    return made


def check(wheel: Path, kind: str) -> None:
    """Raises WheelError unless a wheel has the tag, the machine, the symbols and the files of its
    kind."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = [name for name in names if ".so" in Path(name).name]
        expected = [] if kind == "pure" else ["aapt_kernels/lib/libaapt_sm90.so"]
        if libraries != expected:
            raise WheelError(f"{wheel.name}: expected the libraries {expected}, got {libraries}")
        for file in ("aapt/assets/tiny-world/model.safetensors", "aapt/serve/page/index.html"):
            if file not in names:
                raise WheelError(f"{wheel.name}: expected {file} in it")
        tag = wheel.stem.split("-")[-1]
        if kind == "pure":
            if not wheel.name.endswith("-py3-none-any.whl"):
                raise WheelError(f"{wheel.name}: expected the tag py3-none-any")
            return
        if tag_of(kind) not in tag:
            raise WheelError(f"{wheel.name}: expected {tag_of(kind)} in its tag")
        with tempfile.TemporaryDirectory() as folder:
            check_library(Path(archive.extract(libraries[0], folder)), kind)


def check_library(library: Path, machine: str) -> None:
    """Raises WheelError unless a library is for this machine, needs PyTorch and the system alone,
    no newer glibc than GLIBC, and has code for sm_90a."""
    header = run("readelf", "-h", library)
    if MACHINES[machine] not in header:
        raise WheelError(f"{library.name}: expected code for {machine}, got {header}")
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library))
    if TORCH[0] not in needed:
        raise WheelError(f"{library.name}: expected {TORCH[0]} among {needed}")
    if others := set(needed) - {*TORCH, *SYSTEM}:
        raise WheelError(f"{library.name}: expected no library but PyTorch's, got {others}")
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", run("readelf", "-V", library))
    newest = max((int(major), int(minor)) for major, minor in versions)
    if newest > GLIBC:
        raise WheelError(f"{library.name}: expected glibc {GLIBC} at most, needs {newest}")
    if "sm_90a" not in cubin.run_cuobjdump("--list-elf", library):
        raise WheelError(f"{library.name}: expected code for sm_90a, got none")


def run(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """Runs a command and returns what it prints. WheelError, with its last lines, if it fails."""
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-40:])
        raise WheelError(f"{Path(command[0]).name}: failed\n{last}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("kinds", nargs="+", choices=("pure", *MACHINES))
    for kind in parser.parse_args().kinds:
        try:
            print(build(kind).relative_to(ROOT), flush=True)
        except WheelError as error:
            sys.exit(f"{kind}: {error}")


if __name__ == "__main__":
    main()
