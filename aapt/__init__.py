"""Autoregressive adversarial post-training: real-time, interactive video generation."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model.conditioning import Control
    from .model.pose import Pose
    from .streaming.generator import StreamingGenerator

__all__ = ["Control", "Pose", "StreamingGenerator"]
__version__ = "0.1.0"

_HOMES = {
    "Control": ".model.conditioning",
    "Pose": ".model.pose",
    "StreamingGenerator": ".streaming.generator",
}


def __getattr__(name: str):
    # torch takes seconds to import; `aapt --help` should not wait for it.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
