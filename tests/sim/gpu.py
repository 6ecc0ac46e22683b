"""Runs the test kernels on a GPU, with the interface of Simulator, to calibrate the simulator."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import torch

from .simulator import CSRC, KERNELS

NVCC = ["nvcc", "-std=c++17", "-O3", f"-I{CSRC}", "-gencode=arch=compute_90a,code=sm_90a"]


def build(folder: Path) -> Path:
    library = folder / "libkernels-sm90a.so"
    sources = [str(path) for path in sorted(KERNELS.glob("*.cu"))]
    command = [*NVCC, "-shared", "-Xcompiler=-fPIC", *sources, "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


class Gpu:
    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))

    def launch(self, name, *arguments, **_options) -> str | None:
        """Copies the arrays to the GPU, launches, and copies them back."""
        values, copies = [], []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                there = torch.from_numpy(argument.view(np.uint8)).cuda()
                copies.append((argument, there))
                values.append(ctypes.c_void_p(there.data_ptr()))
            else:
                kind = ctypes.c_float if isinstance(argument, float) else ctypes.c_int
                values.append(kind(argument))
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        error = function(*values, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        if error:
            return error.decode()
        torch.cuda.synchronize()
        for here, there in copies:
            here.view(np.uint8)[...] = there.cpu().numpy()
        return None
