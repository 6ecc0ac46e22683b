"""The web side: who may connect, uploads, health and figures; no path of the machine anywhere."""

import asyncio
import errno
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="needs the extra serve")

import httpx  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import websockets  # noqa: E402

from aapt.serve.client import Client, Refused  # noqa: E402
from aapt.serve.images import read_upload  # noqa: E402

PIXELS = 10_000


def web(running, **options):
    return httpx.Client(base_url=f"http://{running.address}", timeout=300, **options)


def picture_bytes(size=(64, 48), kind="png", **options):
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def test_only_known_hosts_and_pages_of_this_server_are_served(serve, talk):
    running = serve(hosts=("127.0.0.1",), origins=("https://friend.example",))
    with web(running) as client:
        assert client.get("/schema").status_code == 200
        refused = client.get("/schema", headers={"host": "rebound.example"})
        assert refused.status_code == 403 and "host: expected 127.0.0.1" in refused.text
        for origin, status in (
            ("http://" + running.address, 405),
            ("https://friend.example", 405),
            ("https://evil.example", 403),
            ("null", 403),
        ):
            answer = client.post("/schema", headers={"origin": origin})
            assert answer.status_code == status, origin

    async def connect(origin):
        async with await Client.connect(running.url, origin=origin) as client:
            return client.welcome["protocol"]

    assert talk(connect("http://" + running.address)) == 1
    with pytest.raises(Refused, match="origin: expected a page of this server"):
        talk(connect("https://evil.example"))


def test_a_token_is_asked_for_and_kept_in_a_cookie(serve, talk):
    running = serve(token="s3cret")
    with web(running) as client:
        assert client.get("/healthz").status_code == 200
        for wrong in ("/schema", "/schema?token=", "/schema?token=s3cre", "/gallery/sample"):
            assert client.get(wrong).status_code == 403
        assert client.get("/schema?token=s3cret").status_code == 200
        assert client.get("/schema").status_code == 200  # by the cookie
        headers = {"authorization": "Bearer s3cret"}
        assert httpx.get(f"http://{running.address}/schema", headers=headers).status_code == 200

    async def connect(url):
        async with await Client.connect(url) as client:
            return client.welcome["protocol"]

    assert talk(connect(running.url + "?token=s3cret")) == 1
    for wrong in ("", "?token=S3cret", "?token=%C3%A9"):
        with pytest.raises(Refused, match="token: expected the one that the server has printed"):
            talk(connect(running.url + wrong))


def test_uploads_open_worlds(serve, talk, generator):
    running = serve()
    rotated = Image.open(io.BytesIO(picture_bytes((48, 96)))).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees when shown
    file = io.BytesIO()
    rotated.save(file, "png", exif=exif)

    async def conversation():
        frames = []
        async with await Client.connect(running.url) as client:
            for data in (picture_bytes((48, 96)), file.getvalue()):
                await client.send("open", image=await client.upload(data))
                await client.text("opened")
                frames.append((await client.frames()).images)
        return frames

    upright, turned = talk(conversation())
    assert upright == turned


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "image: expected a PNG, JPEG, WebP, GIF or BMP image"),
        (b"%PDF-1.4", "image: expected a PNG, JPEG, WebP, GIF or BMP image"),
        (picture_bytes((101, 100)), "image: expected at most 10000 pixels, got 101 x 100"),
        (picture_bytes((64, 48))[:4000], "image: expected a whole image, got one that cannot be"),
        (picture_bytes(kind="tiff"), "image: expected a PNG, JPEG, WebP, GIF or BMP image"),
    ],
)
def test_other_uploads_are_refused_in_one_line(data, words):
    with pytest.raises(ValueError, match=words) as error:
        read_upload(data, PIXELS, 32, 48)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def bomb(side):
    """A small PNG file that says it is `side` pixels wide and high."""
    chunks = [b"\x89PNG\r\n\x1a\n"]
    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        check = zlib.crc32(name + body).to_bytes(4, "big")
        chunks += [len(body).to_bytes(4, "big"), name, body, check]
    return b"".join(chunks)


@pytest.mark.parametrize(
    "data, words",
    [
        (bomb(60_000), "image: expected"),
        (bomb(200), "image: expected at most 10000 pixels, got 200 x 200"),
        (b'{"walk": 9}', "walk: line 1: walk: expected 1, got 9"),
        (b"\xff" * 8 + b"{}", "snapshot: expected a safetensors file"),
        (safetensors.torch.save({"latent": torch.zeros(1)}), "saved: expected model, branch"),
        (b"", "image: expected"),
    ],
)
def test_bombs_and_unknown_files_are_refused_and_the_world_goes_on(serve, talk, data, words):
    running = serve(upload_pixels=PIXELS)

    async def conversation():
        async with await Client.connect(running.url) as client:
            await client.send("open")
            await client.text("opened")
            with pytest.raises(ValueError, match=words) as error:
                await client.upload(data)
            assert "\n" not in str(error.value)
            await client.send("play")
            assert (await client.frames()).images

    talk(conversation())


def test_an_upload_on_a_full_disk_is_refused_and_the_connection_goes_on(serve, talk, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/place")

    monkeypatch.setattr("aapt.serve.images.tempfile.NamedTemporaryFile", full)

    async def conversation():
        async with await Client.connect(serve().url) as client:
            words = "upload: the server cannot take one now; its log says why"
            with pytest.raises(ValueError, match=f"^{words}$"):
                await client.upload(picture_bytes((64, 48)))
            await client.send("open")
            await client.text("opened")

    talk(conversation())


def test_an_upload_too_large_ends_its_connection(serve, talk):
    running = serve(upload_bytes=50_000)

    async def conversation():
        async with await Client.connect(running.url) as client:
            await client.upload(bytes(50_001))

    with pytest.raises(Refused, match="upload: expected at most 50000 bytes, got 50001"):
        talk(conversation())


def test_a_connection_keeps_its_latest_uploads(serve, talk):
    running = serve(uploads=2)

    async def conversation():
        async with (
            await Client.connect(running.url) as client,
            await Client.connect(running.url) as other,
        ):
            numbers = [await client.upload(picture_bytes()) for _ in range(3)]
            await other.send("open", image=numbers[2])
            assert (await other.text("error"))["code"] == "upload"
            await client.send("open", image=numbers[0])
            assert (await client.text("error"))["message"] == (
                "image: expected the id of an upload of an image"
            )
            await client.send("open", image=numbers[1])
            await client.text("opened")

    talk(conversation())


def test_a_walk_of_another_model_is_refused(serve, talk):
    running = serve()

    async def conversation():
        async with await Client.connect(running.url) as client:
            await client.send("open")
            await client.text("opened")
            await client.send("log")
            lines = (await client.text("log"))["lines"]
            start = json.loads(lines[0]) | {"digest": "0" * 64, "model": "<other>"}
            await client.send("open", log=await client.upload(json.dumps(start).encode()))
            return await client.text("error")

    error = talk(conversation())
    assert error["code"] == "log" and not error["fatal"]
    assert error["message"].startswith("log: expected a walk of small-world ")


def test_no_answer_has_a_path_of_the_machine(serve, checkpoint, talk):
    running = serve()
    secret = str(checkpoint.parent)
    with web(running) as client:
        for path in (
            *("/schema", "/healthz", "/metrics", "/gallery/none", "/gallery/..%2f..%2fetc", "/x"),
            *("/static/none.js", "/static/..%2f..%2fapp.py"),
        ):
            answer = client.get(path)
            assert secret not in answer.text and "aapt/serve" not in answer.text
            assert "Traceback" not in answer.text and answer.status_code != 500

    async def conversation():
        async with await Client.connect(running.url) as client:
            return json.dumps(client.welcome)

    assert secret not in talk(conversation())


def test_figures_follow_what_is_played(serve, talk):
    running = serve(sessions=1)

    def figure(text, name):
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name))

    async def conversation():
        async with (
            await Client.connect(running.url) as client,
            await Client.connect(running.url) as waiting,
        ):
            await client.send("open")
            await client.text("opened")
            await waiting.send("open")
            await waiting.text("queued")
            await client.send("play")
            while (await client.frames()).header.step < 5:
                pass
            async with httpx.AsyncClient(timeout=300) as http:
                health = await http.get(f"http://{running.address}/healthz")
                return health.json(), (await http.get(f"http://{running.address}/metrics")).text

    health, text = talk(conversation())
    assert health == {"status": "ok", "worlds": 1, "waiting": 1}
    assert figure(text, "aapt_connections ") == 2 and figure(text, "aapt_waiting ") == 1
    assert figure(text, "aapt_step_seconds_count") >= 5


def test_a_server_whose_generator_thread_has_ended_is_not_healthy(serve):
    running = serve()
    running.play.scheduler.stop()
    with web(running) as client:
        answer = client.get("/healthz")
        assert answer.status_code == 503 and "generator thread" in answer.text


def test_another_protocol_is_refused(serve, talk):
    running = serve()

    async def hello(**fields):
        async with websockets.connect(running.url) as socket:
            await socket.send(json.dumps(fields))
            error = json.loads(await socket.recv())
            with pytest.raises(websockets.ConnectionClosed):
                await socket.recv()
            return error

    error = talk(hello(type="hello", protocol=2))
    assert (error["code"], error["fatal"]) == ("protocol", True)
    assert error["message"] == "protocol: expected 1, got 2; reload the page"
    assert talk(hello(type="ping", time=0))["message"] == "hello: expected it as the first message"

    async def upload_first():
        async with websockets.connect(running.url) as socket:
            await socket.send(b"GIF89a")
            return json.loads(await socket.recv())

    assert talk(upload_first())["message"] == "hello: expected it as the first message"


def test_the_page_is_served_with_a_strict_policy(serve):
    with web(serve()) as client:
        answer = client.get("/")
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_recording_nobody_waits_for_ends(serve, talk):
    running = serve(history_mib=0)

    async def conversation():
        async with await Client.connect(running.url) as client:
            await client.send("open")
            await client.text("opened")
            await client.send("play")
            while (await client.frames()).header.step < 300:
                pass
            await client.send("pause")
            await client.send("record", branch=0, first=0, last=300)
            await client.send("ping", time=0)
            await client.text("pong")
        while running.play.scheduler._order:
            await asyncio.sleep(0.01)

    talk(conversation())
