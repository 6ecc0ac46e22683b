"""One stream of a generator: its steps, its prompt, and its state between steps."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..model.caches import loss_is_said
from ..model.conditioning import Control
from ..model.pose import Pose
from .snapshot import Snapshot

if TYPE_CHECKING:
    from .generator import StreamingGenerator


class Stream:
    """One video being made. Streams of one generator share nothing but weights.

    A stream is used by one thread at a time; a second one gets a RuntimeError. After a step that
    failed half way, and after `close`, `step` raises RuntimeError; `restore` mends the former.

    Attributes:
        generator: The `StreamingGenerator` that opened the stream.
        first_frame: The first frame as the decoder shows it, uint8 (1, H, W, 3); (0, H, W, 3) in a
            stream without a picture.
        seed: The seed of all noise.
        steps: Steps made so far, of one latent frame or a chunk each.
    """

    @torch.inference_mode()
    def __init__(
        self,
        generator: "StreamingGenerator",
        first_frame: np.ndarray | None,
        prompt: str,
        seed: int,
        recache: bool,
        pose: Pose | None,
    ):
        self.generator, self.seed, self.steps = generator, seed, 0
        self._lock, self._trouble = threading.Lock(), None
        text, self._prompt = self._embed(prompt), prompt
        latent = None
        if first_frame is not None:
            latent = generator.encode(np.asarray(first_frame)[None])[None]
        with loss_is_said():
            self._memory, self._return = generator._borrow_memory(self)
            self.first_frame = self._memory.start(latent, text, seed, recache, pose)

    def _embed(self, prompt: str) -> tuple[Tensor, Tensor]:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt: expected a string, got {prompt!r}")
        encoder = self.generator.model.text_encoder
        if said := encoder.cut(prompt):
            warnings.warn(said, stacklevel=3)
        negatives = self.generator.sampling.negatives if self.generator.few_step else ()
        return encoder([prompt, *negatives])

    @property
    def prompt(self) -> str:
        """The prompt in force. A new one changes the next steps; the past keeps what made it. In a
        stream opened with `recache` the past is computed again (docs/method.md#2)."""
        return self._prompt

    @prompt.setter
    @torch.inference_mode()
    def prompt(self, prompt: str) -> None:
        text = self._embed(prompt)
        with self._changing():
            self._memory.rollout.set_text(*text)
            self._prompt = prompt

    def step(self, control: Control | Pose | Tensor | None = None) -> np.ndarray:
        """Makes the next latent frame in one forward pass and decodes it: uint8 (4, H, W, 3). A
        few-step model makes a chunk of n latent frames in its passes: uint8 (4 n, H, W, 3), or
        (1 + 4 (n - 1), H, W, 3) if it is the first of the video; without the picture if that is the
        first frame of the chunk.

        control: see `StreamingGenerator.check_control`. ValueError for another one, which changes
        nothing.
        """
        return self.submit(control)()

    @torch.inference_mode()
    def submit(self, control: Control | Pose | Tensor | None = None) -> Callable[[], np.ndarray]:
        """Starts a step, and returns the call that waits for its pixels: `step` is both at once.

        On a CUDA device the next step may be submitted before the pixels of this one are taken, so
        that the device never waits for the host. On a CPU the step is finished on return.
        """
        self.generator.check_control(control)
        with self._changing():
            pixels = self._memory.advance(control, self.steps)
            self.steps += 1
        return pixels

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One change of the stream by one thread. What fails inside leaves the stream closed."""
        with self._held(), self._halfway():
            yield

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The hold of one thread on a whole stream. RuntimeError for another thread, and for a
        stream that is closed or half way."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("stream: expected one thread at a time, got a second one")
        try:
            if self._trouble:
                raise RuntimeError(f"stream: {self._trouble}")
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _halfway(self) -> Iterator[None]:
        """A part of a change that leaves the stream closed if it fails."""
        self._trouble = "a step failed half way; restore a snapshot or open a new stream"
        with loss_is_said():
            yield
        self._trouble = None

    @torch.inference_mode()
    def snapshot(self) -> Snapshot:
        """Copies the whole state, between two steps. The stream does not change, even if memory
        ends."""
        with self._held():
            return self._memory.snapshot(self.seed, self.steps, self._prompt)

    @torch.inference_mode()
    def restore(self, snapshot: Snapshot) -> None:
        """Returns to a snapshot of a stream of this generator. The same controls then make the same
        bits on the same build and device (docs/method.md#17).

        Also mends a stream whose last step failed. ValueError for a snapshot of another shape or
        cache, RuntimeError once the stream is closed.
        """
        if self._memory is None:
            raise RuntimeError(f"stream: {self._trouble}")
        self._memory.check(snapshot)
        self._trouble = None
        with self._changing():
            self._memory.restore(snapshot)
            self.seed, self.steps, self._prompt = snapshot.seed, snapshot.steps, snapshot.prompt

    @torch.inference_mode()
    def fork(self) -> "Stream":
        """A second stream that starts where this one is; neither changes the other. CacheError if
        the generator has got another cache since (`StreamingGenerator.use_cache`)."""
        snapshot = self.snapshot()
        twin = object.__new__(Stream)
        twin.generator, twin.first_frame = self.generator, self.first_frame.copy()
        twin._lock, twin._trouble = threading.Lock(), None
        twin._memory, twin._return = self.generator._borrow_memory(twin)
        twin.restore(snapshot)
        return twin

    def __copy__(self) -> "Stream":
        return self.fork()

    def __deepcopy__(self, memo: dict) -> "Stream":
        return self.fork()

    def __reduce__(self):
        raise TypeError("stream: cannot be pickled; pickle its snapshot() and restore() that")

    @property
    def bytes(self) -> int:
        """Memory of the stream's own tensors, in bytes; weights are shared."""
        return 0 if self._memory is None else self._memory.bytes

    def recheck(self) -> None:
        """Checks a float8 cache again in the next steps (docs/method.md#16), after which a
        CacheError says what it loses, if that is too much. Does nothing for another cache, and
        without `self_check` of `StreamingGenerator.use_cache`. RuntimeError as `step`."""
        with self._held():
            self._memory.recheck()

    def close(self) -> None:
        """Gives the stream's memory to the next stream that its generator opens. Safe to call
        twice."""
        self._return()
        self._memory = None
        self._trouble = "closed; open a new one"

    @property
    def graph(self) -> torch.cuda.CUDAGraph | None:
        """The step as a CUDA graph; None on a device without graphs, and once closed."""
        return None if self._memory is None else self._memory.graph

    @contextmanager
    def watched(self, phase: Callable[[str], AbstractContextManager]) -> Iterator[None]:
        """Runs each part of the steps made inside in the context `phase(name)`.

        Parts are condition, noise, generate, decode and copy. On a CUDA device the operations of
        these steps are launched one by one, not as a graph.
        """
        with self._memory.watched(phase):
            yield

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()
