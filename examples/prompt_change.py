"""Change the prompt while a stream runs, with and without recomputing what the stream remembers.

A stream opened with `recache=True` computes its past again under the new text, so the new prompt
takes hold sooner. The picture shows a row per stream: `python examples/prompt_change.py`.
"""

import argparse

import numpy as np
from PIL import Image

from aapt import Control, StreamingGenerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="before and after the change")
    parser.add_argument("--prompt", default="city of neon at night")
    parser.add_argument("--out", default="prompt_change.png")
    options = parser.parse_args()

    generator = StreamingGenerator.from_pretrained("tiny-world")
    first_frame = np.asarray(Image.open(generator.sample_image()).convert("RGB"))
    steps = max(1, round(options.seconds * generator.fps / generator.frames_per_step))
    rows = []
    for recache in (False, True):
        stream = generator.open(first_frame, generator.sample_prompt, seed=0, recache=recache)
        frames = [stream.step(Control(forward=1.0))[-1] for _ in range(steps)]
        stream.prompt = options.prompt  # in force from the next step on
        frames += [stream.step(Control(forward=1.0))[-1] for _ in range(steps)]
        shown = np.linspace(0, len(frames) - 1, 6).round().astype(int)
        rows.append(np.concatenate([frames[i] for i in shown], axis=1))
    Image.fromarray(np.concatenate(rows)).save(options.out)
    print(f"{options.out}: {generator.sample_prompt!r}, then {options.prompt!r}")


if __name__ == "__main__":
    main()
