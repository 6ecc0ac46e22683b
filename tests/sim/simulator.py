"""Builds the test kernels with the simulator and calls them through ctypes, on numpy arrays."""

import ctypes
import fcntl
import hashlib
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

KERNELS = Path(__file__).parent / "kernels"
CSRC = Path(__file__).parents[2] / "csrc"
EAGER, RANDOM, LATE = range(3)
COMPILE = ["g++", "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", f"-I{CSRC}"]
# Kernels only: their loads and stores call the simulator's hooks. -g1 for line numbers.
INSTRUMENT = [
    "-g1",
    "-fsanitize=thread,alignment",
    "--param=tsan-instrument-func-entry-exit=0",
    "-x",
    "c++",
]


RUNTIME = sorted(set((CSRC / "sim").glob("*.cpp")) - {CSRC / "sim" / "module.cpp"})
RUNTIME.append(KERNELS / "controls.cpp")
KERNEL_SOURCES = sorted(KERNELS.glob("*.cu"))
HEADERS = [*(CSRC / "sim").glob("*.h"), *(CSRC / "hopper").glob("*"), *KERNELS.glob("*.*h")]


def build(
    folder: Path,
    sources: Sequence[Path] = KERNEL_SOURCES,
    headers: Sequence[Path] = (),
    name: str = "kernels",
) -> Path:
    """Builds kernels and simulator into a library in `folder`, unless it exists for these sources.

    headers: included by `sources`, besides the headers of the simulator and the test kernels.
    """
    digest = hash_of([Path(__file__), *RUNTIME, *HEADERS, *sources, *headers])
    library = folder / f"lib{name}-{digest}.so"
    with locked(folder / f"{name}.lock"):
        if library.exists():
            return library
        for old in folder.glob(f"lib{name}-*.so"):
            old.unlink()
        objects = [compile_once(folder, source) for source in RUNTIME]
        objects += [compile_once(folder, source, headers) for source in sources]
        # -Bsymbolic: binds to this simulator, not to another one in the process
        link = ["g++", "-shared", "-Wl,-Bsymbolic", *objects, "-ldl", "-o", str(library)]
        subprocess.run(link, check=True, capture_output=True, text=True)
    return library


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock among test processes, so that one of them builds for all."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_once(folder: Path, source: Path, headers: Sequence[Path] = ()) -> str:
    """Compiles a source, unless its object exists; returns the path of the object."""
    digest = hash_of([Path(__file__), *HEADERS, *headers, source])
    stem = f"{source.stem}-{source.suffix[1:]}"
    target = folder / f"{stem}-{digest}.o"
    with locked(folder / f"{stem}.lock"):
        if target.exists():
            return str(target)
        for old in folder.glob(f"{stem}-*.o"):
            old.unlink()
        flags = INSTRUMENT if source.suffix == ".cu" else []
        command = [*COMPILE, *flags, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    return str(target)


def hash_of(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_bugs(header: str) -> dict[str, int]:
    """Reads the names of `enum Bug` in a kernel's header; returns them with their numbers."""
    body = re.search(r"enum Bug \{(.*?)\}", (KERNELS / header).read_text(), re.S)[1]
    return {name: number for number, name in enumerate(re.findall(r"\w+", body))}


class Statistics(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("blocks", "switches", "bulk_loads", "bulk_stores", "wgmmas", "accesses"),
            *("loaded_bytes", "stored_bytes"),
        )
    ]


class Simulator:
    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.get_statistics.restype = ctypes.POINTER(Statistics)

    def launch(
        self, name, *arguments, seed=0, tma=LATE, wgmma=LATE, races=True, banks=False
    ) -> str | None:
        """Runs a test kernel, which may touch only the given arrays; returns the report, if any."""
        self.library.set_options(seed, tma, wgmma, races)
        self.library.count_banks(banks)
        self.library.forget()
        values = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                pointer = ctypes.c_void_p(argument.ctypes.data)
                self.library.allow(pointer, ctypes.c_size_t(argument.nbytes))
                values.append(pointer)
            else:
                kind = ctypes.c_float if isinstance(argument, float) else ctypes.c_int
                values.append(kind(argument))
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        report = function(*values, None)
        return report.decode() if report else None

    def banks(self) -> tuple[int, int, int]:
        """Warp instructions, cycles without bank conflicts and cycles since the last call."""
        sums = (ctypes.c_uint64 * 3)()
        self.library.get_banks(sums)
        return tuple(sums)

    @property
    def statistics(self) -> Statistics:
        return self.library.get_statistics().contents


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def from_e4m3(x: np.ndarray) -> np.ndarray:
    exponent, mantissa = x >> 3 & 15, (x & 7).astype(np.float64)
    value = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(float) - 10)
    )
    return np.where(x & 128, -value, value)


def nan_filled(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)
