"""e4m3 with a scale for each row and each 128 of its channels: the input of an 8-bit product.

values, scales = quantise_rows(x)
"""

from torch import Tensor

from ..backend import deferred, implement, register_fake
from ..checks import (
    FLOATS,
    check_dense_rows,
    check_dtype,
    check_no_grad,
    check_no_tangent,
)
from ..schemas import ops
from . import ref


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of x to float8_e4m3fn, in groups of 128 channels with one scale each
    (docs/method.md#18).

    x (rows, width). A scale is the largest size in its group / 448, so nothing is cut. A group of
    zeros has the smallest scale; NaN and infinity make their own group NaN and no other.

    Returns values (rows, width), and scales (groups, rows) float32, the layout in which cuBLASLt
    takes them: x is about values * scales of its group. It has no gradient.

    Raises ValueError, TypeError or RuntimeError if the argument does not fit, and
    NotImplementedError in forward-mode differentiation.
    """
    if x.dim() != 2:
        raise ValueError(f"x: expected (rows, width), got {tuple(x.shape)}")
    check_dtype({"x": x}, FLOATS)
    check_dense_rows({"x": x})
    check_no_grad("quantise_rows", {"x": x})
    check_no_tangent("quantise_rows", {"x": x})
    return ops.quantise_rows.default(x)


@register_fake("quantise_rows")
def _(x):
    return ref.empty(x)


implement("quantise_rows", reference=ref.forward, cpu=ref.forward, triton=deferred(__name__))
