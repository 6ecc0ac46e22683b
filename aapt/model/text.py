"""Prompts as tokens: a byte-level encoder, small enough to be trained with the model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BEGIN = 256  # starts every prompt, so that an empty one is still a token to attend to


def prompt_bytes(prompt: str) -> bytes:
    """The bytes that a prompt is read as, one token each after BEGIN; case is ignored."""
    return prompt.lower().encode(errors="replace")


def prompt_cut(prompt: str, tokens: int) -> str | None:
    """Say in one line what an encoder of `tokens` tokens reads of a prompt; None if all of it."""
    encoded, limit = prompt_bytes(prompt), tokens - 1
    if len(encoded) <= limit:
        return None
    read = encoded[:limit].decode(errors="ignore")
    return f"prompt: expected at most {limit} bytes, got {len(encoded)}; only {read!r} is read"


class ByteTextEncoder(nn.Module):
    """UTF-8 bytes to embeddings.

    The text stream of the transformer does the reading; the encoder only embeds bytes and
    positions.
    """

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.tokens = tokens
        self.embedding = nn.Embedding(257, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)

    def cut(self, prompt: str) -> str | None:
        """Says what is read of a prompt that is too long, see `prompt_cut`."""
        return prompt_cut(prompt, self.tokens)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, tokens) and lengths (B,). Of `prompt_bytes` the first tokens - 1 are
        read; `aapt train` says how many clips have longer captions."""
        device = self.position.device
        ids = torch.full((len(prompts), self.tokens), BEGIN)
        lengths = torch.empty(len(prompts), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            encoded = prompt_bytes(prompt)[: self.tokens - 1]
            ids[row, 1 : 1 + len(encoded)] = torch.tensor(list(encoded), dtype=torch.int64)
            lengths[row] = 1 + len(encoded)
        return ids.to(device), lengths.to(device)

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, tokens, width) and lengths (B,)."""
        ids, lengths = self.tokenize(prompts)
        return self.embedding(ids) + self.position, lengths
