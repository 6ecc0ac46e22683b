"""Move the bundled figure by poses of your own and write an animation: `python examples/dance.py`.

The arms swing up and down beside the body. A step takes the 14 keypoints of its four video frames.
"""

import argparse
import math

import numpy as np
from PIL import Image

from aapt import Pose, StreamingGenerator

# x and y in shares of the image: head, neck, right arm, left arm, right leg, left leg
STANDING = np.array(
    [
        *((0.49, 0.35), (0.49, 0.47)),
        *((0.42, 0.49), (0.39, 0.59), (0.37, 0.69)),
        *((0.57, 0.49), (0.60, 0.59), (0.61, 0.69)),
        *((0.45, 0.64), (0.44, 0.76), (0.43, 0.87)),
        *((0.54, 0.64), (0.55, 0.76), (0.56, 0.87)),
    ]
)
LIMB = 0.105


def swinging(seconds: float) -> np.ndarray:
    """Keypoints (14, 3) of (x, y, visible) at a time."""
    points = STANDING.copy()
    angle = 1.4 * (1 - math.cos(2 * math.pi * seconds / 2))  # from hanging, one swing in 2 s
    for shoulder, side in ((2, -1), (5, 1)):
        reach = LIMB * np.array([side * math.sin(angle), math.cos(angle)])
        points[shoulder + 1] = points[shoulder] + reach
        points[shoulder + 2] = points[shoulder] + 2 * reach
    return np.concatenate([points, np.ones((14, 1))], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--out", default="dance.gif")
    options = parser.parse_args()

    generator = StreamingGenerator.from_pretrained("tiny-puppet")
    first_frame = np.asarray(Image.open(generator.sample_image()).convert("RGB"))
    pose = Pose(swinging(0)[None])
    stream = generator.open(first_frame, prompt=generator.sample_prompt, pose=pose)
    video = list(stream.first_frame)  # uint8 (height, width, 3) each
    for _ in range(round(options.seconds * generator.fps / generator.frames_per_step)):
        times = (np.arange(generator.frames_per_step) + len(video)) / generator.fps
        video += list(stream.step(Pose(np.stack([swinging(time) for time in times]))))

    first, *rest = (Image.fromarray(frame) for frame in video)
    first.save(
        options.out, save_all=True, append_images=rest, duration=1000 / generator.fps, loop=0
    )
    print(f"{options.out}: {len(video)} frames")


if __name__ == "__main__":
    main()
