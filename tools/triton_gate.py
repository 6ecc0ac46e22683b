"""Compiles a Triton kernel ahead of time, without a GPU, and reads its machine code.

kernels = compile_ahead(my_kernel, {"x": "*bf16", "n": "i32"}, {"BLOCK": 128}, capability=90)
assert not find_failures(kernels, {"my_kernel": ("HGMMA",)})
assert not find_oversized(kernels, 90)
"""

import tempfile
from collections.abc import Collection
from pathlib import Path

import triton
from cubin import Kernel, read_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that a block may take, by compute capability
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def launch_signature(
    kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, object]
) -> dict[str, str]:
    """Returns the Triton type of every run-time argument of `kernel`: from `types`, else i32."""
    return {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}


def find_oversized(kernels: list[Kernel], capability: int) -> list[str]:
    """Lists kernels that no block of a device of this capability has shared memory for."""
    most = SHARED_BYTES[capability]
    return [
        f"{kernel.name}: takes {kernel.shared} bytes of shared memory, sm_{capability} has {most}"
        for kernel in kernels
        if kernel.shared > most
    ]


def compile_ahead(
    kernel: triton.JITFunction,
    signature: dict[str, str],
    constants: dict[str, object],
    *,
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Collection[str] = (),
) -> list[Kernel]:
    """Compiles `kernel` for a capability (80, 90, ...); returns resources and instruction counts.

    signature: Triton types of the run-time arguments. constants: values of tl.constexpr arguments,
    and None for optional arguments. divisible: integers that are multiples of 16, which Triton
    detects at a launch. Pointers are taken to be 16-byte aligned, as PyTorch allocates them.

    Raises TypeError for a kernel made under TRITON_INTERPRET=1, which cannot be compiled.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(f"kernel: expected a compiled triton.jit function, got {type(kernel)}")
    types = signature | dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if types[name].startswith("*") or name in divisible
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        kernels = read_kernels(cubin)
    for one in kernels:
        one.shared = compiled.metadata.shared  # dynamic: not in the file
    return kernels
