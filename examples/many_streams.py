"""Run several streams of one model, a step of each in turn: `python examples/many_streams.py`.

Streams share nothing but weights: each has its own prompt, controls, noise and memory, and makes
the frames that it would make alone.
"""

import argparse
import time

import numpy as np
from PIL import Image

from aapt import Control, StreamingGenerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", default="many_streams.png")
    options = parser.parse_args()

    generator = StreamingGenerator.from_pretrained("tiny-world")
    picture = np.asarray(Image.open(generator.sample_image()).convert("RGB"))
    streams = [generator.open(picture, prompt, seed=0) for prompt in generator.themes[:4]]
    turns = np.linspace(-1, 1, len(streams))  # the first turns left, the last right
    steps = max(1, round(options.seconds * generator.fps / generator.frames_per_step))
    start = time.perf_counter()
    for _ in range(steps):
        last = [
            stream.step(Control(forward=0.5, yaw=turn))[-1] for stream, turn in zip(streams, turns)
        ]
    made = len(streams) * steps * generator.frames_per_step
    Image.fromarray(np.concatenate(last, axis=1)).save(options.out)
    rate = made / (time.perf_counter() - start)
    print(f"{options.out}: {len(streams)} streams, {made} frames at {rate:.0f} fps in all")


if __name__ == "__main__":
    main()
