"""Messages of one world on their way to its connection: frames are encoded here."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from .images import FrameEncoder
from .protocol import FrameHeader, Message

MAX_WAITING = 2  # steps whose frames wait for the encoder
Send = Callable[[Message | bytes, int | None], None]
log = logging.getLogger("aapt.serve")


class Sender:
    """Sends messages in order: images at once, and video from a thread of its own, because an
    encoder takes longer than the next step may wait.

    Args:
        send: Takes a message, and the lane of frames, None for a message that must arrive.

    Attributes:
        dropped: Steps whose frames were not encoded, because two others waited.
    """

    def __init__(self, send: Send, encoder: FrameEncoder):
        self._send, self._encoder = send, encoder
        self._thread = ThreadPoolExecutor(1, "aapt-encode") if encoder.format == "h264" else None
        self._waiting, self._lock = 0, threading.Lock()
        self.dropped = 0

    def send(self, message: Message | bytes) -> None:
        """Sends a message that must arrive."""
        if not self._thread:
            self._send(message, None)
            return
        with contextlib.suppress(RuntimeError):  # closed: nobody hears it
            self._thread.submit(self._send, message, None)

    def send_frames(self, header: FrameHeader, frames: np.ndarray) -> None:
        """Encodes and sends the frames of a step, uint8 (F, H, W, 3); fills in the header's count
        and time of encoding."""
        if not self._thread:
            self._encode(header, frames)
            return
        with self._lock:
            if self._waiting >= MAX_WAITING and not header.flags:  # a jump's frame is its last
                self.dropped += 1
                return
            self._waiting += 1
        with contextlib.suppress(RuntimeError):
            self._thread.submit(self._encode_next, header, frames)

    def _encode_next(self, header: FrameHeader, frames: np.ndarray) -> None:
        try:
            self._encode(header, frames)
        except Exception:
            log.exception("frames could not be encoded")
        finally:
            with self._lock:
                self._waiting -= 1

    def _encode(self, header: FrameHeader, frames: np.ndarray) -> None:
        started = time.perf_counter()
        images = self._encoder.encode(frames)
        took = 1e3 * (time.perf_counter() - started)
        header = replace(header, count=len(images), encode_ms=took)
        self._send(header.message(images), header.lane)

    def close(self, closed: Callable[[], None]) -> None:
        """Ends the thread, after what waits is sent; `closed` is called then."""
        if not self._thread:
            closed()
            return
        self._thread.submit(closed)
        self._thread.shutdown(wait=False)
