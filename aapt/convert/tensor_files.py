"""Tensors of other people's files, found without being read: safetensors, whole or in shards, and
zip files of `torch.save`."""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..checkpoint import CheckpointError, check_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on the disk.

    offset: of its first byte in the file. strides: in elements.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> Tensor:
        """Read the tensor into memory of its own. CheckpointError if the file ends before it."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        data = bytearray(0 if 0 in self.shape else (last + 1) * self.dtype.itemsize)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                got = 0
                while got < len(data) and (count := file.readinto(memoryview(data)[got:])):
                    got += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
        if got < len(data):
            raise CheckpointError(
                f"{self.path}: expected {self.offset + len(data)} bytes, "
                f"got {self.offset + got}; download the file again"
            )
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).as_strided(self.shape, self.strides)


def find_tensors(source: Path, entries: Sequence[str]) -> dict[str, StoredTensor]:
    """Find the tensors of a file or folder, by their names there.

    source: a safetensors file, an index of shards, a file of `torch.save`, or a folder with one of
    them; from a diffusers pipeline's folder the `transformer` is read. entries: names under which a
    file of `torch.save` may keep a network beside others, the wanted one first.

    CheckpointError says what was expected and what was found.
    """
    if source.is_dir():
        source = _file_in(source)
    if not source.is_file():
        raise CheckpointError(
            f"{source}: expected a file of weights or a folder with one, which is missing"
        )
    if source.name.endswith(INDEX):
        return _shards(source)
    if source.suffix == ".safetensors":
        return _safetensors(source)
    return _torch_file(source, entries)


def _file_in(folder: Path) -> Path:
    """Return the file of weights, or the index of shards, in a folder."""
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    for pattern in ("*" + INDEX, "*.safetensors", "*.pt"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(f"{folder}: expected one file of weights, got {names}; pass one")
        if found:
            return found[0]
    raise CheckpointError(
        f"{folder}: expected a file of weights (.safetensors or .pt), which is missing"
    )


def _shards(index: Path) -> dict[str, StoredTensor]:
    """Find the tensors of all shards that an index names."""
    try:
        placed = json.loads(index.read_text())["weight_map"]
        files = {name: _safetensors(index.parent / name) for name in sorted(set(placed.values()))}
    except (OSError, LookupError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise _no_index(index, error) from None
    except json.JSONDecodeError as error:
        raise _no_index(index, error) from None
    for name, file in placed.items():
        if name not in files[file]:
            raise CheckpointError(
                f"{index.parent / file}: expected tensor {name}, as {index.name} says, which is "
                "missing"
            )
    return {name: files[file][name] for name, file in placed.items()}


def _no_index(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: expected an index with weight_map, got {error!r}")


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    """Find the tensors of one safetensors file."""
    check_header(path)
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name}: expected one of {', '.join(DTYPES)}, got {entry['dtype']}"
            )
        shape = tuple(entry["shape"])
        strides = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
        start = 8 + size + entry["data_offsets"][0]
        found[name] = StoredTensor(path, start, DTYPES[entry["dtype"]], shape, strides)
    return found


def _torch_file(path: Path, entries: Sequence[str]) -> dict[str, StoredTensor]:
    """Find the tensors of one file of `torch.save`, of which nothing but tensors is loaded."""
    try:
        with FakeTensorMode():  # gives each storage its place in the file, and reads no tensor
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and PyTorch raise their own kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: expected a file of torch.save with tensors and plain values alone: {reason}"
        ) from None
    return {
        name: _stored(path, name, tensor)
        for name, tensor in _network(path, content, entries).items()
    }


def _network(path: Path, content: Any, entries: Sequence[str]) -> Mapping[str, Tensor]:
    """Return the dictionary of tensors that the first known entry holds, or the whole file."""
    if _holds_tensors(content):
        return content
    names = list(content) if isinstance(content, dict) else []
    for entry in entries:
        if entry in names and _holds_tensors(content[entry]):
            return content[entry]
    got = ", ".join(map(str, names)) or type(content).__name__
    raise CheckpointError(
        f"{path}: expected tensors, alone or in one of {', '.join(entries)}, got {got}; "
        "pass --entry NAME"
    )


def _holds_tensors(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(value, Tensor) for value in content.values())
    )


def _stored(path: Path, name: str, tensor: Tensor) -> StoredTensor:
    storage = tensor.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    if start is None:
        raise CheckpointError(
            f"{path}: {name}: expected a zip file of torch.save, got the format before PyTorch "
            "1.6; load it with torch.load and save it again"
        )
    if tensor.dtype not in DTYPES.values():
        names = ", ".join(str(dtype) for dtype in DTYPES.values())
        raise CheckpointError(f"{path}: {name}: expected one of {names}, got {tensor.dtype}")
    offset = start + tensor.storage_offset() * tensor.dtype.itemsize
    return StoredTensor(path, offset, tensor.dtype, tuple(tensor.shape), tensor.stride())
