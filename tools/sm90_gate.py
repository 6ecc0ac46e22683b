"""Compiles a CUDA source, and rejects it unless every kernel in it is clean.

    python tools/sm90_gate.py -- nvcc -Xptxas=-v ... -c kernel_sm90.cu -o kernel.o
    python tools/sm90_gate.py library.so          # only the table

The build runs nvcc through this file (CMake's compiler launcher). A compile fails on a ptxas
C75xx or C76xx message (wgmma serialised, setmaxnreg ignored, ...), a register spill, a stack
frame, an instruction of REQUIRED missing from the machine code, or products driven badly (see
wgmma.py). Instructions are read with cuobjdump; without it, their check is left to the tests.
"""

import re
import subprocess
import sys
from pathlib import Path

from cubin import (
    Kernel,
    find_cuobjdump,
    find_failures,
    format_table,
    read_kernels,
    read_sass,
    read_threads,
)
from wgmma import find_tensor_failures, format_tensor_table

# Opcodes that a kernel must contain, by a part of its name: without them it is correct but slow.
REQUIRED: dict[str, tuple[str, ...]] = {
    "kv_append_kernel": ("LDG.E.128", "STG.E.128"),
    "cached_attention_kernel": ("HGMMA", "UTMALDG", "UTMASTG"),
    "cached_attention_e4m3_kernel": ("QGMMA", "UTMALDG", "UTMASTG"),
    "causal_conv3d_kernel": ("HGMMA", "UTMALDG", "UTMASTG", "MUFU.TANH"),
    "causal_conv3d_rows_kernel": ("HGMMA", "UTMALDG"),
    "activate_kernel": ("LDG.E.128", "STG.E.128"),
    "block_causal_attention_kernel": ("HGMMA", "UTMALDG", "UTMASTG"),
    "block_causal_backward_kernel": ("HGMMA", "UTMALDG"),
    "block_causal_dq_kernel": ("HGMMA", "UTMALDG", "UTMASTG"),
    "block_causal_rows_kernel": ("LDG.E.128",),
    "block_causal_convert_kernel": ("LDG.E.128",),
}


def parse_ptxas(log: str) -> tuple[list[Kernel], list[str]]:
    """Returns the kernels and the C75xx/C76xx messages of a `ptxas -v` log."""
    kernels = []
    for block in log.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", block)[1]
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        )
        stack, stores, loads = (int(number) for number in frame.groups())
        used = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        kernels.append(
            Kernel(
                name,
                registers=int(used[1]),
                shared=int(shared[1]) if shared else 0,
                stack=stack,
                spills=stores + loads,
            )
        )
    messages = [line.strip() for line in log.splitlines() if re.search(r"\(C7[56]\d\d\)", line)]
    return kernels, messages


def compile_checked(
    command: list[str], required: dict[str, tuple[str, ...]] | None = None
) -> tuple[list[Kernel], list[str]]:
    """Runs a compile command with `-o object` and `-Xptxas=-v`; returns kernels and failures.

    If the compiler fails, prints its output and raises SystemExit with its status.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode:
        sys.stderr.write(log)
        raise SystemExit(done.returncode)
    kernels, messages = parse_ptxas(log)
    if "-c" not in command or not kernels:
        sys.stderr.write(log)
        return kernels, messages
    if find_cuobjdump() is not None:
        target = command[command.index("-o") + 1]
        sass, threads = read_sass(target), read_threads(target)
        for kernel in kernels:
            kernel.sass, kernel.threads = sass[kernel.name], threads.get(kernel.name, 0)
    failures = find_failures(kernels, REQUIRED if required is None else required)
    return kernels, messages + failures + find_tensor_failures(kernels)


def print_tables(kernels: list[Kernel]) -> None:
    for table in (format_table(kernels) if kernels else "", format_tensor_table(kernels)):
        if table:
            print(table)


def main(arguments: list[str]) -> int:
    if arguments[0] != "--":
        print_tables(read_kernels(arguments[0]))
        return 0
    command = arguments[1:]
    kernels, failures = compile_checked(command)
    print_tables(kernels)
    for failure in failures:
        print(f"sm_90a gate: {failure}", file=sys.stderr)
    if failures:
        Path(command[command.index("-o") + 1]).unlink()
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
