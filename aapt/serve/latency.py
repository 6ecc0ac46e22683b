"""Key to pixel, measured by a client: from a key event to the first shown frame that honours it."""

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import websockets

from . import protocol
from .client import Client, Frames, Refused

KEYS = [(0.0, 1.0), (0.6, 1.0), (-0.6, 1.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 0.0)]
BETWEEN = (0.25, 0.75)  # seconds between two key events
MOST_HURRY = 0.2  # share by which frames may be shown faster
WARMUP_STEPS = 18  # three seconds


@dataclass
class Pacer:
    """When each frame is shown, in seconds: evenly, and a little faster while frames wait, so that
    one late step does not delay all later ones."""

    interval: float  # between two frames
    last: float = 0.0
    step: int = 0
    times: list[float] = field(default_factory=list)  # of the frames of `step`

    def show(self, step: int, count: int, now: float) -> float:
        """Schedules the frames of a step that came at `now`; returns when the first is shown."""
        first = max(self.last + self.interval, now)
        hurry = min(MOST_HURRY, (first - now) / (2 * count * self.interval))
        interval = (1 - hurry) * self.interval
        self.step, self.times = step, [first + n * interval for n in range(count)]
        self.last = self.times[-1]
        return first

    def shown(self, now: float) -> int:
        """Returns how many frames of the step are shown at `now`."""
        return sum(at <= now for at in self.times)


class Player:
    """Presses keys at random times, or chooses motions of a figure, and notes when a frame first
    honours each."""

    def __init__(self, client: Client, seed: int = 0):
        self.client, self.random = client, random.Random(seed)
        period = client.welcome["frames_per_step"] / client.welcome["fps"]
        self.pacer = Pacer(1 / client.welcome["fps"])
        self.period = period
        self.pressed: dict[int, float] = {}  # key events that no frame has honoured, by sequence
        self.latencies: list[float] = []
        self.arrivals: list[float] = []
        self.step_ms: list[float] = []
        self.redone = 0

    async def play(self, seconds: float, redo: bool) -> dict[str, Any]:
        """Plays for `seconds` seconds of video and returns the figures."""
        client, steps = self.client, round(seconds / self.period) + WARMUP_STEPS
        await client.send("redo", on=redo)
        await client.send("play")
        keys = asyncio.create_task(self._press())
        try:
            while len(self.arrivals) < steps:
                message = await client.receive()
                if isinstance(message, dict) and message["type"] == "ended":
                    raise Refused(f"the server has ended the world: {message['reason']}")
                if isinstance(message, Frames) and not message.header.flags & protocol.SEEK:
                    await self._show(message)
        finally:
            keys.cancel()
        await client.send("pause")
        return self._figures(redo)

    async def _press(self) -> None:
        client, last = self.client, None
        send, controls = client.input, [{"yaw": yaw, "forward": forward} for yaw, forward in KEYS]
        if figure := client.welcome["figure"]:
            send, controls = client.pose, [{"motion": name} for name in figure["motions"]]
        while True:
            await asyncio.sleep(self.random.uniform(*BETWEEN))
            last = self.random.choice([control for control in controls if control != last])
            now = time.perf_counter()
            shown = {"step": self.pacer.step, "frames": self.pacer.shown(now)}
            sequence = await send(**last, shown=shown)
            self.pressed[sequence] = now

    async def _show(self, message: Frames) -> None:
        header = message.header
        await asyncio.to_thread(message.pixels)  # a page decodes before it paints
        now = time.perf_counter()
        if header.flags & protocol.REDO:
            self.redone += 1
            later = [at for at in self.pacer.times[header.first_shown :] if at >= now]
            if not later or header.step != self.pacer.step:
                return
            at = later[0]
        else:
            at = self.pacer.show(header.step, header.count, now)
            self.arrivals.append(now)
            self.step_ms.append(header.model_ms + header.pixels_ms)
        honoured = [sequence for sequence in self.pressed if sequence <= header.input]
        pressed = [self.pressed.pop(sequence) for sequence in honoured]
        if len(self.arrivals) > WARMUP_STEPS:
            self.latencies += [at - key for key in pressed]

    def _figures(self, redo: bool) -> dict[str, Any]:
        arrivals = self.arrivals[WARMUP_STEPS:]
        frames = self.client.welcome["frames_per_step"] * (len(arrivals) - 1)
        key = 1e3 * np.array(self.latencies)
        step = np.array(self.step_ms[WARMUP_STEPS:])
        percentiles = ("p50", "p99")
        return {
            "redo": redo,
            "fps": frames / (arrivals[-1] - arrivals[0]),
            "keys": len(key),
            "key_to_pixel_ms": dict(zip(percentiles, map(float, np.percentile(key, (50, 99))))),
            "step_ms": dict(zip(percentiles, map(float, np.percentile(step, (50, 99))))),
            "period_ms": 1e3 * self.period,
            "redone": self.redone,
        }


async def measure(url: str, seconds: float) -> list[dict[str, Any]]:
    """Plays `seconds` of video without redo and as much with it; returns both figures. Refused if
    the server opens no world, or ends it."""
    try:
        return [await _play(url, seconds, redo) for redo in (False, True)]
    except websockets.WebSocketException as error:
        raise Refused(f"url: the server at {url} does not play: {error}") from None


async def _play(url: str, seconds: float, redo: bool) -> dict[str, Any]:
    async with await Client.connect(url) as client:
        gallery = client.welcome["gallery"]
        await client.send("open", image=gallery[0]["name"] if gallery else "sample", seed=0)
        answer = await client.text("opened", "error")
        if answer["type"] == "error":
            raise Refused(answer["message"])
        return await Player(client).play(seconds, redo)
