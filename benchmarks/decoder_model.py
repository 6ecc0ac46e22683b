"""What the decoder's kernels should take on a GPU: a prediction, not a figure.

    python benchmarks/decoder_model.py

Both floors of every layer of a steady step: FLOPs with upsampling folded, and bytes with norms
fused; then what the kernel of csrc/causal_conv3d adds by its design: whole tiles of 8 x 32 pixels,
whole waves of 132 multiprocessors, whole blocks of channels, a separate pass for norm and SiLU, and
weights packed in every step.
"""

import math
from dataclasses import dataclass

import torch

from aapt.vae import CausalVAE, VAEConfig, Work, decoder_work, light, original, total

MULTIPROCESSORS = 132
PEAK_FLOPS = 790e12  # dense BF16 that large products reach on an H200
PEAK_BYTES = 4.3e12  # per second
MAIN_LOOP = 0.8  # of PEAK_FLOPS, within a tile: assumed
TILE = (8, 32)  # columns, rows
LAUNCH_SECONDS = 2e-6  # between kernels of a graph: assumed
KERNELS_PER_CONVOLUTION = 3  # activate, pack, convolve


@dataclass(frozen=True)
class Prediction:
    flops_floor: float
    bytes_floor: float
    tiles: float  # useful share of what whole tiles, blocks and waves compute
    kernel: float  # seconds of the main loop at MAIN_LOOP and `tiles`
    extra: float  # seconds of the passes that are not fused yet, and of launches

    @property
    def floor(self) -> float:
        return max(self.flops_floor, self.bytes_floor)

    @property
    def seconds(self) -> float:
        return max(self.kernel, self.bytes_floor) + self.extra


def whole(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit


def predict(work: Work, conv=None, frames=0, height=0, width=0) -> Prediction:
    """frames, height, width: of the input. Attention has no convolution: both floors."""
    flops, moved = work.folded_flops / PEAK_FLOPS, work.bytes / PEAK_BYTES
    if conv is None:
        return Prediction(flops, moved, 1.0, flops, LAUNCH_SECONDS)
    out_channels, in_channels = conv.weight.shape[:2]
    repeats, copies = conv.upsample
    wide = out_channels > 64
    channels, in_work = (128, 1) if wide else (64, 2)
    columns, rows = math.ceil(width / TILE[0]), math.ceil(height / TILE[1])
    groups = math.ceil(frames / in_work) * repeats * copies**2
    tiles = columns * rows * groups * math.ceil(out_channels / channels)
    waves = math.ceil(tiles / MULTIPROCESSORS) * MULTIPROCESSORS
    computed = waves * TILE[0] * TILE[1] * channels * in_work * whole(in_channels, 64)
    useful = height * width * frames * repeats * copies**2 * out_channels * in_channels
    activation = 0
    if conv.norm_weight is not None or conv.silu:
        activation = 2 * 2 * in_channels * frames * height * width  # read and written
    packed = 2 * 2 * conv.weight.numel()
    extra = (activation + packed) / PEAK_BYTES + KERNELS_PER_CONVOLUTION * LAUNCH_SECONDS
    efficiency = useful / computed
    return Prediction(flops, moved, efficiency, flops / (efficiency * MAIN_LOOP), extra)


def predictions(config: VAEConfig, height: int, width: int) -> list[tuple[Work, Prediction]]:
    with torch.device("meta"):
        decoder = CausalVAE(config).decoder
    modules = dict(decoder.named_modules())
    h, w = height // config.space_factor, width // config.space_factor
    frames, rows = 1, []
    for work in decoder_work(config, height, width):
        conv = modules.get(work.name)
        rows.append((work, predict(work, conv, frames, h, w)))
        if conv is not None:
            repeats, copies = conv.upsample
            frames, h, w = frames * repeats, h * copies, w * copies
    return rows


def table(name: str, config: VAEConfig, height: int, width: int) -> str:
    rows = [
        f"{name}, {width}x{height}: PREDICTION, nothing here was measured",
        "",
        "| layer | GFLOP | folded | MB | FLOPs floor us | bytes floor us | tiles | predicted us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    predicted = predictions(config, height, width)
    for work, model in predicted:
        rows.append(
            f"| {work.name} | {work.flops / 1e9:.1f} | {work.folded_flops / 1e9:.1f} "
            f"| {work.bytes / 1e6:.0f} | {1e6 * model.flops_floor:.0f} "
            f"| {1e6 * model.bytes_floor:.0f} | {model.tiles:.2f} | {1e6 * model.seconds:.0f} |"
        )
    work = total([work for work, _ in predicted])
    floor, seconds = (
        sum(f(m) for _, m in predicted) for f in (lambda m: m.floor, lambda m: m.seconds)
    )
    rows.append(
        f"| total | {work.flops / 1e9:.0f} | {work.folded_flops / 1e9:.0f} "
        f"| {work.bytes / 1e6:.0f} | {1e6 * work.folded_flops / PEAK_FLOPS:.0f} "
        f"| {1e6 * work.bytes / PEAK_BYTES:.0f} "
        f"| {work.folded_flops / PEAK_FLOPS / sum(m.kernel * MAIN_LOOP for _, m in predicted):.2f} "
        f"| {1e6 * seconds:.0f} |"
    )
    rows.append(f"\nsum of the larger floor of each layer: {1e3 * floor:.2f} ms")
    return "\n".join(rows)


if __name__ == "__main__":
    for name, config in (("light", light()), ("original", original())):
        for height, width in ((416, 736), (720, 1280)):
            print(table(name, config, height, width), end="\n\n")
