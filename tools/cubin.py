"""Reads the resources and the instructions of compiled kernels, with cuobjdump."""

import math
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Tensor-core and bulk-copy instructions worth counting: wgmma, FP8 wgmma, mma.sync, TMA load/store.
COUNTED = ("HGMMA", "QGMMA", "HMMA", "UTMALDG", "UTMASTG")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code, without its predicate."""

    opcode: str  # with modifiers
    operands: str

    @property
    def is_uniform(self) -> bool:
        """True if the uniform datapath executes it, one instruction for the whole warp."""
        return re.match(r"U(?!TMA|BLK|SETMAXREG)", self.opcode) is not None


@dataclass
class Kernel:
    """One kernel of one object file; sizes in bytes."""

    name: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    threads: int = 0  # at most, per block; 0 if the kernel sets no bound
    sass: list[Instruction] | None = None  # None without cuobjdump

    def count(self, opcode: str) -> int:
        """Counts an opcode, as written (`LDG.E.128`) or without modifiers (`LDG`)."""
        return sum(opcode in (x.opcode, x.opcode.split(".")[0]) for x in self.sass or ())


def find_cuobjdump() -> str | None:
    """Finds the cuobjdump of the CUDA toolkit, else of the Triton wheel; None without either."""
    if on_path := shutil.which("cuobjdump"):
        return on_path
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


def run_cuobjdump(option: str, path: Path | str) -> str:
    """Returns the output of cuobjdump; empty for a file without device code.

    Raises FileNotFoundError without cuobjdump, RuntimeError with its message if it fails.
    """
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise FileNotFoundError(
            "cuobjdump: expected on PATH or in the Triton wheel, got neither; install triton"
        )
    done = subprocess.run([cuobjdump, option, str(path)], capture_output=True, text=True)
    if "does not contain device code" in done.stderr:
        return ""
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} {path}: {done.stderr.strip()}")
    return done.stdout


def read_sass(path: Path | str) -> dict[str, list[Instruction]]:
    """Reads the machine code of every kernel of an object, library or cubin."""
    kernels: dict[str, list[Instruction]] = {}
    pattern = r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    for line in run_cuobjdump("-sass", path).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            code = kernels.setdefault(match[1], [])
        elif match := re.match(pattern, line):
            code.append(Instruction(match[1], match[2].strip()))
    return kernels


def read_threads(path: Path | str) -> dict[str, int]:
    """Reads the most threads per block, of every kernel with launch bounds."""
    threads, name = {}, ""
    lines = iter(run_cuobjdump("-elf", path).splitlines())
    for line in lines:
        if match := re.match(r"\.nv\.info\.(\S+)", line):
            name = match[1]
        elif "EIATTR_MAX_THREADS" in line:
            next(lines)
            sizes = re.findall(r"0x[0-9a-f]+", next(lines))
            threads[name] = math.prod(int(size, 16) for size in sizes)
    return threads


def read_kernels(path: Path | str) -> list[Kernel]:
    """Reads resources and instructions of every kernel from the compiled file alone.

    Spilled registers are in the stack frame, so a spill shows as `stack`.
    """
    usage = run_cuobjdump("-res-usage", path)
    sass, threads = read_sass(path), read_threads(path)
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return [
        Kernel(
            name,
            registers=int(registers),
            shared=int(shared),
            stack=int(stack) + int(local),
            threads=threads.get(name, 0),
            sass=sass.get(name, []),
        )
        for name, registers, stack, shared, local in re.findall(pattern, usage)
    ]


def find_failures(kernels: list[Kernel], required: dict[str, tuple[str, ...]]) -> list[str]:
    """Lists why kernels are rejected: spills, stack frames, missing instructions.

    required: opcodes that must occur, by a substring of the kernel's (mangled) name.
    """
    failures = []
    for kernel in kernels:
        if kernel.spills:
            failures.append(f"{kernel.name}: spills {kernel.spills} bytes of registers")
        if kernel.stack:
            failures.append(f"{kernel.name}: has a stack frame of {kernel.stack} bytes")
        if kernel.sass is None:
            continue
        for part, opcodes in required.items():
            if part in kernel.name:
                missing = [opcode for opcode in opcodes if not kernel.count(opcode)]
                failures += [f"{kernel.name}: no {opcode} in its SASS" for opcode in missing]
    return failures


def demangle(name: str) -> str:
    """Returns a kernel's name with template arguments; without c++filt, the mangled name."""
    if shutil.which("c++filt") is None:
        return name
    full = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    return full.replace("(anonymous namespace)::", "").split("(")[0].removeprefix("void ")


def format_table(kernels: list[Kernel]) -> str:
    header = f"{'regs':>5} {'shared':>7} {'stack':>6} {'spills':>6}"
    header += "".join(f" {opcode:>8}" for opcode in COUNTED)
    rows = [f"{header}  kernel"]
    for kernel in kernels:
        row = f"{kernel.registers:>5} {kernel.shared:>7} {kernel.stack:>6} {kernel.spills:>6}"
        unread = kernel.sass is None
        row += "".join(f" {'?' if unread else kernel.count(op):>8}" for op in COUNTED)
        rows.append(f"{row}  {demangle(kernel.name)}")
    return "\n".join(rows)
