"""A safetensors file written one tensor at a time."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import replacing
from .tensor_files import DTYPES

# Foreign files in e4m3 are not read, because each keeps its scales elsewhere
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when it is written: its form, and the call that makes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_pending(path: Path, tensors: Mapping[str, Pending]) -> None:
    """Write tensors as safetensors, whole or not at all; one of them is in memory at a time.

    ValueError for one that is not of its announced form.
    """
    # Wide elements first, so that every tensor begins on a multiple of its element's bytes
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.bytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            made = tensor.make()
            if made.shape != tensor.shape or made.dtype != tensor.dtype:
                raise ValueError(
                    f"{name}: expected {tensor.shape} of {tensor.dtype}, "
                    f"got {tuple(made.shape)} of {made.dtype}"
                )
            file.write(made.contiguous().flatten().view(torch.uint8).numpy())
