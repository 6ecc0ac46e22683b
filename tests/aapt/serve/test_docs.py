"""The client and the log that docs/play.md shows work as they are printed there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from aapt.streaming.actions import Walk, load_walk  # noqa: E402

TEXT = (Path(__file__).parents[3] / "docs" / "play.md").read_text()


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [text for kind, text in found if kind == language]


def test_the_documented_client_plays(serve, tmp_path):
    running = serve()
    (source,) = blocks("python")
    path = tmp_path / "client.py"
    path.write_text(source.replace("ws://127.0.0.1:8000/ws", running.url))
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "['ab', 'cd']" in done.stdout and "'step': 12" in done.stdout
    assert (tmp_path / "frame.jpg").read_bytes()[:3] == b"\xff\xd8\xff"


def test_the_documented_log_is_read(picture):
    log = next(block for block in blocks("") if '"walk"' in block)
    start = next(Walk("a", "b", picture, "c", 0).lines("0"))
    pixels = re.search(r'"first_frame": "([^"]*)"', start)[1]
    walk = load_walk(log.replace("<PNG>", pixels).splitlines())
    assert [(b.parent, b.start, b.end) for b in walk.branches] == [(None, 0, 2), (0, 1, 3)]
    again, shared = walk.branches[1].steps
    assert again.redone[0].shown == 2 and shared.together == 3
