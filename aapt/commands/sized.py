"""Models that commands measure or predict: checkpoints, and presets with random weights."""

from typing import Annotated

import typer

from ..placement import placement
from .shared import bad_input, load

Fp8 = Annotated[
    bool,
    typer.Option(
        "--fp8",
        help="Round linear layers to 8 bits first; with --predict attention too.",
    ),
]


def load_to_time(
    model: str, device: str | None, dtype: str | None, size: str | None, fp8: bool, cache: str
):
    """Load a checkpoint as `load` does, or build a preset with random weights; `fp8` rounds the
    linear layers of their blocks, `cache` names the cache of streams."""
    from ..evaluate.random_weights import random_generator
    from ..model.caches import check_name
    from ..model.float8 import quantise_blocks
    from ..model.presets import PRESETS

    with bad_input():
        check_name(cache)
    if model in PRESETS:
        with bad_input():
            generator = random_generator(model, **placement(device, dtype, size))
    else:
        generator = load(model, device, dtype, size)
    with bad_input():
        generator.use_cache(cache)
    if fp8:
        quantise_blocks(generator.model.transformer)
    return generator


def load_to_predict(model: str, size: str | None, fp8: bool, **given):
    """Load a checkpoint or a preset without its weights, in bfloat16, with `fp8` in 8 bits.

    given: options that a prediction does not take; InputError for one with a value.
    """
    import torch

    from ..evaluate.random_weights import random_generator
    from ..model.float8 import quantise_blocks
    from ..model.presets import PRESETS
    from ..streaming.generator import StreamingGenerator

    with bad_input():
        for name in (name for name, value in given.items() if value):
            raise ValueError(f"{name}: expected none with --predict, which times nothing")
        size = placement(None, None, size)["size"]
        make = random_generator if model in PRESETS else StreamingGenerator.from_pretrained
        generator = make(model, "meta", torch.bfloat16, size)
    if fp8:
        quantise_blocks(generator.model.transformer)
    return generator


def ranks_of_torchrun(context: int, **given):
    """Join the ranks that torchrun has started, `context` to a frame.

    given: options that a rank does not take, because it has a GPU of its own and prints one figure.
    InputError for one with a value, and for another number of ranks.
    """
    from ..runs.parallel import Parallel

    with bad_input():
        for name in (name for name, value in given.items() if value):
            raise ValueError(f"{name}: expected none with --context, got one; remove it")
        return Parallel.from_environment(context)
