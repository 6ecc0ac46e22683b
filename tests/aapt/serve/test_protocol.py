"""Messages and headers: what is read, what is refused and in which words, what the schema says."""

import json
import struct

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.serve import protocol  # noqa: E402
from aapt.serve.protocol import FrameHeader, ProtocolError, parse, read_frames, schema  # noqa: E402


def message(**fields):
    return json.dumps(fields)


INPUT = {"type": "input", "sequence": 1, "time": 2.5}


def test_messages_are_read():
    read = parse(message(**INPUT, yaw=1, taps={"forward": 0.5}, shown={"step": 3, "frames": 2}))
    assert (read.sequence, read.time, read.yaw, read.forward) == (1, 2.5, 1.0, 0.0)
    assert (read.taps.yaw, read.taps.forward) == (0.0, 0.5)
    assert (read.shown.step, read.shown.frames) == (3, 2)
    split = parse(message(type="split", branch=0, step=4, controls=[None, {"yaw": -1}]))
    assert split.controls[0] is None and split.controls[1].yaw == -1
    assert parse(message(type="open")).image == "sample"
    assert len(parse(message(type="open", image="x" * 255)).image) == 255  # a file's longest name


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "message: Invalid JSON"),
        ("{", "message: Invalid JSON"),
        ("[" * 60_000, "message: Invalid JSON"),
        ("[]", "message: Input should be an object, got '"),
        ("{}", "message: Unable to extract tag"),
        (message(type="x"), "message: Input tag 'x' found using 'type' does not match"),
        (message(type="play", x=1), "play.x: Extra inputs are not permitted, got '1'"),
        (message(**INPUT, yaw=1.5), "input.yaw: Input should be less than or equal to 1"),
        (message(**INPUT, yaw=float("nan")), "input.yaw: Input should be"),
        (message(**INPUT, yaw="1"), "input.yaw: Input should be a valid number, got '1'"),
        (message(**{**INPUT, "sequence": -1}), "input.sequence: Input should be greater"),
        (message(**{**INPUT, "sequence": 2**32}), "input.sequence: Input should be less"),
        (message(**{**INPUT, "time": float("inf")}), "input.time: Input should be a finite"),
        (message(type="prompt", sequence=0, text="x" * 1001), "prompt.text: String should have"),
        (message(type="open", image="x" * 256), "open.image: String should have at most 255"),
        (message(type="open", seed=2**53), "open.seed: Input should be less"),
        (message(type="split", controls=[None]), "split.controls: List should have at least 2"),
    ],
)
def test_other_messages_are_refused_by_name(text, words):
    with pytest.raises(ProtocolError) as error:
        parse(text)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_headers_have_the_layout_of_the_protocol():
    header = FrameHeader(
        branch=1,
        step=2,
        count=2,
        lane=1,
        flags=protocol.REDO,
        input=5,
        prompt=6,
        time=7.5,
        wait_ms=1,
        model_ms=2,
        pixels_ms=3,
        encode_ms=4,
        first_shown=3,
        format=1,
    )
    data = header.message([b"ab", b"cde"])
    assert struct.unpack_from("<4sBBBBIIIIdffffBBH12x", data) == (
        *(b"AAPT", 1, 0, 1, 2, 1, 2, 5, 6, 7.5, 1.0, 2.0, 3.0, 4.0, 3, 2, 1),
    )
    assert data[64:] == struct.pack("<II", 2, 3) + b"abcde"
    assert read_frames(data) == (header, [b"ab", b"cde"])


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"B" + d[1:]])
def test_broken_binary_messages_are_refused(change):
    data = FrameHeader(branch=0, step=1, count=1).message([b"abc"])
    with pytest.raises(ValueError, match="message: expected"):
        read_frames(change(data))


def test_the_schema_names_every_message_and_the_header():
    described = schema()
    types = {
        side: set(described[side]["discriminator"]["mapping"]) for side in ("client", "server")
    }
    assert types["client"] == {
        *("hello", "open", "input", "pose", "prompt", "play", "pause", "reset", "redo", "seek"),
        *("follow", "split", "log", "save", "record", "ping"),
    }
    assert types["server"] == {
        *("welcome", "queued", "replaying", "opened", "posed", "tree", "sought", "state", "split"),
        *("log", "uploaded", "pong", "error", "ended"),
    }
    last = described["binary"]["header"][-1]
    assert last["offset"] + last["bytes"] == described["binary"]["header_bytes"] == 64
    json.dumps(described)
