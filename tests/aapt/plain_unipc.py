"""UniPC written again from its publication (arXiv 2302.04867, algorithms 1 and 2), for estimates of
the data and B(h) = e^h - 1: every coefficient is solved from the system of equation 5."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def told(time: float) -> float:
    """The time that Wan's sampler tells the network: whole thousandths."""
    return int(1000 * time) / 1000


def unipc(
    estimate: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float], order: int = 2
) -> Tensor:
    """The clean x, from x at times[0]. estimate: of the clean x, from x at a time."""
    data, corrected = [estimate(x, times[0])], x
    for index in range(1, len(times)):
        rank = min(order, index)
        x = move(corrected, times, data, index - 1, rank, known=False)
        data.append(estimate(x, times[index]))
        corrected = move(corrected, times, data, index - 1, rank, known=True)
    return data[-1]  # a step of order 1 to time 0


def move(
    x: Tensor, times: Sequence[float], data: list[Tensor], start: int, order: int, known: bool
) -> Tensor:
    """From times[start] to the next time, with the estimates of `order` times up to start, and the
    one of the next time if it is known."""
    level = [math.log((1 - t) / t) for t in times]
    h = level[start + 1] - level[start]
    others = [start - i for i in range(1, order)] + [start + 1] * known
    ratios = [(level[i] - level[start]) / h for i in others]
    slopes = [(data[i] - data[start]) / r for i, r in zip(others, ratios, strict=True)]
    count = len(others)
    phi, targets = math.expm1(-h) / -h, []
    for k in range(1, count + 1):
        phi = (phi - 1 / math.factorial(k)) / -h
        targets.append(phi * math.factorial(k) * -h / math.expm1(-h))
    if count < 2:
        weights = [0.5] * count  # solves the system to its order, as the paper's remark has it
    else:
        powers = torch.tensor([[r**k for r in ratios] for k in range(count)], dtype=torch.float64)
        weights = torch.linalg.solve(powers, torch.tensor(targets, dtype=torch.float64)).tolist()
    bend = sum(w * s for w, s in zip(weights, slopes, strict=True))
    signal, noise = 1 - times[start + 1], times[start + 1] / times[start]
    return noise * x - signal * math.expm1(-h) * (data[start] + bend)
