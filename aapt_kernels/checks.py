"""The argument checks of every op: name the argument, the contract and what was given, once, in
Python, before any backend."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_shape(
    name: str, tensor: Tensor, expected: Sequence[int | str], why: str = ""
) -> torch.Size:
    """The shape, or ValueError; a string in `expected` is the name of a free dimension."""
    shape = tensor.shape
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        wanted += "," if len(expected) == 1 else ""
        raise ValueError(
            f"{name}: expected ({wanted}){f' for {why}' if why else ''}, got {tuple(shape)}"
        )
    return shape


def check_dense_rows(tensors: Mapping[str, Tensor]) -> None:
    """The last dimension is contiguous in all of them, or ValueError."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension (stride 1), "
                f"got strides {tuple(tensor.stride())}"
            )


def check_dtype(tensors: Mapping[str, Tensor], allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """All of one dtype, and that an allowed one, or TypeError."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            names = " or ".join(str(dtype) for dtype in allowed)
            raise TypeError(f"{name}: expected {names}, got {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name}: expected {first.dtype} like {first_name}, got {tensor.dtype}")


def check_device(tensors: Mapping[str, Tensor]) -> None:
    """All on the device of the first, or ValueError."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected a tensor on {first.device} like {first_name}, "
                f"got {tensor.device}"
            )


def check_no_grad(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """RuntimeError if autograd would have to record the op."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{name}: {op} has no gradient; expected a tensor that does not require grad, or "
                f"a call under torch.no_grad(), got requires_grad=True"
            )


def sm90_limit(q: Tensor, *_) -> str | None:
    """Why the sm_90a attention kernels and kv_append do not take q; None if they do."""
    if q.dtype == torch.bfloat16 and q.shape[-1] in (64, 128):
        return None
    return f"it takes bfloat16 with head_dim 64 or 128, got {q.dtype} with {q.shape[-1]}"
