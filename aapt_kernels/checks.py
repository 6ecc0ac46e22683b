"""Argument checks of every op: name the argument, the contract and what was given, once, in Python,
before any backend runs."""

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes: vector loads and TMA of the sm_90a kernels (csrc/host.h)


def check_integer(name: str, value, least: int, optional: bool = False) -> int | None:
    """Return an integer >= `least`, None if `optional`; TypeError or ValueError for anything else.

    NumPy's integers become Python's. A symbolic size stays symbolic.
    """
    if value is None and optional:
        return None
    integral = isinstance(value, (int, torch.SymInt))
    if not integral and hasattr(value, "__index__"):
        value, integral = operator.index(value), True
    if integral and value >= least:
        return value
    error = ValueError if integral or value is None else TypeError
    or_none = " or None" if optional else ""
    raise error(f"{name}: expected an integer >= {least}{or_none}, got {value!r}")


def check_shape(
    name: str, tensor: Tensor, expected: Sequence[int | str], why: object = ""
) -> torch.Size:
    """Return the shape, or raise ValueError; a string in `expected` names a free dimension.

    `why` is formatted in the error only, because a compiler cannot trace the text of a symbolic
    size.
    """
    shape = tensor.shape
    if shape == expected:
        return shape
    fits = len(shape) == len(expected)
    for have, want in zip(shape, expected, strict=False):
        if not isinstance(want, str) and have != want:
            fits = False
            break
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        wanted += "," if len(expected) == 1 else ""
        reason = str(why)
        raise ValueError(
            f"{name}: expected ({wanted}){f' for {reason}' if reason else ''}, got {tuple(shape)}"
        )
    return shape


def check_dense_rows(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the last dimension of every tensor is contiguous."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension (stride 1), "
                f"got strides {tuple(tensor.stride())}"
            )


def check_dtype(tensors: Mapping[str, Tensor], allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """Raise TypeError unless all tensors have one dtype, and an allowed one."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            names = " or ".join(str(dtype) for dtype in allowed)
            raise TypeError(f"{name}: expected {names}, got {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name}: expected {first.dtype} like {first_name}, got {tensor.dtype}")


def check_precision(x: Tensor, others: Mapping[str, Tensor]) -> None:
    """Raise TypeError unless x is floating-point and all others may be mixed with it: float64 goes
    with float64 alone, narrower dtypes with one another."""
    check_dtype({"x": x})
    doubles = (torch.float64,)
    allowed = doubles if x.dtype in doubles else tuple(y for y in FLOATS if y not in doubles)
    for name, tensor in others.items():
        if tensor.dtype not in allowed:
            check_dtype({name: tensor}, allowed)


def check_device(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected a tensor on {first.device} like {first_name}, "
                f"got {tensor.device}"
            )


def check_no_grad(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise RuntimeError if autograd would have to record `op`."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{name}: {op} has no gradient; expected a tensor that does not require grad, or "
                f"a call under torch.no_grad(), got requires_grad=True"
            )


def check_no_tangent(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise NotImplementedError if forward-mode differentiation has reached `op`: without this
    PyTorch drops the tangent without a word."""
    if forward_ad._current_level < 0:  # no tangent anywhere, which every eager call would ask
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name}: {op} has no forward-mode derivative; expected a tensor without a "
                f"tangent, got one; differentiate in reverse mode"
            )


def is_aligned(tensor: Tensor) -> bool:
    """Return whether vector loads reach the tensor: rows of (batch, length, heads, head_dim) that
    begin on 16-byte boundaries; any other tensor contiguous from such a boundary on, integers from
    any."""
    if not tensor.is_floating_point():
        return tensor.is_contiguous()
    if tensor.data_ptr() % ALIGNMENT:
        return False
    if tensor.dim() != 4:
        return tensor.is_contiguous()
    unit = ALIGNMENT // tensor.element_size()
    return tensor.stride(3) == 1 and not any(stride % unit for stride in tensor.stride()[:3])


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a contiguous copy if vector loads do not reach it."""
    if is_aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def sm90_limit(q: Tensor, **others: Tensor | None) -> str | None:
    """Return why the sm_90a kernels of attention and kv_append do not take these tensors, None if
    they do."""
    if q.dtype != torch.bfloat16 or q.shape[-1] not in (64, 128):
        return f"it takes bfloat16 with head_dim 64 or 128, got {q.dtype} with {q.shape[-1]}"
    for name, tensor in {"q": q, **others}.items():
        if tensor is not None and not is_aligned(tensor):
            rows = "rows" if tensor.dim() == 4 else "a contiguous tensor"
            return (
                f"{name}: expected {rows} on {ALIGNMENT}-byte boundaries, got strides "
                f"{tuple(tensor.stride())} at byte {tensor.data_ptr() % ALIGNMENT}"
            )
    return None


def cache_limit(q: Tensor, k_cache: Tensor | None) -> str | None:
    """Return why a kernel that computes on the stored keys does not take this cache, None if it
    does or there is none."""
    if k_cache is None or k_cache.dtype == q.dtype:
        return None
    return f"k_cache: expected a cache of the dtype of q, {q.dtype}, got {k_cache.dtype}"


def transposed_limit(name: str, tensor: Tensor | None) -> str | None:
    """Return why the sm_90a kernels do not take these values of a float8 cache (batch, capacity,
    heads, head_dim), None if they do or there are none."""
    if tensor is None:
        return None
    batch, token, *rest = tensor.stride()
    if token == 1 and not any(x % ALIGNMENT for x in (tensor.data_ptr(), batch, *rest)):
        return None
    return (
        f"{name}: expected the tokens of a column side by side, on {ALIGNMENT}-byte boundaries, "
        f"got strides {tuple(tensor.stride())} at byte {tensor.data_ptr() % ALIGNMENT}"
    )


def grouped_limit(name: str, tensor: Tensor, group: int) -> str | None:
    """Return why the sm_90a kernels do not take these keys of a float8 cache (batch, capacity,
    heads, head_dim), which they read in groups of `group` keys; None if they do."""
    batch, capacity, heads, head_dim = tensor.shape
    batch_stride, token, head_stride, _ = tensor.stride()
    outer = [stride for stride, size in ((batch_stride, batch), (head_stride, heads)) if size > 1]
    end = tensor.storage_offset() + (batch - 1) * batch_stride + (heads - 1) * head_stride
    end += (-(-capacity // group) * group - 1) * token + head_dim
    if token >= head_dim and not any(stride % (group * token) for stride in outer):
        if end <= tensor.untyped_storage().nbytes():
            return None
    return (
        f"{name}: expected memory for a multiple of {group} keys per head, got strides "
        f"{tuple(tensor.stride())}; make the cache with KVCache"
    )


def scale_limit(scale: float | None) -> str | None:
    """Return why the sm_90a kernels do not take this scale, None if they do or there is none."""
    if scale is None or scale > 0:
        return None
    return f"scale: expected a positive number, got {scale}"
