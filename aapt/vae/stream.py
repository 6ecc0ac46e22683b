"""One stream through the decoder in fixed memory, and its capture as CUDA graphs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .autoencoder import CausalVAE

WARMUPS = 3  # calls before a capture: libraries load and choose their kernels in the first

# States of the first frame without their memory, by autoencoder, latent shape and precision
_forms: WeakKeyDictionary[CausalVAE, dict[tuple, tuple[Tensor, ...]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Captured:
    """A function captured as a CUDA graph: each call replays it and returns the one tensor that it
    writes."""

    graph: torch.cuda.CUDAGraph
    out: Tensor

    def __call__(self) -> Tensor:
        """Replays the graph."""
        self.graph.replay()
        return self.out


def capture(
    function: Callable[[], Tensor], device: torch.device, pool: tuple[int, int] | None = None
) -> Callable[[], Tensor]:
    """Captures `function` as a CUDA graph with scratch memory in `pool`, see `Captured`. On another
    device, returns `function` itself."""
    if device.type != "cuda":
        return function
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # so that its nodes can be counted
        # Its own stream: PyTorch's default one belongs to the device of the first capture
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            out = function()
        graph.instantiate()
    return Captured(graph, out)


def _state_forms(vae: CausalVAE, latent: Tensor) -> tuple[Tensor, ...]:
    """Returns the states that a first frame of this shape leaves, on the meta device.

    One frame is decoded to find them, once for all streams of an autoencoder.
    """
    known, form = _forms.setdefault(vae, {}), (tuple(latent.shape), latent.dtype)
    if form not in known:
        _, state = vae.decode_frame(torch.zeros_like(latent), pixels=True)
        known[form] = tuple(torch.empty_like(part, device="meta") for part in state)
    return known[form]


def forget_forms(vae: CausalVAE) -> None:
    """Forgets what states of a decoder look like, because its layers have changed."""
    _forms.pop(vae, None)


@dataclass(frozen=True)
class DecoderSnapshot:
    """A copy of a decoder's state: frames decoded so far, and one tensor per convolution."""

    frames: int
    states: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        """Memory of the states."""
        return sum(part.nbytes for part in self.states)

    def __reduce__(self):
        # As bytes, because PyTorch writes float8 into a pickle and cannot read it
        bits = [x.view(torch.uint8) if x.itemsize == 1 else x for x in self.states]
        return _unpickle, (self.frames, bits, [x.dtype for x in self.states])


def _unpickle(frames: int, bits: list[Tensor], dtypes: list[torch.dtype]) -> DecoderSnapshot:
    states = (x.view(dtype) for x, dtype in zip(bits, dtypes, strict=True))
    return DecoderSnapshot(frames, tuple(states))


class DecoderStates:
    """The states of one stream's convolutions, at fixed addresses.

    latent: a tensor of the stream's shape (batch, channels, 1, height, width), for sizes alone. A
    convolution's new state is copied over the old one, after it was read.
    """

    @torch.no_grad()
    def __init__(self, vae: CausalVAE, latent: Tensor):
        self.vae = vae
        self.frames = 0  # latent frames decoded since the start
        # Outside of inference mode, so that callers outside of it can write to the buffers too;
        # leaving it turns gradients on.
        with torch.inference_mode(False), torch.no_grad():
            forms = _state_forms(vae, latent)
            self.tensors = tuple(torch.empty_like(x, device=latent.device) for x in forms)

    def first(self, latent: Tensor) -> Tensor:
        """Decodes the first latent frame: uint8 pixels (batch, 3, 1, H, W)."""
        return self.vae.decode_frame(latent, pixels=True, state_out=self.tensors)[0]

    def next(self, latent: Tensor) -> Tensor:
        """Decodes a later latent frame: uint8 pixels (batch, 3, frames, H, W)."""
        states = self.tensors
        return self.vae.decode_frame(latent, states, pixels=True, state_out=states)[0]

    @torch.no_grad()
    def snapshot(self) -> DecoderSnapshot:
        """A copy of the states between two frames."""
        with torch.inference_mode(False):
            return DecoderSnapshot(self.frames, tuple(part.clone() for part in self.tensors))

    def check(self, snapshot: DecoderSnapshot) -> None:
        """ValueError unless the snapshot is of a stream of this shape and precision."""
        ours, theirs = ([(x.shape, x.dtype) for x in y] for y in (self.tensors, snapshot.states))
        for mine, other in zip(ours, theirs, strict=False):
            if mine != other:
                form = [f"{tuple(shape)} {dtype}" for shape, dtype in (mine, other)]
                raise ValueError(f"decoder: expected a state {form[0]}, got {form[1]}")
        if len(ours) != len(theirs):
            raise ValueError(f"decoder: expected {len(ours)} states, got {len(theirs)}")

    @torch.no_grad()
    def restore(self, snapshot: DecoderSnapshot) -> None:
        """Returns to a snapshot of a stream of this shape, in the memory that this one has."""
        for ours, theirs in zip(self.tensors, snapshot.states, strict=True):
            ours.copy_(theirs)
        self.frames = snapshot.frames

    @property
    def bytes(self) -> int:
        """Memory of the states."""
        return sum(part.nbytes for part in self.tensors)


class DecoderStream:
    """Decodes one latent frame per call, of `shape` (batch, channels, 1, height, width).

    >>> stream = DecoderStream(vae, latent.shape)
    >>> first = stream.decode(latent)  # uint8 (batch, 3, 1, H, W)
    >>> frames = stream.decode(next_latent)  # uint8 (batch, 3, 4, H, W)

    On a CUDA device the first and the steady step are a CUDA graph each, captured at construction;
    elsewhere the steps run without one. A graph holds the addresses that it reads and writes, so
    every stream has its own graphs, states and scratch memory. Streams share the weights alone and
    may run side by side. The weights must neither change nor move.

    A copy (`copy.copy`, `copy.deepcopy`) is a stream of its own. ValueError for another shape.
    """

    @torch.no_grad()
    def __init__(self, vae: CausalVAE, shape: Sequence[int]):
        channels = vae.config.latent_channels
        if len(shape) != 5 or shape[1] != channels or shape[2] != 1 or min(shape) < 1:
            raise ValueError(
                f"shape: expected (batch, {channels}, 1, height, width), got {tuple(shape)}"
            )
        self.vae = vae
        self._whole = True  # False while a decode is under way
        with torch.inference_mode(False), torch.no_grad():
            self._latent = vae.latent_mean.new_zeros(tuple(shape))
            self._states = DecoderStates(vae, self._latent)
            device = self._latent.device
            pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
            self._first = capture(lambda: self._states.first(self._latent), device, pool)
            self._steady = capture(lambda: self._states.next(self._latent), device, pool)

    @property
    def frames(self) -> int:
        """Latent frames decoded since the start."""
        return self._states.frames

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """The next latent frame as uint8 pixels (batch, 3, frames, H, W), channels last in memory.

        On a CUDA device the next call overwrites them. The latent may have any precision and be on
        any device. ValueError for another shape, which changes nothing; RuntimeError after a call
        that failed half way, until `reset` or `restore`.
        """
        if latent.shape != self._latent.shape:
            raise ValueError(
                f"latent: expected {tuple(self._latent.shape)} in this stream, "
                f"got {tuple(latent.shape)}"
            )
        if not self._whole:
            raise RuntimeError(
                "decoder: its last decode failed half way, so some states are new and some old; "
                "reset() it or restore() a snapshot"
            )
        self._whole = False
        self._latent.copy_(latent)
        pixels = self._steady() if self.frames else self._first()
        self._states.frames += 1
        self._whole = True
        return pixels

    def reset(self) -> None:
        """The next frame starts a new stream."""
        self._states.frames, self._whole = 0, True

    def snapshot(self) -> DecoderSnapshot:
        """A copy of the states between two frames."""
        return self._states.snapshot()

    def restore(self, snapshot: DecoderSnapshot) -> None:
        """Returns to a snapshot of a stream of this shape, in the memory that this one has.
        ValueError for another shape or precision, which changes nothing."""
        self._states.check(snapshot)
        self._states.restore(snapshot)
        self._whole = True

    @property
    def bytes(self) -> int:
        """Memory of the states and the latent; that of a captured graph is not known."""
        return self._latent.nbytes + self._states.bytes

    def __deepcopy__(self, memo: dict) -> "DecoderStream":
        twin = DecoderStream(self.vae, self._latent.shape)
        twin.restore(self.snapshot())
        return twin

    def __copy__(self) -> "DecoderStream":
        return self.__deepcopy__({})

    def __reduce__(self):
        raise TypeError("decoder: cannot be pickled; pickle its snapshot() and restore() that")
