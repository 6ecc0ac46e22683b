"""Films the bundled figures for the documents: `python docs/figures.py` writes docs/figures.gif.

Six looks in six places follow one show of motions, each with its skeleton in a corner.
"""

from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from aapt import StreamingGenerator
from aapt.data.rendered import FirstImage
from aapt.data.tiny_puppet.clips import PuppetData
from aapt.model.pose import draw_skeletons
from aapt.streaming.poses import load_poses

OUT = Path(__file__).parent / "figures.gif"
SECONDS = 8
COLUMNS = 3
SCALE = 2
COLOURS = 128


def film(generator: StreamingGenerator, first: FirstImage) -> np.ndarray:
    """Returns every second video frame of a figure: uint8 (frames, height, width, 3), enlarged."""
    script = load_poses("show")
    stream = generator.open(np.asarray(first.image), first.prompt, pose=script.first)
    steps = script.steps(generator.fps, generator.frames_per_step)
    poses = list(islice(steps, SECONDS * generator.fps // generator.frames_per_step))
    video = np.concatenate([stream.step(pose) for pose in poses])[::2]
    points = np.concatenate([pose.points for pose in poses])[::2]
    drawn = draw_skeletons(points, generator.height, generator.width)
    video = video.repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    video[:, : generator.height // 2, : generator.width // 2] = drawn[:, ::2, ::2]
    return video


def main() -> None:
    generator = StreamingGenerator.from_pretrained("tiny-puppet")
    size = {"height": generator.height, "width": generator.width}
    looks = PuppetData(**size, clips=1, latent_frames=1).first_images()
    videos = [film(generator, first) for first in looks]
    rows = [np.concatenate(videos[n : n + COLUMNS], axis=2) for n in range(0, len(videos), COLUMNS)]
    whole = np.concatenate(rows, axis=1)
    some = np.concatenate(whole[:: len(whole) // 6])
    palette = Image.fromarray(some).quantize(COLOURS)
    frames = [Image.fromarray(frame).quantize(palette=palette, dither=0) for frame in whole]
    duration = 2000 / generator.fps
    frames[0].save(OUT, save_all=True, append_images=frames[1:], duration=duration, loop=0)
    print(f"{OUT}: {len(frames)} frames, {OUT.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
