"""One WebSocket connection: handshake, commands, and the end."""

import asyncio
import contextlib
import functools
import logging
import secrets
import time
from collections import OrderedDict
from typing import TypeVar

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..streaming.actions import Walk
from . import protocol
from .outbox import Outbox
from .protocol import FrameHeader, Message, ProtocolError
from .record import Recording
from .saved import SavedWorld
from .server import PlayServer, Upload
from .session import Place, Session, control_of
from .world import World, pose_of

HELLO_SECONDS = 30.0
UNREAD_SECONDS = 30.0  # a client that reads nothing for so long is dropped
SLOWEST = 1 << 16  # bytes per second that a client may take for a large file
MAX_EARLY = 64
T = TypeVar("T")
CLOSE_CODE = 1008  # "policy violation", after a fatal error
# Ends of a connection that are no failures; RuntimeError is Starlette's for a closed one.
LOSSES = (WebSocketDisconnect, asyncio.TimeoutError, RuntimeError)
log = logging.getLogger("aapt.serve")


class Bucket:
    """A rate limit: `rate` per second, bursts of two seconds' worth."""

    def __init__(self, rate: float):
        self.rate, self.level, self.filled = rate, 2 * rate, time.monotonic()

    def take(self) -> bool:
        """Takes one; False if there is none left."""
        now = time.monotonic()
        self.level = min(2 * self.rate, self.level + (now - self.filled) * self.rate)
        self.filled = now
        self.level -= 1
        return self.level >= 0


class Connection:
    """A visitor's connection. At its end the world is closed, and kept for a while by its
    token."""

    def __init__(self, websocket: WebSocket, server: PlayServer):
        self.websocket, self.server = websocket, server
        self.loop = asyncio.get_running_loop()
        self.outbox = Outbox()
        self.session: Session | None = None
        self.token, self.format = "", "jpeg"
        self.entering: asyncio.Task | None = None
        self.early: list[protocol.ClientMessage] = []  # commands for the world to be opened
        self.uploads: OrderedDict[str, Upload] = OrderedDict()  # by id, oldest first
        self.recording: Recording | None = None
        self.leaving: asyncio.Future = self.loop.create_future()
        self.leaving.set_result(None)

    async def serve(self) -> None:
        """Serves the connection until its end."""
        self.server.metrics.connections.inc()
        sender = asyncio.create_task(self._send())
        reader = asyncio.create_task(self._read())
        try:
            await asyncio.wait({sender, reader}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self.entering:
                self.entering.cancel()
            for task in (reader, sender):
                task.cancel()
            for end in await asyncio.gather(reader, sender, return_exceptions=True):
                if isinstance(end, Exception) and not isinstance(end, LOSSES):
                    log.error("a connection has failed", exc_info=end)
            if self.recording:
                self.recording.cancel()
            await self._leave(keep=True)
            self.server.metrics.dropped.inc(self.outbox.dropped)
            self.server.metrics.connections.dec()

    # Out.

    def deliver(self, message: Message | bytes, lane: int | None = None) -> None:
        """Takes a message for the client, and the lane of frames; called from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(self._put, message, lane)

    def _put(self, message: Message | bytes, lane: int | None) -> None:
        self.outbox.put(message, lane)
        if isinstance(message, protocol.Ended):
            moved = message.reason == "moved"
            self._leave(keep=moved)
            if moved:  # the old token is in other hands
                self.token = secrets.token_urlsafe(16)

    async def _send(self) -> None:
        while True:
            message = await self.outbox.get()
            if isinstance(message, bytes):
                sending = self.websocket.send_bytes(message)
            else:
                sending = self.websocket.send_text(message)
            await asyncio.wait_for(sending, UNREAD_SECONDS + len(message) / SLOWEST)

    async def _end(self, code: protocol.ErrorCode, message: str) -> None:
        """Tells a fatal error in one line and closes."""
        line = " ".join(message.split())
        self.server.metrics.errors.labels(code).inc()
        error = protocol.Error(code=code, message=line, fatal=True)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, asyncio.TimeoutError):
            await asyncio.wait_for(self.websocket.send_text(error.model_dump_json()), 5)
            await asyncio.wait_for(self.websocket.close(CLOSE_CODE), 5)

    # In.

    async def _read(self) -> None:
        bucket = Bucket(self.server.settings.messages_per_second)
        try:
            hello = await asyncio.wait_for(self._receive(), HELLO_SECONDS)
            await self._hello(hello)
            while True:
                message = await self._receive()
                if not bucket.take():
                    raise ProtocolError(
                        f"messages: expected at most {bucket.rate:g} per second, got more", "flood"
                    )
                if self.outbox.full:
                    raise ProtocolError("messages: expected a client that reads answers", "flood")
                if isinstance(message, bytes):
                    await self._take_upload(message)
                else:
                    await self._obey(message)
        except ProtocolError as error:
            await self._end(error.code, str(error))
        except asyncio.TimeoutError:
            await self._end("protocol", "hello: expected it as the first message, got none")
        except WebSocketDisconnect:
            pass

    async def _receive(self) -> protocol.ClientMessage | bytes:
        event = await self.websocket.receive()
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code", 1006))
        settings, text = self.server.settings, event.get("text")
        name, message = ("upload", event["bytes"]) if text is None else ("message", text)
        limit = settings.upload_bytes if text is None else settings.message_bytes
        if len(message) > limit:
            raise ProtocolError(f"{name}: expected at most {limit} bytes, got {len(message)}")
        return message if text is None else protocol.parse(text)

    async def _take_upload(self, data: bytes) -> None:
        """Reads an upload and tells its id, or why it is refused."""
        try:
            upload = await self.server.read_upload(data)
        except (ValueError, OSError) as error:
            self.server.metrics.errors.labels("upload").inc()
            said = " ".join(str(error).split())
            if isinstance(error, OSError):
                log.exception("an upload could not be kept")
                said = "upload: the server cannot take one now; its log says why"
            self.outbox.put(protocol.Uploaded(error=said))
            return
        number = "upload:" + secrets.token_urlsafe(9)
        self.uploads[number] = upload
        if len(self.uploads) > self.server.settings.uploads:
            self.uploads.popitem(last=False)
        self.outbox.put(protocol.Uploaded(id=number))

    async def _hello(self, hello: protocol.ClientMessage) -> None:
        if not isinstance(hello, protocol.Hello):
            raise ProtocolError("hello: expected it as the first message", "protocol")
        if hello.protocol != protocol.PROTOCOL:
            raise ProtocolError(
                f"protocol: expected {protocol.PROTOCOL}, got {hello.protocol}; reload the page",
                "protocol",
            )
        self.format = self.server.choose_format(hello.formats)
        place = await self._take_over(hello.resume)
        self.token = hello.resume if place else secrets.token_urlsafe(16)
        self.outbox.put(self.server.welcome(self.token, place is not None, self.format))
        if place:
            self._enter(place)

    async def _take_over(self, token: str | None) -> Place | None:
        """Returns the world of a token, taken from its other connection if it still has one."""
        session = self.server.sessions.get(token) if token else None
        if session:
            session.end("moved")
            while token in self.server.sessions:
                await asyncio.sleep(0.01)
        return self.server.kept.pop(token, (0.0, None))[1]

    async def _obey(self, message: protocol.ClientMessage) -> None:
        if isinstance(message, protocol.Ping):
            self.outbox.put(protocol.Pong(time=message.time))
        elif isinstance(message, protocol.Open):
            self._open(message)
        elif isinstance(message, protocol.Hello):
            raise ProtocolError("hello: expected it once", "protocol")
        elif self.entering and not self.entering.done() and len(self.early) < MAX_EARLY:
            self.early.append(message)
        elif self.session is None or self.session.ended:
            self._refuse("not_open", f"{message.type}: expected an open world; send open")
        else:
            self._command(self.session, message)

    def _command(self, session: Session, message: protocol.ClientMessage) -> None:
        match message:
            case protocol.Input() | protocol.PoseInput():
                try:
                    session.put_input(message)
                except ValueError as error:
                    self._refuse("unknown", str(error))
            case protocol.ChangePrompt():
                session.post(session.prompt(message.sequence, message.text))
            case protocol.Play() | protocol.Pause():
                session.post(session.play(message.type == "play"))
            case protocol.Redo():
                session.post(session.redo(message.on))
            case protocol.Seek():
                session.post(session.seek(message.branch, message.step), seek=True)
            case protocol.Follow():
                session.post(session.follow(message.branch))
            case protocol.Split(controls=None):
                session.post(session.join())
            case protocol.Split():
                controls = [given and control_of(given) for given in message.controls]
                session.post(session.split(message.branch, message.step, controls), seek=True)
            case protocol.Reset():
                session.post(session.reset(message.seed))
            case protocol.GetLog():
                session.post(session.log(self.server.version), by_visitor=False)
            case protocol.Save():
                session.post(session.save(), by_visitor=False)
            case protocol.Record():
                self._record(session.place, message)

    def _refuse(self, code: protocol.ErrorCode, message: str) -> None:
        self.server.metrics.errors.labels(code).inc()
        line = " ".join(message.split())
        self.outbox.put(protocol.Error(code=code, message=line, fatal=False))

    # A world.

    def _open(self, message: protocol.Open) -> None:
        try:
            if message.log is not None:
                walk = self.server.check_walk(self._uploaded("log", message.log, Walk))
                branch = len(walk.branches) - 1
                step = walk.branches[branch].end
                saved = message.saved and self._uploaded("saved", message.saved, SavedWorld)
                prompt = walk.prompt_at(branch, step)
                place = Place(walk.copy(), branch, step, prompt, saved=saved)
            else:
                upload = None
                if message.image.startswith("upload:"):
                    upload = self._uploaded("image", message.image, np.ndarray)
                pose = message.pose and pose_of(message.pose)
                start = message.image, upload, message.prompt, message.seed
                walk = self.server.walk(*start, pose)
                place = Place(walk, 0, 0, walk.prompt)
        except ValueError as error:
            self._refuse("log" if message.log else "upload", str(error))
            return
        self._enter(place)

    def _uploaded(self, name: str, upload: str, kind: type[T]) -> T:
        """Returns an upload of this connection. ValueError if it is not there or of another
        kind."""
        given = self.uploads.get(upload)
        if not isinstance(given, kind):
            kinds = {"log": "an action log", "saved": "a saved world", "image": "an image"}
            raise ValueError(f"{name}: expected the id of an upload of {kinds[name]}")
        return given

    def _record(self, place: Place, message: protocol.Record) -> None:
        """Starts a recording; its video is sent when it is made."""
        server, (branch, first, last) = self.server, (message.branch, message.first, message.last)
        try:
            place.walk.check(branch, last)
            if not max(0, last - server.settings.record_steps) <= first <= last:
                most = server.settings.record_steps
                raise ValueError(f"first: expected at most {most} steps before {last}, got {first}")
            if self.recording and not self.recording.over:
                raise ValueError("record: expected one recording at a time; try again later")
        except ValueError as error:
            self._refuse("record", str(error))
            return
        done = functools.partial(self._recorded, branch, last)
        history, walk = place.history, place.walk
        self.recording = Recording(
            server.scheduler, server.generator, walk, branch, first, last, history, done
        )

    def _recorded(self, branch: int, last: int, video: bytes | Exception) -> None:
        """Sends a video; called on the generator thread."""
        if isinstance(video, Exception):
            line = "the video could not be made"
            self.server.metrics.errors.labels("record").inc()
            self.deliver(protocol.Error(code="record", message=line, fatal=False))
            return
        header = FrameHeader(branch, last, count=1, kind=protocol.RECORDING)
        self.deliver(header.message([video]))

    def _enter(self, place: Place) -> None:
        """Opens a world, after waiting in line if need be; an earlier wish of this client ends."""
        if self.entering:
            self.entering.cancel()
        self.early.clear()
        self.entering = asyncio.create_task(self._wait_and_enter(place))

    async def _wait_and_enter(self, place: Place) -> None:
        await self._leave(keep=False)
        server = self.server
        try:
            await server.line.enter(lambda number: self.outbox.put(protocol.Queued(place=number)))
        except asyncio.CancelledError:
            server.keep(self.token, place)
            raise
        try:
            world = World(server.generator, place.walk, server.settings)
            flow = server.scheduler, server.metrics
            session = Session(world, place, *flow, self.deliver, self.format)
        except Exception:
            server.line.leave()
            log.exception("a world could not be opened")
            self._refuse("failed", "the world could not be opened; the server's log says why")
            return
        self.session = server.sessions[self.token] = session
        session.post(session.resume())
        for message in self.early:
            self._command(session, message)

    def _leave(self, keep: bool) -> asyncio.Future:
        """Closes the world, if there is one, and then gives its place to the next visitor."""
        if self.session:
            self.leaving = asyncio.create_task(self._close(self.session, self.token, keep))
            self.session = None
        return asyncio.shield(self.leaving)

    async def _close(self, session: Session, token: str, keep: bool) -> None:
        closed: asyncio.Future[Place] = self.loop.create_future()
        session.close(lambda place: self.loop.call_soon_threadsafe(closed.set_result, place))
        place = await closed
        if keep:
            self.server.keep(token, place)
        del self.server.sessions[token]
        self.server.line.leave()
