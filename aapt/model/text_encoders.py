"""Text encoders by the name that a model's configuration gives them.

A text encoder is a module with `tokens`. Called with prompts, it returns embeddings
(B, tokens, width) and lengths (B,). Its `cut(prompt)` says what is read of a prompt that is too
long, None if all of it is read.
"""

from torch import nn

from .text import ByteTextEncoder
from .umt5 import UMT5TextEncoder

TEXT_ENCODERS: dict[str, type[nn.Module]] = {"bytes": ByteTextEncoder, "umt5": UMT5TextEncoder}


def text_encoder(name: str, tokens: int, width: int) -> nn.Module:
    """Returns a new text encoder. ValueError for an unknown name."""
    if name not in TEXT_ENCODERS:
        raise ValueError(f"text_encoder: expected one of {', '.join(TEXT_ENCODERS)}, got {name!r}")
    return TEXT_ENCODERS[name](tokens, width)
