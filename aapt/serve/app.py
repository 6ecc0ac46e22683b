"""The web application: the page, its WebSocket, uploads, recordings, health and figures."""

import asyncio
import contextlib
import hmac
import shutil
import tempfile
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Query, Request, Response, WebSocket
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from starlette.background import BackgroundTask
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from ..streaming.generator import StreamingGenerator
from . import protocol
from .connection import Connection
from .record import Recording
from .server import PlayServer
from .session import Place
from .settings import Settings

PAGE = Path(__file__).parent / "page"
COOKIE = "aapt_token"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LOOK_SECONDS = 0.5  # between two looks whether a recording is still wanted
REFUSED = 1008  # close code of a WebSocket


def create_app(generator: StreamingGenerator, name: str, settings: Settings) -> FastAPI:
    """Makes the application of one server; `app.state.server` is its `PlayServer`."""
    server = PlayServer(generator, name, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.start()
        yield
        await server.stop()

    app = FastAPI(title="aapt", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server

    app.add_middleware(Guard, settings=settings)

    @app.exception_handler(HTTPException)
    async def one_line(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    @app.websocket("/ws")
    async def play(websocket: WebSocket) -> None:
        reason = refusal(websocket, settings)
        await websocket.accept()
        if reason:
            error = protocol.Error(code="token", message=reason, fatal=True)
            await websocket.send_text(error.model_dump_json())
            await websocket.close(REFUSED)
            return
        await Connection(websocket, server).serve()

    @app.get("/schema")
    async def schema() -> dict:
        return protocol.schema()

    @app.get("/healthz")
    async def health() -> dict:
        if not server.scheduler.alive:
            raise HTTPException(503, "the generator thread has ended")
        return {"status": "ok", "worlds": server.line.taken, "waiting": server.line.waiting}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/gallery/{picture}")
    async def gallery(picture: str) -> Response:
        if picture not in server.gallery:
            raise HTTPException(404, "picture: expected a name of the gallery")
        return Response(server.gallery[picture].png, media_type="image/png")

    @app.post("/upload")
    async def upload(request: Request) -> dict:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > settings.upload_bytes:
                limit = settings.upload_bytes
                raise HTTPException(413, f"upload: expected at most {limit} bytes, got more")
        try:
            return {"id": await server.upload(bytes(data))}
        except ValueError as error:
            raise HTTPException(422, " ".join(str(error).split())) from None

    @app.get("/log/{token}.jsonl")
    async def log(token: str) -> Response:
        place = server.place(token)
        if place is None:
            raise HTTPException(404, "token: expected that of an open world")
        lines = await asyncio.to_thread(lambda: list(place.walk.copy().lines(server.version)))
        text = "\n".join(lines) + "\n"
        return PlainTextResponse(text, headers=_download("walk.jsonl"))

    @app.get("/record/{token}.mp4")
    async def record(
        request: Request,
        token: str,
        branch: int | None = None,
        first: Annotated[int, Query(alias="from")] = 0,
        last: Annotated[int | None, Query(alias="to")] = None,
    ) -> Response:
        place = server.place(token)
        if place is None:
            raise HTTPException(404, "token: expected that of an open world")
        branch = place.branch if branch is None else branch
        walk = place.walk
        try:
            walk.check(branch, 0)
            last = walk.branches[branch].end if last is None else last
            walk.check(branch, last)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        if not max(0, last - settings.record_steps) <= first <= last:
            raise HTTPException(
                422,
                f"from: expected at most {settings.record_steps} steps before {last}, got {first}",
            )
        if len(server.recording) >= settings.sessions or token in server.recording:
            raise HTTPException(429, "record: expected one recording at a time; try again later")
        folder = Path(tempfile.mkdtemp(prefix="aapt-"))
        clean = BackgroundTask(shutil.rmtree, folder, ignore_errors=True)
        server.recording.add(token)
        try:
            await _record(request, server, place, branch, first, last, folder / "walk.mp4")
        except BaseException:
            await clean()
            raise
        finally:
            server.recording.discard(token)
        return FileResponse(
            folder / "walk.mp4", filename="walk.mp4", media_type="video/mp4", background=clean
        )

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/static", StaticFiles(directory=PAGE, check_dir=False))
    return app


class Guard:
    """Refuses requests that are not for this server, and adds headers to its answers.

    WebSockets pass: a refusal is told to them after they are accepted.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        token = self.settings.token if "token" in request.query_params else None

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if token:
                    cookie = f"{COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/"
                    headers.append("Set-Cookie", cookie)
            await send(message)

        reason = refusal(request, self.settings)
        if reason and request.url.path != "/healthz":
            answer = JSONResponse({"error": reason}, 403)
            await answer(scope, receive, send)
            return
        await self.app(scope, receive, send_with_headers)


def refusal(connection: HTTPConnection, settings: Settings) -> str | None:
    """Returns why a request is not served, or None: its host, the page that it comes from, and the
    server's token."""
    host = urlsplit("//" + connection.headers.get("host", "")).hostname or ""
    if settings.hosts and host not in settings.hosts:
        return f"host: expected {' or '.join(settings.hosts)}; start the server with --host"
    origin = connection.headers.get("origin")
    changes = connection.scope["type"] == "websocket" or connection.scope["method"] != "GET"
    if changes and origin is not None and origin not in settings.origins:
        if urlsplit(origin).netloc != connection.headers.get("host"):
            return "origin: expected a page of this server"
    if settings.token is None:
        return None
    given = (
        connection.query_params.get("token")
        or connection.cookies.get(COOKIE)
        or connection.headers.get("authorization", "").removeprefix("Bearer ")
    )
    if not hmac.compare_digest(given.encode(), settings.token.encode()):
        return "token: expected the one that the server has printed; open its whole address"
    return None


async def _record(
    request: Request,
    server: PlayServer,
    place: Place,
    branch: int,
    first: int,
    last: int,
    out: Path,
) -> None:
    """Writes a recording between the steps of the worlds being played; ends when nobody waits for
    it any more."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    errors: list[Exception] = []

    def tell(error: Exception | None) -> None:
        errors.extend([error] if error else [])
        loop.call_soon_threadsafe(done.set)

    recording = Recording(
        server.generator, place.walk, branch, first, last, place.history, out, tell
    )
    server.scheduler.add(recording)
    try:
        while not done.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(done.wait(), LOOK_SECONDS)
            if await request.is_disconnected():
                recording.cancelled.set()
    finally:
        recording.cancelled.set()
        await done.wait()
        server.scheduler.remove(recording)
    if errors:
        raise HTTPException(500, "record: the video could not be made")


def _download(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}
