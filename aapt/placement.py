"""Device, precision and size of a generator, from the words of a user."""

import re
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def named_dtype(name: str | None, names: tuple[str, ...] = DTYPES):
    """Return the torch dtype of a name, None without one; ValueError for a name not in `names`."""
    if name is None:
        return None
    if name not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {name}")
    import torch

    return getattr(torch, name)


def placement(device: str | None, dtype: str | None, size: str | None) -> dict[str, Any]:
    """Return device, precision and size (WIDTHxHEIGHT) as arguments of
    `StreamingGenerator.from_pretrained`; ValueError, by the argument's name, for a value that means
    nothing."""
    if device == "meta":
        raise ValueError("device: expected cpu, cuda or cuda:N, got meta")
    precision = named_dtype(dtype)
    match = None if size is None else re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
    if size is not None and match is None:
        raise ValueError(f"size: expected WIDTHxHEIGHT such as 128x80, got {size}")
    return {
        "device": device,
        "dtype": precision,
        "size": match and (int(match[2]), int(match[1])),
    }
