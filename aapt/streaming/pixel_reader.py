"""Pixels from the device to the host, beside the next step."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..vae.pixels import to_array


class PixelReader:
    """Copies pixels into two pinned buffers in turn, on a stream of its own.

    So the device can work on the next step while the host takes the pixels of the last one. Pixels
    that nobody has taken when their buffer comes round are copied out of it then. On a CPU the
    pixels are copied at once.
    """

    def __init__(self, device: torch.device):
        self._buffers: dict[torch.Size, list[Tensor]] = {}  # a pair for each shape
        self._takes: dict[int, Callable[[], np.ndarray]] = {}  # the last of each buffer
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(self, pixels: Tensor) -> Callable[[], np.ndarray]:
        """Starts copying pixels uint8 (1, 3, F, H, W). Returns the call that waits for them and
        returns an array (F, H, W, 3) of its own."""
        if self._stream is None:
            frames = to_array(pixels).copy()
            return lambda: frames
        buffer = self._buffer(pixels)
        if before := self._takes.get(buffer.data_ptr()):
            before()
        current = torch.cuda.current_stream(pixels.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            buffer.copy_(pixels, non_blocking=True)
            done = self._stream.record_event()
        current.wait_event(done)  # the next step overwrites the pixels

        @cache
        def take() -> np.ndarray:
            done.synchronize()
            return to_array(buffer).copy()

        self._takes[buffer.data_ptr()] = take
        return take

    def _buffer(self, pixels: Tensor) -> Tensor:
        """The buffer of this shape that was not used last."""
        if pixels.shape not in self._buffers:
            pair = [torch.empty_like(pixels, device="cpu", pin_memory=True) for _ in range(2)]
            self._buffers[pixels.shape] = pair
        pair = self._buffers[pixels.shape]
        pair.reverse()
        return pair[0]
