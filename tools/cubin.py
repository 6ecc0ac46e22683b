"""Reads the resources and the instructions of compiled kernels, with cuobjdump."""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Tensor-core and bulk-copy instructions worth counting: wgmma, FP8 wgmma, mma.sync, TMA load/store.
COUNTED = ("HGMMA", "QGMMA", "HMMA", "UTMALDG", "UTMASTG")


@dataclass
class Kernel:
    """One kernel of one object file; sizes in bytes, `instructions` per thread (static count)."""

    name: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    instructions: Counter | None = None  # None without cuobjdump

    def count(self, opcode: str) -> int:
        return 0 if self.instructions is None else self.instructions[opcode]


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


def read_instructions(path: Path | str) -> dict[str, Counter]:
    """Counts the opcodes of every kernel of an object, library or cubin.

    Every instruction counts twice: as written (`LDG.E.128`) and without modifiers (`LDG`).
    """
    kernels: dict[str, Counter] = {}
    for line in run_cuobjdump("-sass", path).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            counts = kernels.setdefault(match[1], Counter())
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            counts.update({match[1], match[1].split(".")[0]})
    return kernels


def read_kernels(path: Path | str) -> list[Kernel]:
    """Reads resources and instructions of every kernel from the compiled file alone.

    Spilled registers are in the stack frame, so a spill shows as `stack`.
    """
    usage = run_cuobjdump("-res-usage", path)
    instructions = read_instructions(path)
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return [
        Kernel(
            name,
            registers=int(registers),
            shared=int(shared),
            stack=int(stack) + int(local),
            instructions=instructions.get(name, Counter()),
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
        if kernel.instructions is None:
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
        unread = kernel.instructions is None
        row += "".join(f" {'?' if unread else kernel.count(op):>8}" for op in COUNTED)
        rows.append(f"{row}  {demangle(kernel.name)}")
    return "\n".join(rows)
