"""The two ways of a few-step model from one time to the next (docs/method.md#15)."""

import math
from collections.abc import Sequence

from torch import Tensor


class NewNoise:
    """Mixes each estimate of the clean chunk with new noise.

    Args:
        times: Times of the passes, falling.
        noise: Draws (len(times), B, C, n, H, W), the first of which is the chunk at times[0].
    """

    def __init__(self, times: Sequence[float], noise: Tensor):
        self.times, self.noise, self.made = times, noise, 0

    def next(self, estimate: Tensor) -> Tensor:
        """Returns the chunk at the next time, from the estimate (B, C, n, H, W) at this one."""
        self.made += 1
        time = self.times[self.made]
        return (1 - time) * estimate + time * self.noise[self.made].to(estimate.dtype)


class UniPC:
    """Moves the chunk along the probability flow, with two steps of memory and no new noise.

    UniPC of order 2 on estimates of the clean chunk, with B(h) = e^h - 1: section 3 of "UniPC: A
    Unified Predictor-Corrector Framework" (arXiv 2302.04867). Each new estimate first corrects the
    move before. The last estimate is the result, because the step to time 0 has order 1.

    Args:
        times: Times of the passes, falling, below 1.
        noise: One draw (1, B, C, n, H, W), the chunk at times[0].
    """

    def __init__(self, times: Sequence[float], noise: Tensor):
        self.times, self.chunk = times, noise[0]
        self.estimates: list[Tensor] = []

    def next(self, estimate: Tensor) -> Tensor:
        """Returns the chunk at the next time, from the estimate (B, C, n, H, W) at this one."""
        self.estimates.append(estimate)
        if len(self.estimates) > 1:
            self.chunk = self._move(len(self.estimates) - 2)
        return self._move(len(self.estimates) - 1)

    def _move(self, start: int) -> Tensor:
        """Returns the chunk at the time after times[start], from the corrected one at times[start].

        The estimate is taken as a line over the move. Its slope comes from the estimate before the
        move, and also from the estimate after it once that is known.
        """
        now, then = self.times[start : start + 2]
        step = _log_ratio(then) - _log_ratio(now)
        line, corrects = self.estimates[start], start + 1 < len(self.estimates)
        before, after = 0.5, 0.5  # weight of a slope that is the only one
        if start > 0:
            back = (_log_ratio(self.times[start - 1]) - _log_ratio(now)) / step
            if corrects:
                before, after = _corrector(step, back)
            slope = (self.estimates[start - 1] - self.estimates[start]) / back
            line = line + before * slope
        if corrects:
            line = line + after * (self.estimates[start + 1] - self.estimates[start])
        return then / now * self.chunk.to(line.dtype) - (1 - then) * math.expm1(-step) * line


def _log_ratio(time: float) -> float:
    """Returns the logarithm of signal to noise at a time, in which UniPC measures its steps."""
    return math.log((1 - time) / time)


def _corrector(step: float, back: float) -> tuple[float, float]:
    """Returns the weights b and a of the slopes before and after a move of length `step`, whose
    earlier estimate is at `back` < 0 of that length: b + a = c1 and back b + a = c2."""
    first = -1 / step - 1 / math.expm1(-step)
    second = -2 * first / step - 1 / math.expm1(-step)
    before = (first - second) / (1 - back)
    return before, first - before
