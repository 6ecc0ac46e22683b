"""The state of training on disk: what a run needs to go on, bit for bit, where it was stopped.

    done = load_training_state(folder, stage.trained, parallel)
    for step in range(done, stage.steps):
        ...
        save_training_state(folder, step + 1, stage.trained, parallel)

Every rank writes its shards (torch.distributed.checkpoint) to a folder that all ranks see, and any
number of ranks can read them.
There is no random state (`randomness.py`), and no hyperparameter is read: the recipe has them.
"""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..checkpoint import CheckpointError
from ..training.optimization import MuonAdamW, Trained
from .parallel import Parallel

KEPT = 2  # states; the newest may turn out to be damaged
MANIFEST = "manifest.json"


def save_training_state(
    folder: Path, step: int, trained: Mapping[str, Trained], parallel: Parallel
) -> Path:
    """Write the state after `step` updates to a folder of its own in `folder`, whole or not at all;
    drop all but the last two. Every rank calls it.

    A kill at any moment leaves the states before it loadable. OSError or CheckpointError, on every
    rank, where something cannot be written.
    """
    state = folder / f"step-{step:08d}"
    partial = state.with_name(state.name + ".partial")
    _together(parallel, lambda: _prepare(partial) if parallel.main else None)
    with _transfer(partial):
        dcp.save(_tensors(trained), storage_writer=dcp.FileSystemWriter(partial))
    written = _together(parallel, lambda: _checksums(partial, f"__{parallel.rank}_*"))
    _together(parallel, lambda: _publish(partial, state, written) if parallel.main else None)
    return state


def load_training_state(folder: Path, trained: Mapping[str, Trained], parallel: Parallel) -> int:
    """Fill `trained` with the newest state in `folder` that is whole. Every rank calls it.

    Returns how many updates it has seen, 0 if there is no state. One that is damaged is skipped
    with a warning. CheckpointError if all are, or if the state is not of these networks and
    optimizers, which then are unchanged.
    """
    names = [state.name for state in _states(folder)] if parallel.main else None
    names = parallel.agree(names)
    for name in reversed(names):
        state = folder / name
        damage = [said for said in parallel.collect(_damage(state, parallel)) if said]
        if not damage:
            _read(state, trained)
            return int(name.removeprefix("step-"))
        if parallel.main:
            warnings.warn(f"{damage[0]}; trying the state before", stacklevel=2)
    if names:
        raise CheckpointError(f"{folder}: expected a whole state, got damaged ones only")
    return 0


def _tensors(trained: Mapping[str, Trained]) -> dict[str, Tensor]:
    """The state of all that is trained, flat."""
    tensors = {}
    for name, part in trained.items():
        tensors |= {f"{name}.module.{key}": x for key, x in part.module.state_dict().items()}
        for index, (parameter, states) in enumerate(_slots(part)):
            prefix = f"{name}.optimizer.{index}"
            tensors |= {f"{prefix}.{key}": x for key, x in states.get(parameter, {}).items()}
        if part.average:
            tensors |= {f"{name}.average.{key}": x for key, x in part.average.shadow.items()}
            tensors[f"{name}.averaged"] = torch.tensor(part.average.updates)
    return tensors


def _slots(part: Trained) -> Iterator[tuple[Tensor, dict]]:
    """Every parameter with the state it is a key of, in an order that only the model decides."""
    muon = isinstance(part.optimizer, MuonAdamW)
    for optimizer in part.optimizer.optimizers if muon else [part.optimizer]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, optimizer.state


def _read(state: Path, trained: Mapping[str, Trained]) -> None:
    saved = dcp.FileSystemReader(state).read_metadata().state_dict_metadata
    # An optimizer has no state before its first step: the file says which parameters have one.
    optimizers: list[tuple[dict, Tensor, dict[str, Tensor]]] = []
    wanted = {key: x for key, x in _tensors(trained).items() if ".optimizer." not in key}
    for name, part in trained.items():
        for index, (parameter, states) in enumerate(_slots(part)):
            prefix = f"{name}.optimizer.{index}."
            tensors = {
                key.removeprefix(prefix): _blank(saved[key], parameter)
                for key in saved
                if key.startswith(prefix)
            }
            optimizers.append((states, parameter, tensors))
            wanted |= {prefix + key: tensor for key, tensor in tensors.items()}
    for key, tensor in wanted.items():
        if key not in saved:
            raise CheckpointError(f"{state}: expected tensor {key}, which is missing")
        if saved[key].size != tensor.shape:
            raise CheckpointError(
                f"{state}: {key}: expected {tuple(tensor.shape)}, got {tuple(saved[key].size)}"
            )
    for key in saved:
        if key not in wanted:
            raise CheckpointError(f"{state}: tensor {key} belongs to none of {', '.join(trained)}")
    with _transfer(state):
        dcp.load(wanted, storage_reader=dcp.FileSystemReader(state))
    for states, parameter, tensors in optimizers:
        states.pop(parameter, None)
        if tensors:
            states[parameter] = tensors
    for name, part in trained.items():
        if part.average:
            part.average.updates = int(wanted[f"{name}.averaged"])


def _blank(saved: Any, parameter: Tensor) -> Tensor:
    """Room for a tensor of the file: sharded as its parameter is, if it has its shape."""
    if saved.size == parameter.shape:
        return torch.empty_like(parameter, dtype=saved.properties.dtype, requires_grad=False)
    return torch.empty(saved.size, dtype=saved.properties.dtype)


def _states(folder: Path) -> list[Path]:
    """Finished states, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def _prepare(partial: Path) -> None:
    for leftover in partial.parent.glob("step-*.partial"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def _publish(partial: Path, state: Path, written: list[dict[str, list[int]]]) -> None:
    """Make what all ranks have written a state: everything is on disk before it has its name."""
    files = _checksums(partial, ".metadata")
    for part in written:
        files |= part
    with (partial / MANIFEST).open("w") as file:
        json.dump(files, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    if state.exists():  # damaged, or the run would have started from it
        state.rename(state.with_name(state.name + ".old.partial"))
    partial.rename(state)
    _sync(state.parent)
    older = [other for other in _states(state.parent) if other.name <= state.name]
    for path in (*older[:-KEPT], *state.parent.glob("*.old.partial")):
        shutil.rmtree(path)


def _checksums(folder: Path, pattern: str) -> dict[str, list[int]]:
    """Size and CRC-32 of the files that match."""
    return {path.name: _checksum(path) for path in folder.glob(pattern)}


def _checksum(path: Path) -> list[int]:
    size = total = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            size, total = size + len(chunk), zlib.crc32(chunk, total)
    return [size, total]


def _damage(state: Path, parallel: Parallel) -> str | None:
    """What is wrong with this rank's share of the files of a state."""
    try:
        files = json.loads((state / MANIFEST).read_text())
        for name in sorted(files)[parallel.rank :: parallel.world]:
            found = _checksum(state / name)
            if found != files[name]:
                return (
                    f"{state / name}: expected {files[name][0]} bytes with checksum "
                    f"{files[name][1]:08x}, got {found[0]} bytes with {found[1]:08x}"
                )
    except OSError as error:
        return f"{error.filename}: expected a file of the state: {error.strerror}"
    except (ValueError, TypeError, LookupError):
        return f"{state / MANIFEST}: expected sizes and checksums"
    return None


def _together(parallel: Parallel, work: Callable[[], Any]) -> list:
    """Every rank's result, once all have one; an OSError of one of them is raised by all."""
    try:
        result = work()
    except OSError as error:
        result = error
    results = parallel.collect(result)
    for result in results:
        if isinstance(result, OSError):
            raise result
    return results


@contextmanager
def _transfer(path: Path) -> Iterator[None]:
    """One process is no reason for a warning; what fails on a rank is an Exception on all."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        if not isinstance(failure, OSError):
            failure = CheckpointError(f"{path}: {failure}")
        raise failure from None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
