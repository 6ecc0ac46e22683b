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
# Names under which PyTorch files of others keep their weights.
WRAPPERS = ("state_dict", "gen_model", "generator")


class CheckpointError(ValueError):
    """Says why a checkpoint cannot be used."""


def bundled_models() -> list[str]:
    """Return the names of the checkpoints that ship with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def find_checkpoint(name: str | Path) -> Path:
    """Return the folder `name` if it has a `config.json`, else the bundled model of that name.

    CheckpointError if there is neither, or if the system refuses the path.
    """
    with _reading(name):
        for folder in (Path(name), BUNDLED / str(name)):
            if (folder / "config.json").is_file():
                return folder
    raise CheckpointError(
        f"{name}: expected a checkpoint folder or one of {', '.join(bundled_models())}"
    )


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Turn an error of the system or of safetensors into a CheckpointError that names the path."""
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: expected a safetensors header, got one that is broken: {error}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


@contextmanager
def reading_config(folder: Path) -> Iterator[None]:
    """Turn a missing key or an invalid value of `config.json` into a CheckpointError."""
    path = folder / "config.json"
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: expected key {error}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, and move the file that is written there to `path` at the end.

    Readers of `path` find the old file or the whole new one. If the block fails, the old file stays
    and the new one is removed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` with the format's version, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"format_version": FORMAT_VERSION, **config})


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes. CheckpointError if the file cannot be read."""
    digest = hashlib.sha256()
    with _reading(path):
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise CheckpointError(f"{path}: expected a file, got a folder, a pipe or a device")
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def check_digest(path: Path, expected: str) -> None:
    """Raise CheckpointError unless a file has the SHA-256 `expected`."""
    if (found := file_digest(path)) != expected:
        raise CheckpointError(
            f"{path}: expected SHA-256 {expected}, as config.json says, got {found}; "
            "copy or make the file again"
        )


def load_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` without its version. CheckpointError if it is missing or does not fit."""
    path = folder / "config.json"
    try:
        with _reading(path):
            if not path.is_file():
                raise CheckpointError(f"{folder}: expected a checkpoint folder with config.json")
            config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from None
    version = config.pop("format_version", None) if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: expected format_version {FORMAT_VERSION}, got {version}")
    return config


def check_generator(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if `config.json` describes an autoencoder alone."""
    if "model" not in config:
        raise CheckpointError(
            f"{folder}: expected a checkpoint with a generator, got an autoencoder alone; pass "
            "another one, such as tiny-world"
        )


def tuples(value: Any) -> Any:
    """Return a part of a JSON configuration with tuples for its lists.

    JSON has no tuples, and our configurations have no lists.
    """
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def save_module(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write a module's parameters and persistent buffers, whole or not at all.

    dtype: of the floating-point tensors on the disk; None keeps theirs.
    """
    tensors = {}
    for name, tensor in module.state_dict().items():
        cast = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.detach().cpu().to(cast).contiguous()
    save_tensors(path, tensors)


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all. OSError if they cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode
            save_file(tensors, partial, metadata)
            partial.chmod(mode)  # safetensors would let nobody else read
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from None


def load_module(path: Path, module: nn.Module) -> None:
    """Fill a module from the file `path`, which must hold every tensor in the module's shape.

    Raises CheckpointError with the file and the first tensor that is truncated, missing, unexpected
    or of another shape; the module is then unchanged.
    """
    fill_module(path, read_tensors(path), module)


def fill_module(path: Path, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
    """Fill a module with the tensors that were read from `path`. Errors: see `load_module`."""
    wanted = module.state_dict()
    check_shapes(path, _shapes(tensors), _shapes(wanted))
    module.load_state_dict({name: tensors[name].to(wanted[name].dtype) for name in wanted})


def load_meta_module(
    path: Path, module: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None
) -> None:
    """Move a module from the meta device to `device`, and fill it from the file `path`.

    Tensors are read one at a time, so that the host holds at most one of them. dtype: of the
    module's floating-point tensors; None keeps theirs. Raises CheckpointError as `load_module`
    does, before memory is allocated.
    """
    check_header(path)
    with _reading(path), safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        check_shapes(path, shapes, _shapes(module.state_dict()))
        if dtype is not None:
            module.to(dtype)
        module.to_empty(device=device)
    with _reading(path), torch.no_grad():
        for name, tensor in module.state_dict().items():
            # A file that stays open keeps every page in memory that was read from it
            with safe_open(path, framework="pt") as file:
                tensor.copy_(file.get_tensor(name))


def check_shapes(
    path: Path, given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError for the first tensor that is missing, unexpected or of another shape.

    given, wanted: shapes by the names of tensors, in the file and in the module.
    """
    for name, shape in wanted.items():
        if name not in given:
            raise CheckpointError(f"{path}: expected tensor {name}, which is missing")
        if given[name] != shape:
            raise CheckpointError(f"{path}: {name}: expected {shape}, got {given[name]}")
    for name in given:
        if name not in wanted:
            raise CheckpointError(f"{path}: tensor {name} belongs to no parameter of the model")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file. Raises as `check_header` does."""
    check_header(path)
    with _reading(path):
        return load_file(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file or of a PyTorch file that holds nothing else.

    Of a PyTorch file, the dictionaries that WRAPPERS names are opened, and the tensors stay on the
    disk until they are used. CheckpointError if the file is missing, broken, or holds other objects
    than tensors.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)
    with _reading(path):
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a file of weights, which is missing")
        try:
            weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # zip, pickle and PyTorch raise their own kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path}: expected a file of torch.save with tensors alone: {reason}"
            ) from None
    while isinstance(weights, dict) and (inner := _wrapped(weights)) is not None:
        weights = inner
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{path}: expected tensors by name, got {type(weights).__name__}")
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name}: expected a tensor, got {type(tensor).__name__}")
    return weights


def _wrapped(weights: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the dictionary that a dictionary of weights is wrapped in, None if there is none."""
    for name in WRAPPERS:
        if isinstance(weights.get(name), dict):
            return weights[name]
    return None


def check_header(path: Path) -> None:
    """Raise CheckpointError unless the file is safetensors and holds every byte of its tensors."""
    with _reading(path):
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a safetensors file, which is missing")
        size = path.stat().st_size
        try:
            _check_length(path, size)
        except CheckpointError:
            raise
        except (struct.error, LookupError, TypeError, AttributeError, ValueError):
            raise CheckpointError(
                f"{path}: expected a safetensors header, got a truncated or foreign file of "
                f"{size} bytes"
            ) from None


def _check_length(path: Path, size: int) -> None:
    """Raise CheckpointError for the first tensor of the header that ends after the file."""
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(header_size, size)))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        end = 8 + header_size + entry["data_offsets"][1]
        if end > size:
            raise CheckpointError(
                f"{path}: {name}: expected {end} bytes up to its end, got a file of {size} bytes"
            )
