"""Two-pass student forcing (docs/method.md#8): roll out on the streaming path, then one parallel
pass.

Recycled inputs are detached, so between steps the graph runs through keys and values alone. The
rollout without gradient only has to find the recycled inputs; one block-causal pass on exactly
those inputs then has the same value and the same gradient as back-propagating through the cache.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.transformer import KeysValues, VideoTransformer, clean


@dataclass(frozen=True)
class Segment:
    """The inputs of one segment, latents (B, C, T, H, W), and the output of the rollout; no
    gradient."""

    noise: Tensor
    recycled: Tensor
    condition: Tensor | None
    start_frame: int
    prefix: KeysValues | None
    output: Tensor | None = None


class Past:
    """The inputs of the steps that a cache remembers: the first `sink` and the last `window`."""

    def __init__(self, window: int, sink: int = 1):
        self.sink = sink
        self.first: list[tuple] = []
        self.window: deque[tuple] = deque(maxlen=window)

    def append(self, inputs: tuple) -> None:
        (self.first if len(self.first) < self.sink else self.window).append(inputs)

    def copy(self) -> "Past":
        """A list of its own of the same inputs, which no step writes to."""
        twin = Past(self.window.maxlen, self.sink)
        twin.first, twin.window = self.first.copy(), self.window.copy()
        return twin

    @property
    def bytes(self) -> int:
        """Memory of the inputs."""
        return sum(x.nbytes for inputs in self for x in inputs if x is not None)

    def __len__(self) -> int:
        return len(self.first) + len(self.window)

    def __iter__(self) -> Iterator[tuple]:
        yield from self.first
        yield from self.window


class StudentRollout:
    """A batch of streams, rolled out step by step or segment by segment.

    Args:
        text, text_lens: Embeddings of the prompts, (B, text_tokens, text_width), and lengths (B,);
            None for a cache without text, until `set_text`.
        first: The user's frame (B, C, 1, H, W), which the first step recycles; each later step
            recycles the last output.
        recache: New prompts also change the past.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: VideoTransformer,
        text: Tensor | None,
        text_lens: Tensor | None,
        first: Tensor,
        recache: bool = False,
    ):
        self.model = model
        self.last = first
        self.time = torch.ones(len(first), device=first.device)
        self.cache, self.constants = None, None
        self.frames = 0  # in the count of the cache
        self.past = self.new_past() if recache else None
        if text is None:
            size = first.shape[-2:]
            self.cache = model.new_cache(len(first), size, dtype=first.dtype)
            self.constants = model.step_constants(self.time, size)
        else:
            self.set_text(text, text_lens)

    def new_past(self) -> Past:
        """Returns an empty memory of the inputs of the steps that the cache remembers."""
        config = self.model.config
        return Past(config.window(config.token_grid(*self.last.shape[-2:])), config.sink_frames)

    @property
    def constants_bytes(self) -> int:
        """Memory of the constants of a step."""
        return sum(x.nbytes for x in self.constants.tensors())

    @torch.no_grad()
    def set_text(self, text: Tensor, text_lens: Tensor) -> None:
        """Changes the prompts from the next step on; the past keeps what made it
        (docs/method.md#2).

        With `recache` the first frames and the window are computed again from their inputs. Frames
        are then counted from the start of that window, so an "absolute" first frame is no further
        away than at the end of a first window.
        """
        pairs = self.model.encode_text(text, text_lens, self.time)
        size, dtype = self.last.shape[-2:], pairs[0][0].dtype
        constants = self.model.step_constants(self.time, size)
        if self.cache is None:
            self.cache = self.model.new_cache(len(self.last), size, dtype=dtype)
            self.constants = constants
        else:  # weights may be others than those of the stream before
            self.constants.copy_(constants)
        for layer, (k, v) in enumerate(pairs):
            self.cache.write_text(layer, k, v, text_lens)
        if self.past:
            self.cache.reset()
            for inputs in self.past:
                self.model.step(*inputs, self.time, self.cache, self.constants)
            self.frames = len(self.past)

    @torch.no_grad()
    def roll(self, noise: Tensor, condition: Tensor | None, start: Tensor | None = None) -> Segment:
        """Makes T frames from noise (B, C, T, H, W) and condition channels of T frames. `start`
        (B, C, 1, H, W) replaces the first recycled frame (corruption, docs/method.md#12)."""
        prefix = None
        if self.frames:
            prefix = [self.cache.prefix(layer) for layer in range(self.model.config.depth)]
        start_frame = self.frames
        recycled, outputs = [], []
        latent = self.last if start is None else start
        for index in range(noise.shape[2]):
            frame = slice(index, index + 1)
            recycled.append(latent)
            latent = self.step(noise[:, :, frame], latent, frames_of(condition, frame))
            outputs.append(latent)
        return Segment(
            noise,
            torch.cat(recycled, dim=2),
            condition,
            start_frame,
            prefix,
            torch.cat(outputs, dim=2),
        )

    @torch.no_grad()
    def step(self, noise: Tensor, recycled: Tensor, condition: Tensor | None) -> Tensor:
        """Makes the next latent frame (B, C, 1, H, W): one autoregressive step, 1 NFE at t = 1."""
        if self.past is not None:
            self.past.append((noise, recycled, condition))
        self.last = self.infer(noise, recycled, condition)
        self.frames += 1
        return self.last

    @torch.no_grad()
    def infer(self, noise: Tensor, recycled: Tensor, condition: Tensor | None) -> Tensor:
        """The tensor operations of a step, which a CUDA graph can hold: the cache advances, and the
        next latent frame is returned."""
        inputs = (noise, recycled, condition)
        output = self.model.step(*inputs, self.time, self.cache, self.constants).to(noise.dtype)
        return clean(self.model.config, output, noise, recycled, self.time).to(noise.dtype)


def frames_of(condition: Tensor | None, frames: slice) -> Tensor | None:
    """Selects frames of condition channels (B, C, T, H, W); None stays None."""
    return None if condition is None else condition[:, :, frames]
