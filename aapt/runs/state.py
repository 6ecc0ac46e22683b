"""The state of training on disk: all that a run needs to resume bit for bit where it ended.

    done = load_training_state(folder, stage.trained, parallel)
    for step in range(done, stage.steps):
        ...
        save_training_state(folder, step + 1, stage.trained, parallel)

Every rank writes its shards (torch.distributed.checkpoint) to a folder that all ranks see. Any
number of ranks can read them. A state holds no random numbers, because they depend on the clip and
the update alone (`data/randomness.py`), and no hyperparameters, because the recipe has them.
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

KEPT = 2  # states, in case the newest is damaged
MANIFEST = "manifest.json"


def save_training_state(
    folder: Path, step: int, trained: Mapping[str, Trained], parallel: Parallel
) -> Path:
    """Write the state after `step` updates, and drop all states but the last two.

    Every rank calls it. The state is a folder of its own in `folder`, written whole or not at all:
    after a kill at any moment the states before it can be loaded. Raises OSError or CheckpointError
    on every rank if one rank cannot write.
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
    """Fill `trained` with the newest undamaged state in `folder`. Every rank calls it.

    A damaged state is skipped with a warning. Returns the number of updates of the state, 0 if
    there is no state. Raises CheckpointError if all states are damaged, or if the state is not of
    these networks and optimizers. Networks and optimizers are then unchanged.
    """
    names = [state.name for state in _states(folder)] if parallel.main else None
    names = parallel.agree(names)
    for name in reversed(names):
        state = folder / name
        damage = [found for found in parallel.collect(_damage(state, parallel)) if found]
        if not damage:
            _read(state, trained)
            return int(name.removeprefix("step-"))
        if parallel.main:
            warnings.warn(f"{damage[0]}; trying the state before", stacklevel=2)
    if names:
        raise CheckpointError(f"{folder}: expected a whole state, got damaged ones only")
    return 0


def _tensors(trained: Mapping[str, Trained]) -> dict[str, Tensor]:
    """The tensors of all networks, optimizers and averages, by flat names."""
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
    """Every parameter with the optimizer state that it is a key of, in the model's order."""
    muon = isinstance(part.optimizer, MuonAdamW)
    for optimizer in part.optimizer.optimizers if muon else [part.optimizer]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, optimizer.state


def _read(state: Path, trained: Mapping[str, Trained]) -> None:
    saved = dcp.FileSystemReader(state).read_metadata().state_dict_metadata
    # Before its first step an optimizer has no state, so the file says which parameters have one.
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
    """An empty tensor to read into, sharded as the parameter is if it has the same rows."""
    dtype = saved.properties.dtype
    if saved.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if len(saved.size) == 2 and saved.size[0] == len(parameter):  # scales of moments in 8 bits
        rows = parameter.detach().flatten(1)[:, :1].expand(saved.size)
        return torch.empty_like(rows, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.empty(saved.size, dtype=dtype)


def _states(folder: Path) -> list[Path]:
    """Finished states, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def _prepare(partial: Path) -> None:
    for leftover in partial.parent.glob("step-*.partial"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def _publish(partial: Path, state: Path, written: list[dict[str, list[int]]]) -> None:
    """Give the files that all ranks have written the name of a state, once all are on the disk."""
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
    """Size and CRC-32 of the files that match a pattern."""
    return {path.name: _checksum(path) for path in folder.glob(pattern)}


def _checksum(path: Path) -> list[int]:
    size = total = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            size, total = size + len(chunk), zlib.crc32(chunk, total)
    return [size, total]


def _damage(state: Path, parallel: Parallel) -> str | None:
    """The first damage in this rank's share of the files of a state; None if there is none."""
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
    """Run `work` on every rank and return all results. An OSError of one rank is raised by all."""
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
    """Silence the warning about a single process, and turn a rank's failure into an Exception."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise _of_the_system(failure) or CheckpointError(f"{path}: {failure}") from None


def _of_the_system(failure: BaseException | None) -> OSError | None:
    """The system's error behind a failure; None if there is none.

    On a full disk PyTorch's writer fails once more when it closes its file, with an error of its
    own about positions.
    """
    while failure is not None and not isinstance(failure, OSError):
        failure = failure.__cause__ or failure.__context__
    return failure


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
