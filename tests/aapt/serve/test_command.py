"""The command `aapt serve` as its user starts it, and `aapt bench play` against it."""

import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.commands.app import main  # noqa: E402
from aapt.serve.latency import Pacer  # noqa: E402


@pytest.fixture
def command(checkpoint):
    """Starts `aapt serve` with options; returns the process and the address that it prints."""
    started = []

    def start(*options):
        line = [sys.executable, "-m", "aapt", "serve", "--model", str(checkpoint), "--port", "0"]
        process = subprocess.Popen([*line, *options], stderr=subprocess.PIPE, text=True)
        started.append(process)
        address = re.search(r"Play at (\S+)", process.stderr.readline())
        return process, address[1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_server_starts_answers_and_ends_with_ctrl_c(command):
    process, address = command()
    assert address.startswith("http://127.0.0.1:") and "token" not in address
    assert json.load(urllib.request.urlopen(address + "healthz"))["status"] == "ok"
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    assert process.stderr.read() == ""


def test_another_host_gets_a_token_and_tls(command, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    files = [str(tmp_path / name) for name in ("cert.pem", "key.pem")]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]]
    subprocess.run(make, check=True, capture_output=True)
    _, address = command("--host", "0.0.0.0", "--tls", *files)
    base, token = re.fullmatch(r"https://0\.0\.0\.0(:\d+)/\?token=(\S+)", address).groups()
    context = ssl.create_default_context(cafile=files[0])
    url = f"https://127.0.0.1{base}/schema"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url, context=context)
    assert json.load(urllib.request.urlopen(f"{url}?token={token}", context=context))


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ("--model", "none"),
            "none: expected a checkpoint folder or one of sharp-world, tiny-puppet, tiny-world",
        ),
        (("--gallery", "none"), "gallery: expected a folder of images, got none"),
        (
            ("--tls", "none", "none"),
            "tls: expected PEM files of a certificate and its key: No such",
        ),
        (("--device", "none"), "device: "),
    ],
)
def test_what_does_not_fit_is_refused_by_name(checkpoint, capfd, options, words):
    given = ["--model", str(checkpoint)] if "--model" not in options else []
    assert main(["serve", *given, *options]) == 2
    assert capfd.readouterr().err.startswith(f"aapt: {words}")


def test_a_port_that_is_taken(checkpoint, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", str(checkpoint), "--port", port]) == 2
    assert f"port: cannot listen on 127.0.0.1:{port}: Address already" in capfd.readouterr().err


def test_bench_play_measures_what_a_client_sees(serve, capfd):
    running = serve()
    assert main(["bench", "play", "--seconds", "1", "--url", running.url, "--json"]) == 0
    plain, redo = json.loads(capfd.readouterr().out)["play"]
    assert (plain["redo"], plain["redone"], redo["redo"]) == (False, 0, True)
    for figures in (plain, redo):
        assert figures["fps"] > 0 and figures["period_ms"] == pytest.approx(1000 / 60)
        assert figures["step_ms"]["p99"] >= figures["step_ms"]["p50"] > 0


def test_bench_play_without_a_browser_says_what_to_install(serve, capfd, monkeypatch):
    browser = pytest.importorskip("aapt.serve.browser", reason="needs playwright")
    monkeypatch.setattr(browser, "CHROMIUM", ("no-such-browser",))
    assert main(["bench", "play", "--browser", "--url", serve().url]) == 2
    assert "expected one of no-such-browser on PATH, got none; install" in capfd.readouterr().err


def test_the_pacer_shows_frames_evenly_and_drains_what_waits():
    pacer = Pacer(interval=1.0)
    assert pacer.show(1, 4, now=10.0) == 10.0
    assert pacer.times == [10.0, 11.0, 12.0, 13.0] and pacer.shown(11.5) == 2
    assert pacer.show(2, 4, now=20.0) == 20.0  # late by six frames
    starts = [pacer.show(step, 4, now=14.0 + 4 * (step - 2)) for step in range(3, 30)]
    lags = [start - (14.0 + 4 * (step - 2)) for step, start in zip(range(3, 30), starts)]
    assert lags == sorted(lags, reverse=True) and lags[0] > 5 and lags[-1] < 0.5
