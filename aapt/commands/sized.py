"""Models that commands measure or predict: checkpoints, and presets with random weights."""

from .shared import bad_input, load, placement


def load_to_time(model: str, device: str | None, dtype: str | None, size: str | None):
    """Load a checkpoint as `load` does, or build a preset with random weights."""
    from ..evaluate.random_weights import random_generator
    from ..model.presets import PRESETS

    if model not in PRESETS:
        return load(model, device, dtype, size)
    with bad_input():
        return random_generator(model, **placement(device, dtype, size))


def load_to_predict(model: str, size: str | None, **given):
    """Load a checkpoint or a preset without its weights, in bfloat16.

    given: options that a prediction does not take; InputError for one with a value.
    """
    import torch

    from ..evaluate.random_weights import random_generator
    from ..model.presets import PRESETS
    from ..streaming.generator import StreamingGenerator

    with bad_input():
        for name in (name for name, value in given.items() if value):
            raise ValueError(f"{name}: expected none with --predict, which runs on no device")
        size = placement(None, None, size)["size"]
        make = random_generator if model in PRESETS else StreamingGenerator.from_pretrained
        return make(model, "meta", torch.bfloat16, size)
