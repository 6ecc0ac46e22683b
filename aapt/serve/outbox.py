"""Messages on their way to one client."""

import asyncio
from collections import deque

from .protocol import Message

MAX_FRAMES = 2  # unsent messages of video frames per lane
MAX_TEXTS = 256
MAX_TEXT_BYTES = 64 << 20


class Outbox:
    """Unsent messages, first in, first out; of video frames the latest MAX_FRAMES per lane.

    Used on the event loop alone.

    Attributes:
        dropped: Messages of frames that later ones have pushed out.
    """

    def __init__(self):
        self.dropped = 0
        self._items: deque[tuple[str | bytes, int | None]] = deque()
        self._ready = asyncio.Event()

    def put(self, message: Message | bytes, lane: int | None = None) -> None:
        """Adds a message. lane: of video frames; None for a message that must arrive."""
        if lane is not None:
            frames = [e for e in self._items if e[1] == lane]
            if len(frames) >= MAX_FRAMES:
                self._items.remove(frames[0])
                self.dropped += 1
            self._items.append((message, lane))
        else:
            text = isinstance(message, Message)
            self._items.append((message.model_dump_json() if text else message, None))
        self._ready.set()

    @property
    def full(self) -> bool:
        """True if so much is unsent that the client must have stopped reading."""
        size = sum(len(item) for item, _ in self._items if isinstance(item, str))
        return len(self._items) > MAX_TEXTS or size > MAX_TEXT_BYTES

    async def get(self) -> str | bytes:
        """Waits for the next message."""
        while not self._items:
            self._ready.clear()
            await self._ready.wait()
        return self._items.popleft()[0]
