"""A checkpoint of ours with its linear layers in 8 bits."""

import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import (
    CheckpointError,
    check_generator,
    file_digest,
    find_checkpoint,
    load_config,
    reading_config,
    save_config,
    tuples,
)
from ..model.config import CameraConfig, ModelConfig
from ..model.float8 import BLOCK, dequantise_weight, quantise_blocks, quantise_weight
from ..model.world_model import WorldModel
from ..vae.folder import LIGHT, ORIGINAL
from .tensor_files import StoredTensor, find_tensors
from .writer import Pending, write_pending

SCALE = "_scale"  # after the name of a weight


def quantise(source: str | Path, out: Path) -> dict[str, Any]:
    """Write the checkpoint `source` to the folder `out` with e4m3 weights in its blocks
    (docs/method.md#18).

    Tensors are read, rounded and written one at a time; all others keep their precision, and the
    other files their bits. `config.json` comes last and has the SHA-256 of the weights.

    Returns what was rounded: the number of `layers` and of `weights`, `bytes` of the new file and
    `bytes_before`, and by layer the relative L2 `errors`. ValueError for a checkpoint that is
    quantised already, and for an `out` with a checkpoint; CheckpointError for weights without a
    tensor of the model.
    """
    folder = find_checkpoint(source)
    config = load_config(folder)
    if "quantised" in config:
        raise ValueError(
            f"source: expected a checkpoint in its own precision, got {folder}, which is in 8 "
            "bits; pass the checkpoint that it was made from"
        )
    if (out / "config.json").exists():
        raise ValueError(
            f"out: expected a folder without a checkpoint, got {out} with config.json; "
            "pass another folder"
        )
    check_generator(folder, config)
    with reading_config(folder), torch.device("meta"):
        camera = config["camera"] and CameraConfig(**config["camera"])
        model = WorldModel(ModelConfig(**tuples(config["model"])), camera)
        quantise_blocks(model.transformer)
    file, before = out / "model.safetensors", folder / "model.safetensors"
    stored, errors = find_tensors(before, ()), {}
    for name in model.state_dict():
        if not name.endswith(SCALE) and name not in stored:
            raise CheckpointError(f"{before}: expected tensor {name}, which is missing")
    pending = {
        name: _pending(name, tensor, stored, errors) for name, tensor in model.state_dict().items()
    }
    out.mkdir(parents=True, exist_ok=True)
    for name in _other_files(config):
        shutil.copyfile(folder / name, out / name)
    write_pending(file, pending)
    if text := config.get("text"):
        config["text"] = str((folder / text).resolve())
    save_config(out, config | {"quantised": {"block": BLOCK, "sha256": file_digest(file)}})
    rounded = [tensor for name, tensor in pending.items() if name + SCALE in pending]
    return {
        "layers": len(rounded),
        "weights": sum(tensor.bytes for tensor in rounded),  # one byte each
        "bytes": file.stat().st_size,
        "bytes_before": before.stat().st_size,
        "errors": errors,
    }


def _pending(
    name: str, wanted: torch.Tensor, stored: dict[str, StoredTensor], errors: dict[str, float]
) -> Pending:
    """Return a tensor to be made when it is written. The error of a rounded weight is recorded."""
    shape = tuple(wanted.shape)
    if wanted.dtype == torch.float8_e4m3fn:

        def values() -> torch.Tensor:
            weight = stored[name].read()
            made = quantise_weight(weight)
            rest = dequantise_weight(*made) - weight
            errors[name] = float(rest.norm() / weight.float().norm().clamp(min=1e-30))
            return made[0]

        return Pending(shape, wanted.dtype, values)
    if name.endswith(SCALE):
        weight = stored[name.removesuffix(SCALE)]
        return Pending(shape, wanted.dtype, lambda: quantise_weight(weight.read())[1])
    return Pending(shape, stored[name].dtype, stored[name].read)


def _other_files(config: dict[str, Any]) -> list[str]:
    """Return the files of a checkpoint beside its weights: autoencoders and images."""
    images = [*filter(None, [config.get("sample")]), *config.get("gallery", [])]
    parts = [f"{part}.safetensors" for part in (LIGHT, ORIGINAL) if part in config]
    return parts + [Path(entry["image"]).name for entry in images]
