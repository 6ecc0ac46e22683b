"""Walk through a bundled world and write an animation: `python examples/walk.py`.

One latent frame per step, four video frames each, made in one forward pass.
"""

import argparse

import numpy as np
from PIL import Image

from aapt import Control, StreamingGenerator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-world", help="a bundled world or a folder")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", default="walk.gif")
    options = parser.parse_args()

    generator = StreamingGenerator.from_pretrained(options.model)
    first_frame = np.asarray(Image.open(generator.sample_image()).convert("RGB"))
    stream = generator.open(first_frame, prompt=generator.sample_prompt, seed=0)
    video = list(stream.first_frame)  # uint8 (height, width, 3) each
    for step in range(round(options.seconds * generator.fps / generator.frames_per_step)):
        turn = 0.4 if step % 24 < 12 else -0.4  # right for two seconds, then left
        video += list(stream.step(Control(forward=1.0, yaw=turn)))

    first, *rest = (Image.fromarray(frame) for frame in video)
    first.save(
        options.out, save_all=True, append_images=rest, duration=1000 / generator.fps, loop=0
    )
    print(f"{options.out}: {len(video)} frames")


if __name__ == "__main__":
    main()
