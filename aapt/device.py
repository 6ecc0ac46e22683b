"""Devices and the precision of networks."""

import os
import platform
import warnings
from contextlib import AbstractContextManager

import torch

BFLOAT16 = (8, 0)  # compute capability from which a CUDA device multiplies bfloat16
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device of a name, a CUDA device with its number.

    ValueError, with the reason and the mend, if PyTorch cannot use it.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device}") from None
    if found.type == "cuda" and (reason := _no_cuda(found)):
        raise ValueError(f"device: cannot use {device}: {reason}")
    try:
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: cannot use {device}: {reason}; cpu always works") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is full: of Python, of a CUDA device, or PyTorch's
    of the host, which is a plain RuntimeError."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)


def _no_cuda(device: torch.device) -> str | None:
    """Return why there is no such CUDA device, and what to do; None if there is one."""
    if torch.version.cuda is None:
        return (
            f"PyTorch {torch.__version__} is built without CUDA; install a build with CUDA, or "
            "take cpu"
        )
    count = torch.cuda.device_count()
    if not count:
        return "no CUDA device is visible; see what nvidia-smi lists, or take cpu"
    if device.index is not None and device.index >= count:
        return f"expected a number below {count}, which nvidia-smi lists"
    return None


def usable_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the precision of networks on a device.

    None means bfloat16 on a CUDA device that multiplies it, and float32 elsewhere.
    TypeError for a dtype that networks do not have; ValueError, with the mend, for one that the
    device does not multiply, and a warning for one that it multiplies slowly.
    """
    lacks = device.type == "cuda" and torch.cuda.get_device_capability(device) < BFLOAT16
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" and not lacks else torch.float32
    if dtype not in PRECISIONS:
        names = ", ".join(str(each).removeprefix("torch.") for each in PRECISIONS)
        raise TypeError(f"dtype: expected one of {names}, got {dtype}")
    if dtype == torch.bfloat16 and lacks:
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"dtype: expected float16 or float32 on {device}, which is sm_{major}{minor} and does "
            "not multiply bfloat16, got bfloat16"
        )
    if dtype == torch.bfloat16 and not multiplies_bfloat16(device):
        warnings.warn(
            "dtype: this CPU has no instructions for bfloat16, which takes about 20 times as long "
            "as float32",
            stacklevel=3,
        )
    return dtype


def memory_of(device: torch.device) -> int | None:
    """Return the bytes of memory that a device has in all, None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """Return a context of bfloat16 matrix products with float32 parameters.

    On a CPU without instructions for them, products stay in float32: bfloat16 would take a hundred
    times as long there.

    Code without gradients and code with gradients need a context each, because autocast keeps its
    casts of parameters for the whole context: a cast kept from the first would pass its gradient on
    too late, after FSDP has reduced the gradients.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return False for a CPU without instructions for products in bfloat16."""
    if device.type != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported()  # every processor with AMX has these, too
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
