"""Predicts the time of the decoder's kernels on a GPU; nothing is measured.

    python benchmarks/decoder_model.py

Both floors of every layer of a steady step: FLOPs with upsampling folded, and bytes with norms
fused; then what the kernel of csrc/causal_conv3d adds by its design: whole tiles of 8 x 32 pixels,
whole waves of 132 multiprocessors, whole blocks of channels, and norms: a pass of their own, or
instructions behind the product. At the end, what each part of the design saves.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from aapt.vae import CausalVAE, VAEConfig, Work, decoder_work, light, original, total
from aapt.vae.attention import MAX_FUSED_WIDTH, SCORE_BYTES
from aapt.vae.layers import CausalConv3d, ResidualBlock, SeparateUpsample, Upsample, norm_of

MULTIPROCESSORS = 132
PEAK_FLOPS = 790e12  # dense BF16 that large products reach on an H200
PEAK_BYTES = 4.3e12  # per second
CLOCK = 1.5e9  # cycles per second while it does
MAIN_LOOP = 0.8  # of PEAK_FLOPS, within a tile: assumed
TILE = (8, 32)  # columns, rows
LAUNCH_SECONDS = 2e-6  # between kernels of a graph: assumed
MAX_NORMED_CHANNELS = 128
MAX_TAP_ROWS = 32
# Norm and SiLU of a tile: 1600 instructions of each of 8 warps on 4 schedulers, as compiled
NORM_CYCLES = 3200
# Sums of a tile through shared memory, where the taps are rows of the product: estimated
ROWS_CYCLES = 1500
# Attention of a head wider than MAX_FUSED_WIDTH. PyTorch's memory-efficient kernel: 60 to 100
# TFLOP/s estimated. Two products: bytes per score, in float32 written by the first product, read
# and written to scale it, in the softmax and read to round it; in BF16 written and read.
FUSED_FLOPS = 80e12
TRAFFIC_BYTES = 4 + 8 + 8 + 4 + 2 + 2
SCORE_KERNELS = 5  # per block of scores


class Design(NamedTuple):
    packs_once: bool = True
    taps_in_rows: bool = True
    norms_next: bool = True
    attends_by_products: bool = True


BUILT = Design()


class Prediction(NamedTuple):
    flops_floor: float
    bytes_floor: float
    tiles: float  # useful share of what whole tiles, blocks and waves compute
    kernel: float  # seconds of the main loop at MAIN_LOOP and `tiles`, and of what follows it
    extra: float  # seconds of the passes that are not fused, and of launches

    @property
    def floor(self) -> float:
        return max(self.flops_floor, self.bytes_floor)

    @property
    def seconds(self) -> float:
        return max(self.kernel, self.bytes_floor) + self.extra


def whole(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit


def predict(
    work: Work,
    conv: CausalConv3d | None = None,
    frames: int = 0,
    height: int = 0,
    width: int = 0,
    *,
    design: Design = BUILT,
    normed: bool = False,
    outputs: tuple[bool, bool] = (True, False),
) -> Prediction:
    """frames, height, width: of the input, `normed` by the convolution before. `outputs`: whether
    the output is written as it is, and normed for the next. Attention has no convolution."""
    flops, moved = work.folded_flops / PEAK_FLOPS, work.bytes / PEAK_BYTES
    if conv is None:
        seconds, extra = attention(work, frames * (height * width) ** 2, design)
        return Prediction(flops, moved, 1.0, seconds, extra)
    out_channels, in_channels, kt, kh, kw = conv.weight.shape
    repeats, copies = conv.upsample
    phases = repeats * copies**2
    taps = kh * kw
    rows = design.taps_in_rows and phases == 1 and 1 < taps and taps * out_channels <= MAX_TAP_ROWS
    channels, in_work = (128, 1) if out_channels > 64 else (64, 2)
    columns, lines = (n - (k - 1) * rows for n, k in zip(TILE, (kw, kh), strict=True))
    tiles = math.ceil(width / columns) * math.ceil(height / lines)
    tiles *= math.ceil(frames / in_work) * phases * math.ceil(out_channels / channels)
    waves = math.ceil(tiles / MULTIPROCESSORS)
    computed = waves * MULTIPROCESSORS * math.prod(TILE) * channels * in_work
    pixels = height * width * frames
    useful = pixels * phases * out_channels * (taps if rows else 1)
    efficiency = useful * in_channels / (computed * whole(in_channels, 64))
    behind = NORM_CYCLES * outputs[1] + ROWS_CYCLES * rows
    kernel = flops / (efficiency * MAIN_LOOP) + waves * behind / CLOCK

    past = -(-(kt - 1) // repeats)
    passed, kernels = 0, 1
    if (conv.norm_weight is not None or conv.silu) and not normed:
        passed = 2 * frames  # read and written
    elif not past <= frames <= 2 * past:  # else the state is a view
        passed = 2 * past
    passed *= 2 * in_channels * height * width
    kernels += passed > 0
    if not design.packs_once:
        passed, kernels = passed + 2 * 2 * conv.weight.numel(), kernels + 1
    moved += (sum(outputs) - 1) * 2 * pixels * phases * out_channels / PEAK_BYTES
    extra = passed / PEAK_BYTES + kernels * LAUNCH_SECONDS
    return Prediction(flops, moved, efficiency, kernel, extra)


def attention(work: Work, scores: int, design: Design) -> tuple[float, float]:
    """Returns the seconds of the products of attention, and of what is not fused with them."""
    width = work.flops / (4 * scores)
    if width <= MAX_FUSED_WIDTH:
        return work.flops / (MAIN_LOOP * PEAK_FLOPS), LAUNCH_SECONDS
    if not design.attends_by_products:
        return work.flops / FUSED_FLOPS, LAUNCH_SECONDS
    launches = SCORE_KERNELS * math.ceil(4 * scores / SCORE_BYTES)
    extra = TRAFFIC_BYTES * scores / PEAK_BYTES + launches * LAUNCH_SECONDS
    return work.flops / (MAIN_LOOP * PEAK_FLOPS), extra


def followers(decoder: nn.Module) -> dict[CausalConv3d, CausalConv3d]:
    """Maps each convolution to the next one, whose norm and SiLU run in its epilogue."""
    pairs = {}
    for layer, follower in zip(decoder.layers, [*decoder.layers[1:], decoder.conv_out]):
        last = None
        if isinstance(layer, ResidualBlock):
            pairs[layer.conv1], last = layer.conv2, layer.conv2
        elif isinstance(layer, (Upsample, SeparateUpsample)):
            last = layer.conv
        then = norm_of(follower)
        if last is not None and then is not None and then.silu:
            pairs[last] = then
    return {a: b for a, b in pairs.items() if len(a.weight) <= MAX_NORMED_CHANNELS}


def predictions(
    config: VAEConfig, height: int, width: int, design: Design = BUILT
) -> list[tuple[Work, Prediction]]:
    with torch.device("meta"):
        decoder = CausalVAE(config).decoder
    modules = dict(decoder.named_modules())
    pairs = followers(decoder) if design.norms_next else {}
    h, w = height // config.space_factor, width // config.space_factor
    frames, rows = 1, []
    for work in decoder_work(config, height, width):
        conv = modules.get(work.name)
        within = work.name.endswith("conv1")  # of a block: nothing else reads its output
        outputs = (not (within and conv in pairs), conv in pairs)
        normed = conv in pairs.values()
        size = frames, h, w
        rows.append(
            (work, predict(work, conv, *size, design=design, normed=normed, outputs=outputs))
        )
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


def savings(config: VAEConfig, height: int, width: int) -> str:
    """One part of the design after the other."""
    design, words = Design(*[False] * len(Design._fields)), []
    for part in ("", *Design._fields):
        design = design._replace(**{part: True} if part else {})
        seconds = sum(m.seconds for _, m in predictions(config, height, width, design))
        words.append(f"{part or 'without'} {1e3 * seconds:.2f} ms")
    return ", ".join(words)


if __name__ == "__main__":
    for name, config in (("light", light()), ("original", original())):
        for height, width in ((416, 736), (720, 1280)):
            print(table(name, config, height, width))
            print(f"in steps: {savings(config, height, width)}", end="\n\n")
