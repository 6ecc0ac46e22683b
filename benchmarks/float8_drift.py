"""Stream held-out worlds with the bundled model in 8 bits and in bfloat16, and print how far apart
the streams are, second by second, and how both drift from the rendered truth.

    python -m benchmarks.float8_drift                  # six worlds, 60 s: about ten CPU minutes

Two streams whose numbers differ at all become two walks, so pixels alone do not tell whether one
looks worse. The yardstick is bfloat16 with other noise: a precision that costs nothing is as far
from the truth as that. In 8 bits are the linear layers of the blocks, and in one row the cache of
keys and values too; all else is bfloat16.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from aapt.clock import STEPS_PER_SECOND
from aapt.evaluate import metrics
from aapt.evaluate.evaluation import cache_folder
from aapt.evaluate.features import describe, feature_distance
from aapt.evaluate.motion_probe import ProbeConfig
from aapt.evaluate.object_detector import ObjectDetectorConfig
from aapt.evaluate.scenes import roll_out_scenes
from aapt.evaluate.video_frames import VideoFrames
from aapt.evaluate.windows import drift_frames
from aapt.evaluate.world_scenes import WorldScenes, held_out_starts, render_truth
from aapt.model.float8 import quantise_blocks
from aapt.streaming.generator import StreamingGenerator

MODEL = "tiny-world"
SHOWN = (1, 2, 3, 5, 10, 20, 30, 40, 50, 60)  # seconds whose PSNR is printed
SPANS = ((3, 6), (56, 60))  # seconds, both included, over which drift is measured


@dataclass(frozen=True)
class Variant:
    """Precision of the model. seed: seed of the noise."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    linear: bool = False  # linear layers of the blocks in e4m3
    cache: str = "model"  # see `StreamingGenerator.use_cache`

    def generator(self) -> StreamingGenerator:
        """Return the model in this precision."""
        made = StreamingGenerator.from_pretrained(MODEL, "cpu", self.dtype, cache=self.cache)
        if self.linear:
            quantise_blocks(made.model.transformer)
        return made


VARIANTS = (  # the first is the one that the pixels of the others are compared with
    Variant("bfloat16"),
    Variant("e4m3 linear and cache", linear=True, cache="float8"),
    Variant("bfloat16, other noise", seed=1),
    Variant("e4m3 linear", linear=True),
    Variant("float32", torch.float32),
)


def scenes_of(generator: StreamingGenerator, worlds: int, seconds: int) -> WorldScenes:
    """Return the walks that every variant makes."""
    walks = held_out_starts(worlds, seconds * STEPS_PER_SECOND, seed=0)
    detector = ObjectDetectorConfig()
    return WorldScenes(walks, {MODEL: generator}, ProbeConfig(), cache_folder(), detector)


def stream(variant: Variant, worlds: int, seconds: int) -> Tensor:
    """Return the last two video frames of each second: uint8 (worlds, seconds, 2, H, W, 3)."""
    generator, steps = variant.generator(), seconds * STEPS_PER_SECOND
    scenes, frames = scenes_of(generator, worlds, seconds), kept_frames(seconds)
    return by_second(roll_out_scenes(generator, scenes, steps, frames, variant.seed)[0])


def render(worlds: int, seconds: int) -> Tensor:
    """Return the truth of `stream`."""
    generator = VARIANTS[0].generator()
    starts = scenes_of(generator, worlds, seconds).starts
    frames = render_truth(starts, kept_frames(seconds), generator.height, generator.width)
    return by_second(frames)


def kept_frames(seconds: int) -> list[int]:
    return [frame for second in range(1, seconds + 1) for frame in drift_frames(second)]


def by_second(video: VideoFrames) -> Tensor:
    return video.pixels.unflatten(1, (-1, 2))


@dataclass(frozen=True)
class Drift:
    """Distance from the truth over some seconds, all worlds together.

    Attributes:
        features: `feature_distance` from the truth of all seconds.
        palette: `palette_error` against the truth at the same seconds.
        sharpness: Divided by the truth's at the same seconds.
    """

    features: float
    palette: float
    sharpness: float


def drift(video: Tensor, truth: Tensor, first: int, last: int) -> Drift:
    """Measure the seconds `first` to `last`, counted from 1, of what `stream` returns."""
    part = slice(first - 1, last)
    ours, real = (x[:, part].flatten(1, 2) for x in (video, truth))
    features, all_real = (describe(x.flatten(0, 1)) for x in (video[:, part], truth))
    return Drift(
        feature_distance(features, all_real),
        metrics.palette_error(metrics.palette(ours), metrics.palette(real)),
        metrics.sharpness(ours) / metrics.sharpness(real),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--worlds", type=int, default=6)
    parser.add_argument("--seconds", type=int, default=60)
    asked = parser.parse_args()
    truth, first = render(asked.worlds, asked.seconds), None
    shown = [second for second in SHOWN if second <= asked.seconds]
    spans = [span for span in SPANS if span[1] <= asked.seconds]
    print(f"PSNR in dB beside {VARIANTS[0].name}, {asked.worlds} worlds; then, against the truth,")
    print("feature distance, palette error in %, sharpness")
    headings = [*(f"{second} s" for second in shown), *(f"{a} to {b} s" for a, b in spans)]
    print(f"| | {' | '.join(headings)} |\n|---|{'---|' * len(headings)}")
    for variant in VARIANTS:
        video = stream(variant, asked.worlds, asked.seconds)
        first = video if first is None else first
        cells = [f"{metrics.psnr(video[:, n - 1], first[:, n - 1]):.1f}" for n in shown]
        for span in spans:
            found = drift(video, truth, *span)
            cells.append(f"{found.features:.2f}, {100 * found.palette:.2f}, {found.sharpness:.2f}")
        print(f"| {variant.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
