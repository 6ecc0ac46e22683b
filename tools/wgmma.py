"""Reads from machine code how a kernel drives the tensor cores of sm_90a.

ptxas may undo what a source says without a word: it moves a wait above the arithmetic that should
hide the products, rebuilds descriptors for every product, or gives a kernel so few registers that
`setmaxnreg` waits for ever.
"""

import re
from dataclasses import dataclass

from cubin import Instruction, Kernel, demangle

# Kernels whose exponentials must run during a product, by a part of the name.
OVERLAPPED = (
    "cached_attention_kernel",
    "block_causal_attention_kernel",
    "block_causal_backward_kernel",
    "block_causal_dq_kernel",
)
# Instructions of the uniform datapath that may be issued per product, on average over a run of
# products. A chain of 12 takes as long as a product 64 columns wide, 32 cycles; 4 advance the two
# descriptors, and in a run of 4 products up to 12 more may be other work that ptxas puts there.
MOST_UNIFORM = 7.0
WARPGROUP = 128  # threads
PRODUCTS = ("HGMMA", "QGMMA")  # of BF16, of FP8


@dataclass(frozen=True)
class Tensor:
    """Facts of one kernel from its machine code; all counts are static."""

    products: int
    before: int  # exponentials between the first and the second wait of a loop
    after: int  # exponentials that wait for both products
    uniform: float  # instructions of the uniform datapath per product, of the worst run
    others: float  # all instructions but products, per product, over all runs
    shared: int  # bytes up to the furthest mbarrier: at least so much is used
    barriers: int  # mbarriers


def is_wait(instruction: Instruction, groups: int | None = None) -> bool:
    if instruction.opcode != "WARPGROUP.DEPBAR.LE":
        return False
    return groups is None or int(instruction.operands.split(",")[1], 16) == groups


def runs_of_products(sass: list[Instruction]) -> list[list[Instruction]]:
    """The instructions from each WARPGROUP.ARRIVE to the last product before the next barrier."""
    runs, run = [], None
    for instruction in sass:
        base = instruction.opcode.split(".")[0]
        if instruction.opcode == "WARPGROUP.ARRIVE":
            run = []
            runs.append(run)
        elif base in ("WARPGROUP", "BAR", "SYNCS", "BRA"):
            run = None
        elif run is not None:
            run.append(instruction)
    for run in runs:
        while run and not run[-1].opcode.startswith(PRODUCTS):
            run.pop()
    return [run for run in runs if run]


def count_exponentials(sass: list[Instruction]) -> tuple[int, int]:
    """Exponentials between a wait for all products but one and the next wait, and after that wait.

    The part after a wait ends with the next run of products.
    """
    before = after = 0
    for start, instruction in enumerate(sass):
        if not is_wait(instruction, 1):
            continue
        counts, part = [0, 0], 0
        for follower in sass[start + 1 :]:
            if follower.opcode == "WARPGROUP.ARRIVE":
                break
            if is_wait(follower):
                part += 1
            if part == 2:
                break
            counts[part] += follower.opcode.startswith("MUFU.EX2")
        if part:
            before += counts[0]
            after += counts[1]
    return before, after


def read_tensor(kernel: Kernel) -> Tensor:
    """Reads a kernel whose `sass` is known."""
    runs = runs_of_products(kernel.sass)
    products = [sum(x.opcode.startswith(PRODUCTS) for x in run) for run in runs]
    uniform = [sum(x.is_uniform for x in run) for run in runs]
    initialised = [
        re.search(r"\+(0x[0-9a-f]+)\]", x.operands)
        for x in kernel.sass
        if x.opcode.startswith("SYNCS.EXCH")
    ]
    before, after = count_exponentials(kernel.sass)
    return Tensor(
        products=sum(products),
        before=before,
        after=after,
        uniform=max((u / p for u, p in zip(uniform, products, strict=True)), default=0.0),
        others=sum(map(len, runs)) / max(sum(products), 1) - 1 if runs else 0.0,
        shared=max((int(found[1], 16) + 8 for found in initialised if found), default=0),
        barriers=len(initialised),
    )


def find_register_failure(kernel: Kernel) -> str | None:
    """Says why `setmaxnreg` would wait for ever, if it would.

    A block starts with `threads` times `registers` registers. One warpgroup fetches and gives some
    back; each other one takes more.
    """
    wanted = [
        (x.opcode.startswith("USETMAXREG.TRY_ALLOC"), int(x.operands.split(",")[-1], 16))
        for x in kernel.sass
        if x.opcode.startswith("USETMAXREG")
    ]
    if not wanted or not kernel.threads:
        return None
    fewer = min((count for more, count in wanted if not more), default=kernel.registers)
    more = max((count for more, count in wanted if more), default=0)
    needed = WARPGROUP * (fewer + (kernel.threads // WARPGROUP - 1) * more)
    have = kernel.threads * kernel.registers
    if have >= needed:
        return None
    return (
        f"{kernel.name}: setmaxnreg needs {needed} registers per block, got {have} at launch "
        f"({kernel.threads} threads x {kernel.registers}); it would wait for ever"
    )


def find_tensor_failures(kernels: list[Kernel]) -> list[str]:
    """Lists kernels that wait too early, rebuild descriptors or lack registers."""
    failures = []
    for kernel in kernels:
        if kernel.sass is None:
            continue
        if failure := find_register_failure(kernel):
            failures.append(failure)
        tensor = read_tensor(kernel)
        overlaps = any(part in kernel.name for part in OVERLAPPED)
        if overlaps and (tensor.after or not tensor.before):
            failures.append(
                f"{kernel.name}: {tensor.after} of {tensor.before + tensor.after} exponentials "
                "come after the second wgmma wait; call hopper::settle before it"
            )
        if tensor.uniform > MOST_UNIFORM:
            failures.append(
                f"{kernel.name}: {tensor.uniform:.1f} uniform instructions per product, expected "
                f"at most {MOST_UNIFORM}; advance descriptors instead of making them"
            )
    return failures


def format_tensor_table(kernels: list[Kernel]) -> str:
    """One line for each kernel with wgmma; empty if there is none."""
    rows = []
    for kernel in kernels:
        if kernel.sass is None or not any(map(kernel.count, PRODUCTS)):
            continue
        tensor = read_tensor(kernel)
        rows.append(
            f"{kernel.registers:>5} {tensor.shared:>7} {tensor.barriers:>8} {tensor.products:>6} "
            f"{tensor.before:>6} {tensor.after:>5} {tensor.uniform:>8.1f} {tensor.others:>6.1f}"
            f"  {demangle(kernel.name)}"
        )
    header = (
        f"{'regs':>5} {'shared':>7} {'barriers':>8} {'GMMA':>6} {'EX2 be':>6} {'after':>5} "
        f"{'uniform':>8} {'others':>6}  kernel (per GMMA: uniform of the worst run, others)"
    )
    return "\n".join([header, *rows]) if rows else ""
