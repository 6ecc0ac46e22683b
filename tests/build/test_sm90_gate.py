"""The sm_90a gate: it passes a clean kernel, refuses a bad one, and every built kernel is clean."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sm90_gate
from cubin import Instruction, Kernel, find_cuobjdump, find_failures, read_kernels
from wgmma import OVERLAPPED, find_tensor_failures, format_tensor_table, read_tensor

FIXTURES = Path(__file__).parent / "fixtures"
GATE = Path(sm90_gate.__file__)
LIBRARY = Path(__file__).parents[2] / "aapt_kernels" / "lib" / "libaapt_sm90.so"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
needs_cuobjdump = pytest.mark.skipif(find_cuobjdump() is None, reason="cuobjdump not found")


def compile_command(name: str, folder: Path) -> list[str]:
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-c"]
    return ["nvcc", *flags, str(FIXTURES / name), "-o", str(folder / "kernel.o")]


@needs_nvcc
def test_clean_kernel_passes(tmp_path):
    kernels, failures = sm90_gate.compile_checked(compile_command("clean_sm90.cu", tmp_path))
    assert len(kernels) == 1 and "scale_kernel" in kernels[0].name and kernels[0].registers > 0
    assert failures == []


@needs_nvcc
def test_spilling_kernel_fails(tmp_path):
    _, failures = sm90_gate.compile_checked(compile_command("spilling_sm90.cu", tmp_path))
    assert len(failures) == 2
    assert "spills" in failures[0] and "stack frame" in failures[1]


@needs_nvcc
def test_ptxas_warning_fails(tmp_path):
    _, failures = sm90_gate.compile_checked(compile_command("warning_sm90.cu", tmp_path))
    assert len(failures) == 1 and "(C7508)" in failures[0]


@needs_nvcc
@needs_cuobjdump
def test_missing_instruction_fails(tmp_path):
    command = compile_command("clean_sm90.cu", tmp_path)
    required = {"scale_kernel": ("LDG.E.128", "HGMMA")}
    kernels, failures = sm90_gate.compile_checked(command, required)
    assert failures == [f"{kernels[0].name}: no HGMMA in its SASS"]


@needs_nvcc
def test_build_step_fails_and_leaves_no_object(tmp_path):
    command = [sys.executable, str(GATE), "--", *compile_command("spilling_sm90.cu", tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "sm_90a gate:" in done.stderr
    assert not (tmp_path / "kernel.o").exists()


@needs_nvcc
def test_compiler_errors_come_through(tmp_path):
    command = [sys.executable, str(GATE), "--", *compile_command("no_such_file.cu", tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "no_such_file.cu" in done.stderr


@needs_cuobjdump
def test_built_kernels_are_clean():
    kernels = [kernel for kernel in read_kernels(LIBRARY) if "aapt" in kernel.name]
    if not kernels:
        pytest.skip("this build has no sm_90a kernels")
    assert find_failures(kernels, sm90_gate.REQUIRED) == []
    assert find_tensor_failures(kernels) == []
    for part in (*sm90_gate.REQUIRED, *OVERLAPPED):
        assert any(part in kernel.name for kernel in kernels), f"{part}: not in the library"
    for kernel in kernels:
        if any(part in kernel.name for part in OVERLAPPED):
            assert kernel.threads in (384, 512) and read_tensor(kernel).barriers >= 12
    assert len(format_tensor_table(kernels).splitlines()) > len(OVERLAPPED)


@needs_cuobjdump
def test_a_file_without_kernels_is_read_as_empty():
    assert read_kernels(sys.executable) == []


def sass(*lines: str) -> list[Instruction]:
    return [
        Instruction(*line.split(" ", 1)) if " " in line else Instruction(line, "") for line in lines
    ]


FIRST, SECOND = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
RUN = ["WARPGROUP.ARRIVE", *["UIADD3", "UMOV", "HGMMA.64x128x16.F32.BF16"] * 2, "UMOV"]


@pytest.mark.parametrize(
    ("between", "behind", "words"),
    [
        (["FMNMX", "MUFU.EX2", "MUFU.EX2"], ["FMUL"], []),
        (["FMNMX"], ["MUFU.EX2", "MUFU.EX2"], ["2 of 2 exponentials come after"]),
        (["MUFU.EX2"], ["MUFU.EX2"], ["1 of 2 exponentials come after"]),
        ([], [], ["0 of 0 exponentials"]),
    ],
)
def test_exponentials_belong_before_the_second_wait(between, behind, words):
    code = sass(*RUN, FIRST, *between, SECOND, *behind, *RUN, SECOND, "MUFU.EX2")
    kernel = Kernel("cached_attention_kernel", sass=code)
    failures = find_tensor_failures([kernel])
    assert len(failures) == len(words)
    assert all(word in failure for word, failure in zip(words, failures, strict=True))
    assert find_tensor_failures([Kernel("another_kernel", sass=code)]) == []


@pytest.mark.parametrize("name", ["block_causal_dq_kernel", "causal_conv3d_kernel"])
def test_descriptors_are_not_rebuilt_for_every_product(name):
    chain = ["UIADD3", "ULOP3.LUT", "USHF.R.U32.HI", "ULOP3.LUT", "UMOV", "UMOV"] * 2
    code = sass("WARPGROUP.ARRIVE", *[*chain, "HGMMA.64x64x16.F32.BF16"] * 8)
    code += sass(FIRST, "MUFU.EX2", SECOND)
    (failure,) = find_tensor_failures([Kernel(name, sass=code)])
    assert "12.0 uniform instructions per product" in failure


@pytest.mark.parametrize(("registers", "fits"), [(168, True), (176, True), (160, False)])
def test_setmaxnreg_needs_its_registers_at_launch(registers, fits):
    code = sass("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8", "USETMAXREG.DEALLOC.CTAPOOL 0x28")
    failures = find_tensor_failures([Kernel("k", registers=registers, threads=384, sass=code)])
    assert failures == [] if fits else "it would wait for ever" in failures[0]
