"""The calls that an adversarial stage makes of its discriminator."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from aapt.training.stages.adversarial import Adversarial


@dataclasses.dataclass
class Call:
    """One call of the discriminator: its arguments, its logits (B, T) and their gradient."""

    arguments: tuple[Tensor, ...]
    logits: Tensor
    gradient: Tensor | None = None


@contextmanager
def recording(stage: Adversarial) -> Iterator[list[Call]]:
    """Record the calls of the discriminator."""
    calls, forward = [], stage.discriminator.forward

    def record(*arguments):
        logits = forward(*arguments)
        call = Call(arguments, logits.detach())
        if logits.requires_grad:
            logits.register_hook(lambda gradient: setattr(call, "gradient", gradient))
        calls.append(call)
        return logits

    stage.discriminator.forward = record
    yield calls
    stage.discriminator.forward = forward
