"""One stream through the decoder in fixed memory: on a CUDA device, two CUDA graphs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .autoencoder import CausalVAE

WARMUPS = 3  # calls before a capture: libraries load and choose their kernels in the first


def capture(
    function: Callable[[], Tensor], device: torch.device, pool: tuple[int, int] | None = None
) -> Callable[[], Tensor]:
    """`function` as a CUDA graph, with scratch memory in `pool`: each call replays it and returns
    the one tensor that it writes to. Where there is no CUDA device, `function` itself."""
    if device.type != "cuda":
        return function
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = function()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class DecoderStream:
    """Decodes one latent frame per call, of `shape` (batch, channels, 1, height, width).

    >>> stream = DecoderStream(vae, latent.shape)
    >>> first = stream.decode(latent)  # uint8 (batch, 3, 1, H, W)
    >>> frames = stream.decode(next_latent)  # uint8 (batch, 3, 4, H, W)

    The first and the steady step are a CUDA graph each, captured here; elsewhere the same steps run
    without one. A graph holds the addresses of what it reads and writes, so every stream has its
    own graphs, states and scratch memory: streams share the weights alone, and may run side by
    side. The weights must stay as and where they are.

    The states are one set of buffers: what a convolution leaves behind is copied over what it has
    read. ValueError for another shape.
    """

    @torch.no_grad()
    def __init__(self, vae: CausalVAE, shape: Sequence[int]):
        channels = vae.config.latent_channels
        if len(shape) != 5 or shape[1] != channels or shape[2] != 1 or min(shape) < 1:
            raise ValueError(
                f"shape: expected (batch, {channels}, 1, height, width), got {tuple(shape)}"
            )
        self.vae = vae
        self.frames = 0  # latent frames decoded since the start
        # Without inference mode, or nothing outside of it could write to the buffers; leaving it
        # turns gradients on.
        with torch.inference_mode(False), torch.no_grad():
            self._latent = vae.latent_mean.new_zeros(tuple(shape))
            _, state = vae.decode_frame(self._latent, pixels=True)
            self._state = tuple(torch.empty_like(part) for part in state)
            device = self._latent.device
            pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
            self._first = capture(lambda: self._step(None), device, pool)
            self._steady = capture(lambda: self._step(self._state), device, pool)

    def _step(self, state: tuple[Tensor, ...] | None) -> Tensor:
        return self.vae.decode_frame(self._latent, state, pixels=True, state_out=self._state)[0]

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """The next latent frame as uint8 pixels (batch, 3, frames, H, W), channels last in memory.

        On a CUDA device the next call overwrites them. The latent may be of any precision and on
        any device. ValueError if it is not of this stream's shape.
        """
        if latent.shape != self._latent.shape:
            raise ValueError(
                f"latent: expected {tuple(self._latent.shape)} in this stream, "
                f"got {tuple(latent.shape)}"
            )
        self._latent.copy_(latent)
        pixels = self._steady() if self.frames else self._first()
        self.frames += 1
        return pixels

    def reset(self) -> None:
        """The next frame starts a new stream."""
        self.frames = 0
