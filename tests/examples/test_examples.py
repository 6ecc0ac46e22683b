"""The scripts of examples/, cut down: each runs as a user runs it and leaves what it promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "dance": ["--seconds", "0.5"],
    "kernels_alone": [],
    "many_streams": ["--seconds", "0.5"],
    "post_training": ["--clips", "2", "--updates", "1"],
    "prompt_change": ["--seconds", "0.5"],
    "walk": ["--seconds", "0.5"],
}


@pytest.fixture
def run(tmp_path):
    """Runs an example in a folder of its own; returns what it prints, and the folder."""

    def start(name: str) -> tuple[str, Path]:
        command = [sys.executable, EXAMPLES / f"{name}.py", *ARGUMENTS[name]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, tmp_path

    return start


def test_every_example_is_tested():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(ARGUMENTS)


def test_walk(run):
    out, folder = run("walk")
    assert out == "walk.gif: 13 frames\n"
    with Image.open(folder / "walk.gif") as video:
        assert (video.size, video.n_frames) == ((128, 80), 13)


def test_dance(run):
    out, folder = run("dance")
    assert out == "dance.gif: 13 frames\n"
    with Image.open(folder / "dance.gif") as video:
        assert (video.size, video.n_frames) == ((96, 96), 13)


def test_prompt_change(run):
    _, folder = run("prompt_change")
    with Image.open(folder / "prompt_change.png") as rows:
        assert rows.size == (6 * 128, 2 * 80)
        once, again = (rows.crop((0, 80 * row, 6 * 128, 80 * row + 80)) for row in (0, 1))
    before, after = (0, 0, 3 * 128, 80), (3 * 128, 0, 6 * 128, 80)
    assert once.crop(before).tobytes() == again.crop(before).tobytes()
    assert once.crop(after).tobytes() != again.crop(after).tobytes()


def test_many_streams(run):
    out, folder = run("many_streams")
    assert "4 streams, 48 frames" in out
    with Image.open(folder / "many_streams.png") as row:
        assert row.size == (4 * 128, 80)


def test_kernels_alone(run):
    out, _ = run("kernels_alone")
    assert float(re.search(r"largest difference (\S+)", out)[1]) < 1e-5


def test_post_training(run):
    out, folder = run("post_training")
    assert out.splitlines()[-1] == "frames of a step: (4, 48, 64, 3)"
    for stage in ("diffusion", "consistency", "adversarial"):
        assert (folder / "post-training" / stage / "weights.safetensors").is_file()
