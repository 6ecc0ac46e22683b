"""The web application: the page and its WebSocket, the gallery, health and figures."""

import contextlib
import hmac
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from ..streaming.generator import StreamingGenerator
from . import protocol
from .connection import Connection
from .server import PlayServer
from .settings import Settings

PAGE = Path(__file__).parent / "page"
COOKIE = "aapt_token"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
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
