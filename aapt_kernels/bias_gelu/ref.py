"""Specification: bias, then GELU in its tanh form, forward and backward.

    z = x + bias        t = tanh(sqrt(2 / pi) (z + 0.044715 z^3))       out = z (1 + t) / 2

and backwards

    dx = dout ((1 + t) / 2 + z (1 - t^2) / 2 sqrt(2 / pi) (1 + 3 0.044715 z^2))
    dbias = sum dx over all rows

Everything is computed in the dtype of x (see block_causal_attention/ref.py).
"""

import math

import torch

from ..precision import dense, widen

SLOPE, CUBE = math.sqrt(2 / math.pi), 0.044715


def forward(x, bias):
    z = x + bias
    return z * (1 + torch.tanh(SLOPE * (z + CUBE * z**3))) / 2


def backward(dout, x, bias):
    z = x + bias
    t = torch.tanh(SLOPE * (z + CUBE * z**3))
    slope = z * (1 - t.square()) * SLOPE * (1 + 3 * CUBE * z.square())
    dx = dout * (1 + t + slope) / 2
    return dx, dx.sum(tuple(range(dx.dim() - 1)))


def reference_forward(x, bias):
    return dense(forward(*widen(x, bias)), x.dtype)


def reference_backward(dout, x, bias):
    dx, dbias = backward(*widen(dout, x, bias))
    return dense(dx, x.dtype), dense(dbias, bias.dtype)
