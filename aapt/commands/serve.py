"""`aapt serve`: a page to play in."""

import asyncio
import contextlib
import secrets
import socket
import ssl
from pathlib import Path
from typing import Annotated

import typer

from .shared import (
    MODEL,
    Cache,
    Device,
    Dtype,
    InputError,
    Model,
    Size,
    TextDevice,
    Threads,
    bad_input,
    load,
    missing_extra,
    say,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OVERSIZE = 1 << 20  # bytes above a limit up to which a client is told what the limit is
SEND_BUFFER = 1 << 17  # bytes per connection: what the network has not taken grows stale


def serve(
    model: Model = MODEL,
    host: Annotated[
        str, typer.Option(metavar="NAME", help="Where to listen; 0.0.0.0 for every network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on.")
    ] = 8000,
    sessions: Annotated[
        int, typer.Option(metavar="N", min=1, help="Worlds at once; other visitors wait.")
    ] = 4,
    device: Device = None,
    dtype: Dtype = None,
    size: Size = None,
    cache: Cache = "model",
    history: Annotated[
        int, typer.Option(metavar="MIB", min=0, help="Memory for the snapshots of each world.")
    ] = 256,
    batch: Annotated[
        bool,
        typer.Option(
            "--batch", help="Step worlds together: faster, but not the bits of a world alone."
        ),
    ] = False,
    gallery: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="More first frames; a file's name is its prompt."),
    ] = None,
    tls: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="CERT KEY", help="Serve https with these PEM files."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What visitors must know.", show_default="random"),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Another site whose page may connect."),
    ] = None,
    text_device: TextDevice = None,
    threads: Threads = None,
):
    """Serve a page to play in: keys in, video out, with rewind, branches and recordings.

    A model that follows poses is driven by the joints of a skeleton and by preset motions.

    Only this machine can connect unless --host says otherwise; then visitors also need a token,
    which is part of the address that is printed. Browsers hide gamepads from pages of other hosts
    without --tls. With --batch, worlds that are due at once share a pass: pixels are near those of
    a world alone, not bit for bit, and the action log says so. On CUDA it runs without a graph.

    \b
    Examples:
      aapt serve
      aapt serve --model runs/mine/mine --device cuda --sessions 8
      aapt serve --host 0.0.0.0 --tls cert.pem key.pem
    """
    try:
        import uvicorn

        from ..serve.app import create_app
        from ..serve.settings import Settings
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None

    if threads:
        import torch

        torch.set_num_threads(threads)
    local = host in LOOPBACK
    if not local and token is None:
        token = secrets.token_urlsafe(16)
    with bad_input():
        if tls:
            _check_tls(*tls)
        if gallery and not gallery.is_dir():
            raise ValueError(f"gallery: expected a folder of images, got {gallery}")
        settings = Settings(
            sessions=sessions,
            history_mib=history,
            token=token,
            hosts=LOOPBACK if local else (),
            origins=tuple(origin or ()),
            gallery=gallery,
            batch=batch,
        )
    listener = _listen(host, port)
    generator = load(model, device, dtype, size, text_device=text_device, cache=cache)
    with bad_input():
        app = create_app(generator, model, settings)
    config = uvicorn.Config(
        app,
        log_level="warning",
        ws_max_size=settings.upload_bytes + OVERSIZE,
        ws_per_message_deflate=False,  # images are compressed
        ssl_certfile=tls and tls[0],
        ssl_keyfile=tls and tls[1],
        timeout_graceful_shutdown=5,
    )
    scheme, bound = "https" if tls else "http", listener.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    query = f"?token={token}" if token else ""
    say(f"Play at {scheme}://{name}:{bound}/{query} (Ctrl-C ends the server)")
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        asyncio.run(uvicorn.Server(config).serve([listener]))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    try:
        listener.bind((host, port))
        listener.listen()  # who connects before the server is ready waits
    except OSError as error:
        listener.close()
        raise InputError(f"port: cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def _check_tls(certificate: Path, key: Path) -> None:
    """Raise ValueError unless the files are a certificate and its key."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or error.reason
        raise ValueError(
            f"tls: expected PEM files of a certificate and its key: {reason}"
        ) from None
