"""Caches of keys and values that a stream can have, by name (docs/method.md#5, #16).

| name | text, first and newest frame | other frames |
|---|---|---|
| model | the model's precision | the model's precision |
| float8 | e4m3 | e4m3 |
| float8-past | the model's precision | e4m3 |

The text of a Wan model is beside its cache and always has the model's precision.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aapt_kernels import KVCache, SelfCheckError

from .config import ModelConfig
from .float8 import FORMAT, Float8Linear, dequantise_weight
from .layers import StreamWeights
from .ulysses import Ulysses

MODEL, FLOAT8, FLOAT8_PAST = "model", "float8", "float8-past"
CACHES = {  # name -> arguments of `KVCache`, for the precision of the model
    MODEL: lambda dtype: {"dtype": dtype},
    FLOAT8: lambda dtype: {"dtype": FORMAT, "compute_dtype": dtype},
    FLOAT8_PAST: lambda dtype: {"dtype": dtype, "past_dtype": FORMAT},
}
CAPABILITY = (8, 9)  # the first of CUDA devices that has e4m3
KERNEL_HEAD_DIM = 128  # the largest that a kernel takes
HADAMARD_HEAD_DIM = 32  # the least that a kernel multiplies by the Hadamard matrix
VALUE_SIZE = 4.0  # root mean square of values as stored: half way, in octaves, from 2^-6 to 448


class CacheError(ValueError):
    """Says why a model cannot have a cache, or what it loses in it."""


@dataclass(frozen=True)
class CacheChoice:
    """The cache that a transformer makes.

    Attributes:
        name: One of CACHES.
        self_check: False to leave out the check of a float8 cache at its first use.
    """

    name: str = MODEL
    self_check: bool = True

    def options(self, dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
        """Returns the arguments of `KVCache` that the choice decides, for a model of `dtype`."""
        options = CACHES[self.name](dtype)
        if self.name == MODEL:
            return options
        power_of_two = head_dim & (head_dim - 1) == 0
        use_hadamard = power_of_two and head_dim >= HADAMARD_HEAD_DIM
        return options | {"use_hadamard": use_hadamard, "self_check": self.self_check}


def check_name(name: str) -> str:
    """Returns the name of a cache. CacheError for a name not in CACHES."""
    if name not in CACHES:
        raise CacheError(f"cache: expected one of {', '.join(CACHES)}, got {name!r}"[:160])
    return name


def check_same(what: str, expected: str, given: str, mend: str) -> None:
    """CacheError, about the argument `what`, unless both names of caches are equal."""
    if given != expected:
        raise CacheError(f"{what}: expected cache {expected}, got {given}; {mend}")


def check_cache(
    name: str,
    config: ModelConfig,
    window_frames: int,
    device: torch.device,
    step_frames: int = 1,
    rolling: bool = False,
) -> None:
    """CacheError, with the mend, unless streams of a model can have the cache of this name.

    step_frames: most latent frames of a step. rolling: if two caches exchange frames.
    """
    if check_name(name) == MODEL:
        return
    if rolling:
        raise CacheError(
            f"cache: expected {MODEL} for a rolling model, which copies frames from one cache to "
            f"another, got {name}"
        )
    if name == FLOAT8_PAST and step_frames > 1:
        raise CacheError(
            f"cache: expected {MODEL} or {FLOAT8} for a model whose steps make {step_frames} "
            f"latent frames, got {name}, which takes one"
        )
    if name == FLOAT8_PAST and window_frames < 1:
        raise CacheError(
            f"cache: expected {MODEL} or {FLOAT8} for a model with a window of no frames, got "
            f"{name}, which rounds these"
        )
    if device.type != "cuda":
        return
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise CacheError(
            f"cache: expected {MODEL} on {device}, which is sm_{capability[0]}{capability[1]} and "
            f"has no float8, got {name}; take a device of sm_89 or later, or the CPU"
        )
    if config.head_dim > KERNEL_HEAD_DIM:
        raise CacheError(
            f"cache: expected {MODEL} on {device} for a head_dim above {KERNEL_HEAD_DIM}, here "
            f"{config.head_dim}, for which no kernel reads float8, got {name}"
        )


def name_of(cache: Any) -> str:
    """Returns the name of the cache of a stream or a snapshot. A rolling stream has the model's."""
    if not isinstance(cache, KVCache):
        return MODEL
    if cache.past is not None:
        return FLOAT8_PAST
    return FLOAT8 if cache.k.dtype == FORMAT else MODEL


@torch.no_grad()
def fit_scales(cache: KVCache, blocks: Iterable[torch.nn.Module], context: Ulysses) -> None:
    """Sets the scales of a float8 cache, of this rank's heads, from the weights that make keys and
    values; does nothing for another cache, nor for one on the meta device.

    The norm of keys bounds them, and the bound is stored as 448, the largest of e4m3. Values have
    no bound. Their scale is an estimate, for a normed input of independent channels. It stores them
    at VALUE_SIZE, a hundred times below the largest number, so it need not be exact.
    """
    part = cache if cache.past is None else cache.past
    if part.k_scale is None or part.k_scale.is_meta:
        return
    for layer, block in enumerate(blocks):
        streams = [x for x in block.children() if isinstance(x, StreamWeights)]
        for scale, each in ((part.k_scale, key_scale), (part.v_scale, value_scale)):
            of_heads = torch.stack([each(x) for x in streams]).amax(0)
            own = context.own_heads(of_heads[:, None])[:, 0]
            scale[layer].copy_(torch.where(own > 0, own, 1))


def key_scale(stream: StreamWeights) -> Tensor:
    """Returns the scales (heads,) float32 by which no normed and rotated key is cut."""
    weight = stream.k_norm.float()
    largest = weight.abs().amax(-1).expand(stream.heads)
    return largest * (math.sqrt(weight.numel()) / torch.finfo(FORMAT).max)


def value_scale(stream: StreamWeights) -> Tensor:
    """Returns the scales (heads,) float32 by which values are of VALUE_SIZE."""
    layer = stream.qkv
    weight = layer.weight.float()
    if isinstance(layer, Float8Linear):
        weight = dequantise_weight(layer.weight, layer.weight_scale)
    weight = weight.unflatten(0, (3, stream.heads, -1))[2]  # (heads, head_dim, width)
    bias = layer.bias.float().unflatten(0, (3, stream.heads, -1))[2]
    return (weight.square().sum(-1) + bias.square()).mean(-1).sqrt() / VALUE_SIZE


def set_self_check(cache: Any, on: bool) -> None:
    """Turns the checks of a cache on or off, and of its past."""
    for part in (cache, getattr(cache, "past", None)):
        if isinstance(part, KVCache):
            part.self_check = on


@contextmanager
def loss_is_said() -> Iterator[None]:
    """Turns the failed check of a float8 cache into a CacheError with the user's mend."""
    try:
        yield
    except SelfCheckError as error:
        raise CacheError(
            f"cache: this model loses too much in float8; choose the cache {MODEL}: {error.loss}"
        ) from error
