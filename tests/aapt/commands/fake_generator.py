"""A generator of moving blocks in a model's place.

Run as a script, this file is the command `aapt` with that generator; each of its steps takes
STEP_SECONDS of the environment.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from aapt.__main__ import main
from aapt.model.text import ByteTextEncoder
from aapt.streaming.generator import StreamingGenerator

HEIGHT, WIDTH = 80, 128


class FakeStream:
    """Makes frame n of a noise texture moved by n pixels, brighter while the camera walks."""

    def __init__(self, generator, first_frame, prompt, seed):
        self.generator, self.prompt, self.seed = generator, prompt, seed
        self.first_frame = first_frame[None]
        self.controls = []
        self._texture = np.random.default_rng(seed).integers(0, 128, (HEIGHT, WIDTH, 3))

    def step(self, control):
        time.sleep(self.generator.step_seconds)
        start = 1 + 4 * len(self.controls)
        self.controls.append((control.yaw, control.forward))
        light = 60 if control.forward > 0 else 0
        frames = [np.roll(self._texture, start + n, axis=1) + light for n in range(4)]
        return np.stack(frames).astype(np.uint8)


class FakeGenerator:
    """Stands for a model of 128 x 80 pixels with a camera, which reads 24 bytes of a prompt."""

    height, width, fps, frames_per_step = HEIGHT, WIDTH, 24, 4
    themes = ("a meadow of blocks", "a desert of blocks")
    sample_prompt = themes[0]
    step_seconds = 0.0
    driven_by = "camera"
    few_step = False
    poses = False
    model = SimpleNamespace(text_encoder=ByteTextEncoder(tokens=25, width=1))

    def __init__(self, folder):
        self.folder = Path(folder)
        self.streams = []
        self.options = {}

    def load(self, name, **options):
        """Stand for `StreamingGenerator.from_pretrained`."""
        self.options = options
        return self

    def video_frames(self, steps, picture):
        return 1 + 4 * steps

    def sample_image(self):
        path = self.folder / "sample.png"
        Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 30)).save(path)
        return path

    def open(self, first_frame, prompt, seed=0, pose=None):
        self.streams.append(FakeStream(self, first_frame, prompt, seed))
        return self.streams[-1]


def script(*arguments, step_seconds=0.0, **options):
    """Start the command with the fake generator in a process of its own."""
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        env={**os.environ, "STEP_SECONDS": str(step_seconds)},
        **{"stderr": subprocess.PIPE, **options},
    )


if __name__ == "__main__":
    FakeGenerator.step_seconds = float(os.environ["STEP_SECONDS"])
    with tempfile.TemporaryDirectory() as folder:
        generator = FakeGenerator(folder)
        StreamingGenerator.from_pretrained = generator.load
        sys.exit(main())
