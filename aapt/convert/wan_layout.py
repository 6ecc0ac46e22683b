"""Layout of a Wan transformer in our model: which of its tensors makes which of ours, and how.

Nothing is computed. Wan rotates pairs of neighbours and `aapt_kernels` rotates halves, so the rows
of self-attention's q and k are put in that order. Projections of one input become one, and the
patch embedding's columns are put in our order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from ..model.config import ModelConfig
from .kinds import Kind

HEAD_DIM = 128  # of every Wan
ROPE_AXES = (44, 42, 42)  # time, rows, columns
TEXT_TOKENS = 512
TIME_FREQUENCIES = 256


@dataclass(frozen=True)
class Made:
    """One of our tensors: Wan's names of the tensors it is made of, and the call that makes it."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]


def model_config(shapes: Mapping[str, Sequence[int]], kind: Kind, source: str) -> ModelConfig:
    """Return the configuration of a Wan transformer whose tensors have these shapes.

    source: for errors. CheckpointError for a tensor that is missing or does not fit a Wan that
    makes video from text.
    """

    def shape(name: str, *expected: int | None) -> Sequence[int]:
        """Return a tensor's shape; None in `expected` is any size."""
        if name not in shapes:
            raise CheckpointError(
                f"{source}: expected tensor {name}, which is missing; pass a Wan transformer"
            )
        given = tuple(shapes[name])
        fits = len(given) == len(expected) and all(
            want in (None, have) for want, have in zip(expected, given, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            raise CheckpointError(f"{source}: {name}: expected ({wanted}), got {given}")
        return given

    width, inputs, *_ = shape("patch_embedding.weight", None, None, 1, 2, 2)
    outputs = shape("head.head.weight", None, width)[0] // 4
    if inputs != outputs:
        raise CheckpointError(
            f"{source}: patch_embedding.weight: expected {outputs} input channels as for text to "
            f"video, got {inputs}; models that take pictures as channels are not supported"
        )
    if width % HEAD_DIM:
        raise CheckpointError(
            f"{source}: patch_embedding.weight: expected a multiple of {HEAD_DIM} rows, the width "
            f"of a head, got {width}"
        )
    shape("time_embedding.0.weight", width, TIME_FREQUENCIES)
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return ModelConfig(
        block="wan",
        width=width,
        heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
        depth=len(blocks),
        mlp_width=shape("blocks.0.ffn.0.weight", None, width)[0],
        text_width=shape("text_embedding.0.weight", width, None)[1],
        text_tokens=TEXT_TOKENS,
        text_encoder="umt5",
        latent_channels=outputs,
        recycle=False,
        reference_grid=None,
        rope_axes=ROPE_AXES,
        chunk=kind.chunk,
        window_frames=kind.window_frames,
        sink_frames=kind.sink_frames,
        sink_distance=kind.sink_distance,
    )


def layout(config: ModelConfig) -> dict[str, Made]:
    """Return how each tensor of a `WanTransformer` of this configuration is made."""
    halves = partial(to_halves, heads=config.heads)

    def qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([halves(q), halves(k), v])

    def head_rows(weight: Tensor) -> Tensor:
        return halves(weight).unflatten(0, (config.heads, -1))

    made = {
        "video_in.weight": Made(("patch_embedding.weight",), patch_columns),
        "video_in.bias": Made(("patch_embedding.bias",), _same),
        "out_table": Made(("head.modulation",), _first),
    }
    linear = {
        "text_in.0": "text_embedding.0",
        "text_in.2": "text_embedding.2",
        "time.up": "time_embedding.0",
        "time.down": "time_embedding.2",
        "video_modulation": "time_projection.1",
        "video_out": "head.head",
    }
    for index in range(config.depth):
        block = f"blocks.{index}"
        own, cross = f"{block}.self_attn", f"{block}.cross_attn"
        linear |= {
            f"{block}.video.out": f"{own}.o",
            f"{block}.video.mlp_up": f"{block}.ffn.0",
            f"{block}.video.mlp_down": f"{block}.ffn.2",
            f"{block}.cross.q": f"{cross}.q",
            f"{block}.cross.out": f"{cross}.o",
            f"{block}.cross.norm": f"{block}.norm3",
        }
        made[f"{block}.video.modulation_bias"] = Made((f"{block}.modulation",), _first)
        for part in ("weight", "bias"):
            three = tuple(f"{own}.{name}.{part}" for name in "qkv")
            made[f"{block}.video.qkv.{part}"] = Made(three, qkv)
            two = tuple(f"{cross}.{name}.{part}" for name in "kv")
            made[f"{block}.cross.text_kv.{part}"] = Made(two, joined)
        for name in "qk":
            norm = f"norm_{name}.weight"
            made[f"{block}.video.{name}_norm"] = Made((f"{own}.{norm}",), head_rows)
            made[f"{block}.cross.{name}_norm"] = Made((f"{cross}.{norm}",), _same)
    for ours, wans in linear.items():
        for part in ("weight", "bias"):
            made[f"{ours}.{part}"] = Made((f"{wans}.{part}",), _same)
    return made


def recycling(config: ModelConfig, made: Mapping[str, Made], columns: str):
    """Return the configuration and layout of a start for AAPT: one frame per step, whose input has
    channels for the frame before (docs/method.md#2).

    columns: of those channels in the patch embedding, "zero", so that the model computes what it
    did, or "random", as a new layer's. The window becomes the first frame and as many others as
    Wan is trained on, and the first frame's distance is clamped (docs/method.md#12).
    """
    window = config.window_frames + config.sink_frames - 1
    start = replace(
        config,
        recycle=True,
        chunk=1,
        sink_frames=1,
        window_frames=window,
        sink_distance="clamped",
    )
    name = "video_in.weight"
    widen = partial(_widened, made[name].make, config.latent_channels, columns == "random")
    return start, {**made, name: Made(made[name].names, widen)}


def to_halves(rows: Tensor, heads: int) -> Tensor:
    """Return rows (heads x head_dim, ...) whose pairs of neighbours are split into two halves."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def patch_columns(weight: Tensor) -> Tensor:
    """Return the weight (width, C, 1, 2, 2) of a patch embedding as (width, 2 x 2 x C)."""
    return weight[:, :, 0].permute(0, 2, 3, 1).flatten(1)


def joined(k: Tensor, v: Tensor) -> Tensor:
    """Return the rows of both projections of the text, as one."""
    return torch.cat([k, v])


def _widened(make: Callable[..., Tensor], channels: int, random: bool, weight: Tensor) -> Tensor:
    """Return patch columns with twice the channels; the new ones follow the old ones of each
    pixel."""
    given = make(weight).unflatten(1, (-1, channels))
    new = torch.zeros_like(given)
    if random and not given.is_meta:
        bound = (2 * given[0].numel()) ** -0.5  # as a linear layer with that many inputs begins
        new.uniform_(-bound, bound, generator=torch.Generator().manual_seed(0))
    return torch.cat([given, new], dim=-1).flatten(1)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _first(tensor: Tensor) -> Tensor:
    return tensor[0]
