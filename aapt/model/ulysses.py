"""Ulysses context parallelism: ranks share the tokens of a clip, and in attention its heads (arXiv
2309.14509; docs/method.md#11).

The gradient is exact. Every rank of a group gathers the whole output and computes the same loss L.
Only `Exchange` crosses ranks, and its backward is its transpose. So backward on all n ranks
together differentiates the sum of their losses, n L, by the n copies of the parameters. FSDP takes
the mean of the copies' gradients over all ranks, which is dL / dtheta. The gradient of a single
rank means nothing: for some parameters it holds the share of its tokens, for others all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange(torch.autograd.Function):
    """All-to-all of flat pieces: `sent[j]` numbers go to rank j, `received[j]` come from it."""

    @staticmethod
    def forward(ctx, flat: Tensor, sent: list[int], received: list[int], group) -> Tensor:
        ctx.arguments = received, sent, group
        out = flat.new_empty(sum(received))
        dist.all_to_all_single(out, flat, received, sent, group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return Exchange.apply(gradient.contiguous(), *ctx.arguments), None, None, None


class Ulysses:
    """The ranks that share a clip. Without a group there is one rank, and nothing moves.

    Tokens (B, L, ...) are sharded contiguously and as evenly as possible: any L works on any number
    of ranks. Heads are the last dimension but one; their number is a multiple of `size`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._section: Callable[[], AbstractContextManager] = nullcontext

    @contextmanager
    def watched(self, section: Callable[[], AbstractContextManager]) -> Iterator[None]:
        """Makes each exchange inside in the context `section()`, from packing to the last byte
        received."""
        self._section = section
        try:
            yield
        finally:
            self._section = nullcontext

    def lengths(self, tokens: int) -> list[int]:
        """Tokens of each rank, of `tokens` in all."""
        return [(tokens + self.size - 1 - rank) // self.size for rank in range(self.size)]

    def shard(self, x: Tensor) -> Tensor:
        """Returns this rank's tokens of (B, L, ...)."""
        return x if self.size == 1 else x.split(self.lengths(x.shape[1]), dim=1)[self.rank]

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """Returns all `tokens` (B, tokens, ...) from the shards (B, l, ...) of every rank."""
        if self.size == 1:
            return x
        shapes = [(len(x), length, *x.shape[2:]) for length in self.lengths(tokens)]
        return torch.cat(self._exchange([x] * self.size, shapes), dim=1)

    def to_heads(self, x: Tensor, tokens: int) -> Tensor:
        """Turns a shard of `tokens`, (B, l, ..., H, D), into (B, tokens, ..., H / size, D)."""
        if self.size == 1:
            return x
        pieces = x.chunk(self.size, dim=-2)
        shapes = [(len(x), length, *pieces[0].shape[2:]) for length in self.lengths(tokens)]
        return torch.cat(self._exchange(pieces, shapes), dim=1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Turns (B, L, H / size, D) into this rank's tokens (B, l, H, D)."""
        if self.size == 1:
            return x
        pieces = x.split(self.lengths(x.shape[1]), dim=1)
        shapes = [pieces[self.rank].shape] * self.size
        return torch.cat(self._exchange(pieces, shapes), dim=-2)

    def own_heads(self, x: Tensor) -> Tensor:
        """Returns this rank's heads of a tensor (B, L, ..., H, D) that every rank holds whole."""
        return x if self.size == 1 else x.chunk(self.size, dim=-2)[self.rank]

    def all_heads(self, x: Tensor) -> Tensor:
        """Gathers the heads (B, L, H / size, D) of every rank into (B, L, H, D)."""
        if self.size == 1:
            return x
        return torch.cat(self._exchange([x] * self.size, [x.shape] * self.size), dim=-2)

    def _exchange(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Sends piece j to rank j; the piece received from rank j has `shapes[j]`."""
        sent = [piece.numel() for piece in pieces]
        received = [torch.Size(shape).numel() for shape in shapes]
        with self._section():
            flat = torch.cat([piece.reshape(-1) for piece in pieces])
            parts = Exchange.apply(flat, sent, received, self.group).split(received)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
