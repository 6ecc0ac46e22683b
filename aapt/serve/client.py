"""A client without a page: for programs, the benchmark and tests."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import websockets

from .images import decode_image
from .protocol import FRAMES, PROTOCOL, FrameHeader, read_frames


def is_video(header: FrameHeader) -> bool:
    return header.kind == FRAMES


class Refused(RuntimeError):
    """A fatal error that the server has sent."""


@dataclass(frozen=True)
class Frames:
    """A message of video frames: its header and the encoded images."""

    header: FrameHeader
    images: list[bytes]

    def pixels(self) -> np.ndarray:
        """Decodes the images, uint8 (count, H, W, 3)."""
        return np.stack([decode_image(image) for image in self.images])


class Client:
    """A connection to `aapt serve`.

    >>> async with await Client.connect("ws://127.0.0.1:8000/ws") as client:
    ...     await client.send("open", image="sample", seed=0)
    ...     await client.text("opened")
    ...     await client.send("play")
    ...     await client.input(forward=1.0)
    ...     frames = await client.frames()

    Attributes:
        welcome: The server's answer to hello.
        texts: All text messages so far, oldest first.
    """

    def __init__(self, socket: websockets.ClientConnection):
        self.socket = socket
        self.welcome: dict[str, Any] = {}
        self.texts: list[dict[str, Any]] = []
        self.sequence = 0

    @classmethod
    async def connect(
        cls,
        url: str,
        resume: str | None = None,
        formats: tuple[str, ...] = ("jpeg",),
        **options: Any,
    ) -> "Client":
        """Connects and says hello. Refused if the server does not serve it.

        options: of `websockets.connect`.
        """
        client = cls(await websockets.connect(url, max_size=None, **options))
        await client.send("hello", protocol=PROTOCOL, resume=resume, formats=formats)
        client.welcome = await client.text("welcome")
        return client

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_) -> None:
        await self.socket.close()

    async def send(self, type: str, **fields: Any) -> None:
        """Sends a message. Refused if the server has ended the connection and said why."""
        try:
            await self.socket.send(json.dumps({"type": type, **fields}))
        except websockets.ConnectionClosed:
            while True:  # up to the reason, or the end
                await self.receive()

    async def input(self, yaw: float = 0.0, forward: float = 0.0, **fields: Any) -> int:
        """Sends the state of the controls; returns its sequence."""
        self.sequence += 1
        fields |= {"yaw": yaw, "forward": forward, "time": 1e3 * time.perf_counter()}
        await self.send("input", sequence=self.sequence, **fields)
        return self.sequence

    async def pose(
        self,
        points: list[tuple[float, float] | None] | None = None,
        motion: str | None = None,
        **fields: Any,
    ) -> int:
        """Sends the control of a figure, for a model that follows poses; returns its sequence.

        points: 14 of (x, y), shares of the image's width and height from the top left corner, None
        for a hidden one; the figure takes this pose and holds it. motion: one of
        `welcome["figure"]["motions"]`, which loops.
        """
        self.sequence += 1
        fields |= {"points": points, "motion": motion, "time": 1e3 * time.perf_counter()}
        await self.send("pose", sequence=self.sequence, **fields)
        return self.sequence

    async def receive(self) -> dict[str, Any] | Frames:
        """Waits for the next message. Refused for a fatal error."""
        message = await self.socket.recv()
        if isinstance(message, bytes):
            return Frames(*read_frames(message))
        text = json.loads(message)
        self.texts.append(text)
        if text["type"] == "error" and text["fatal"]:
            raise Refused(text["message"])
        return text

    async def upload(self, data: bytes) -> str:
        """Sends an image, an action log or a saved world; returns its id. ValueError, in the
        server's words, if it is refused."""
        await self.socket.send(data)
        answer = await self.text("uploaded")
        if answer["error"]:
            raise ValueError(answer["error"])
        return answer["id"]

    async def file(self, kind: int) -> Frames:
        """Waits for the next file: RECORDING or SAVED, its only image."""
        return await self.frames(lambda header: header.kind == kind)

    async def text(self, *types: str) -> dict[str, Any]:
        """Waits for the next text message of one of these types."""
        while True:
            message = await self.receive()
            if isinstance(message, dict) and message["type"] in types:
                return message

    async def frames(self, wanted: Callable[[FrameHeader], bool] = is_video) -> Frames:
        """Waits for the next message of video frames whose header is wanted."""
        while True:
            message = await self.receive()
            if isinstance(message, Frames) and wanted(message.header):
                return message
