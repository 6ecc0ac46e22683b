"""Comparison of tests, against a float64 oracle, by the error of plain PyTorch itself; and timing
of benchmarks."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


def assert_error_ratio(
    actual: Tensor, oracle: Tensor, baseline: Tensor, name: str = "output", ratio: float = 2.0
) -> None:
    """Assert max|actual - oracle| <= ratio * max|baseline - oracle| + one rounding of the largest
    value.

    oracle: computed in float64; baseline: plain PyTorch in the precision of `actual`. Infinities
    must agree exactly, and NaN fails.
    """
    assert actual.shape == oracle.shape, f"{name}: {tuple(actual.shape)} != {tuple(oracle.shape)}"
    if not oracle.numel():
        return
    oracle = oracle.double()
    finite = oracle.isfinite()
    assert torch.equal(actual.double()[~finite], oracle[~finite]), f"{name}: infinities differ"
    if not finite.any():
        return
    error = (actual.double() - oracle)[finite].abs().max()
    plain = (baseline.double() - oracle)[finite].abs().max()
    rounding = torch.finfo(actual.dtype).eps * oracle[finite].abs().max()
    bound = ratio * plain + rounding
    # NOTE: written so that a NaN error fails
    assert error <= bound, (
        f"{name}: error {error:.3g} above {bound:.3g} (plain PyTorch {plain:.3g})"
    )


class Times(NamedTuple):
    """Time of a call in seconds: the median and the middle 60 %."""

    median: float
    p20: float
    p80: float


FLUSH_BYTES = 2**30  # far beyond any L2, and long enough for the host to run ahead


def time_by_turns(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 30,
    warmup: int = 3,
) -> dict[str, Times]:
    """Time calls on `device`, alternating between the functions, so that all meet one machine.

    A CUDA device is timed between two device events, with a cold L2. The cache is flushed by
    reading, because lines left dirty by a write would be written back inside the timed region. An
    event costs a few microseconds itself; "nothing" among the functions shows how many.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    on_device = device.type == "cuda"
    timed = _time_with_events if on_device else _time_with_clock
    turns = timed(functions, device, rounds)
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return {
        name: Times(*torch.tensor(turns[name], dtype=torch.float64).quantile(quantiles).tolist())
        for name in functions
    }


def _time_with_events(functions, device, rounds) -> dict[str, list[float]]:
    flush = torch.ones(FLUSH_BYTES // 4, device=device)
    total = torch.empty((), device=device)
    events = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.sum(flush, dim=0, out=total)
            start.record()
            function()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {
        name: [1e-3 * start.elapsed_time(end) for start, end in pairs]
        for name, pairs in events.items()
    }


def _time_with_clock(functions, device, rounds) -> dict[str, list[float]]:
    turns = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            turns[name].append(time.perf_counter() - start)
    return turns
