"""Sizes of models, as functions by name."""

from collections.abc import Callable

from .config import ModelConfig


def aapt_8b() -> ModelConfig:
    """The paper's generator (docs/method.md#1 and #2).

    It sees N = 30 past frames at 736x416, N = 15 at 1280x720.
    """
    return ModelConfig(
        width=3072,
        heads=24,
        head_dim=128,
        depth=36,
        text_width=4096,
        text_tokens=512,
        window_frames=30,
        reference_grid=(26, 46),
        rope_axes=(16, 56, 56),
        grid_windows=((45, 80, 15),),
    )


def aapt_2b() -> ModelConfig:
    """A generator for 1280x720 at 60 fps on one H100 (docs/method.md#14).

    It sees N = 15 past frames at 736x416, and N = 6, one second, at 1280x720. 16 heads divide among
    2, 4, 8 or 16 GPUs.
    """
    return ModelConfig(
        width=2048,
        heads=16,
        head_dim=128,
        depth=20,
        text_width=4096,
        text_tokens=512,
        window_frames=15,
        reference_grid=(45, 80),
        rope_axes=(16, 56, 56),
        grid_windows=((45, 80, 6),),
    )


def aapt_small() -> ModelConfig:
    """A network for timing on a CPU.

    At 256x160 the attention of a step has 2.1 times the operations of its products, as in `aapt_8b`
    at 736x416.
    """
    return ModelConfig(
        width=256,
        heads=2,
        head_dim=128,
        depth=4,
        text_width=32,
        text_tokens=64,
        window_frames=18,
        reference_grid=(10, 16),
        rope_axes=(16, 56, 56),
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "aapt-8b": aapt_8b,
    "aapt-2b": aapt_2b,
    "aapt-small": aapt_small,
}
