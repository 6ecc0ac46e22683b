"""How tests compare: against a float64 oracle, by the error that plain PyTorch makes itself."""

import torch
from torch import Tensor


def assert_error_ratio(
    actual: Tensor, oracle: Tensor, baseline: Tensor, name: str = "output", ratio: float = 2.0
) -> None:
    """max|actual - oracle| <= ratio * max|baseline - oracle| + one rounding of the largest value.

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
    # NOTE: written so that a NaN error fails.
    assert error <= bound, (
        f"{name}: error {error:.3g} above {bound:.3g} (plain PyTorch {plain:.3g})"
    )
