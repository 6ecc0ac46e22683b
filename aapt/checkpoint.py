"""Checkpoints: a folder with `config.json` and one safetensors file per network."""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT_VERSION = 1
BUNDLED = Path(__file__).parent / "assets"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


def bundled_models() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def find_checkpoint(name: str | Path) -> Path:
    """A folder with `config.json`, or that of a bundled model. CheckpointError for neither."""
    for folder in (Path(name), BUNDLED / str(name)):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{name}: expected a checkpoint folder or one of {', '.join(bundled_models())}"
    )


@contextmanager
def reading_config(folder: Path) -> Iterator[None]:
    """Turns what a configuration lacks, or what its values cannot be, into a CheckpointError."""
    path = folder / "config.json"
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: expected key {error}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def save_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json`, versioned, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"format_version": FORMAT_VERSION, **config})


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        with partial.open("w") as file:
            json.dump(value, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes. CheckpointError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def load_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`, less its version. CheckpointError if there is none that fits."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: expected a checkpoint folder with config.json")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from None
    version = config.pop("format_version", None) if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: expected format_version {FORMAT_VERSION}, got {version}")
    return config


def tuples(value: Any) -> Any:
    """A part of a configuration read from JSON, which has no tuples; ours has no lists."""
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def save_module(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write a module's parameters and persistent buffers, floating ones as `dtype`, whole or not
    at all."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        cast = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.detach().cpu().to(cast).contiguous()
    save_tensors(path, tensors)


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all. OSError where they cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata)
        partial.chmod(mode)  # safetensors would let nobody else read
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def load_module(path: Path, module: nn.Module) -> None:
    """Fill a module from `path`; every tensor must be there, and be of the module's shape.

    Raises CheckpointError naming the file and the first tensor that is truncated, missing,
    unexpected or of another shape; the module is then unchanged.
    """
    fill_module(path, read_tensors(path), module)


def fill_module(path: Path, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
    """Fill a module with what was read from `path`; errors as of `load_module`."""
    wanted = module.state_dict()
    shapes = [{name: tuple(x.shape) for name, x in some.items()} for some in (tensors, wanted)]
    check_shapes(path, *shapes)
    module.load_state_dict({name: tensors[name].to(wanted[name].dtype) for name in wanted})


def load_meta_module(
    path: Path, module: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None
) -> None:
    """Moves a module from the meta device to `device`, floating tensors as `dtype` (None: as they
    are), and fills it from `path` one tensor at a time.

    So the host holds at most one tensor of the file at once. CheckpointError as of `load_module`,
    before any memory is taken.
    """
    check_header(path)
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        check_shapes(path, shapes, {n: tuple(x.shape) for n, x in module.state_dict().items()})
        if dtype is not None:
            module.to(dtype)
        module.to_empty(device=device)
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                tensor.copy_(file.get_tensor(name))


def check_shapes(
    path: Path, given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """CheckpointError, naming the first tensor, unless names and shapes are those wanted."""
    for name, shape in wanted.items():
        if name not in given:
            raise CheckpointError(f"{path}: expected tensor {name}, which is missing")
        if given[name] != shape:
            raise CheckpointError(f"{path}: {name}: expected {shape}, got {given[name]}")
    for name in given:
        if name not in wanted:
            raise CheckpointError(f"{path}: tensor {name} belongs to no parameter of the model")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a safetensors file. CheckpointError as of `check_header`."""
    check_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file, got one that {error}"
        ) from None


def check_header(path: Path) -> None:
    """CheckpointError unless the file is safetensors and holds all bytes that it should."""
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a safetensors file, which is missing")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(header_size, size)))
        ends = {
            name: 8 + header_size + entry["data_offsets"][1]
            for name, entry in header.items()
            if name != "__metadata__"
        }
        for name, end in ends.items():
            if end > size:
                raise CheckpointError(
                    f"{path}: {name}: expected {end} bytes up to its end, got a file of {size} "
                    "bytes"
                )
    except CheckpointError:
        raise
    except (struct.error, SafetensorError, LookupError, TypeError, AttributeError, ValueError):
        raise CheckpointError(
            f"{path}: expected a safetensors header, got a truncated or foreign file of "
            f"{size} bytes"
        ) from None
