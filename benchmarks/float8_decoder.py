"""Decode with the bundled decoders in 8 bits, and print what the pixels lose: all layers in e4m3,
the inner ones, and each alone; and predict the time of the light decoder at 1280x720.

    python -m benchmarks.float8_decoder                # about one CPU minute

A layer in 8 bits is `causal_conv3d_e4m3`: input after norm and SiLU, state and weight in e4m3,
output and residual in bfloat16. Videos are compared with those of the decoder in bfloat16, and with
the rendered truth.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from aapt.evaluate import metrics
from aapt.evaluate.breakdown import GPUS, Gpu
from aapt.evaluate.world_scenes import held_out_starts, render_truth
from aapt.vae import CausalVAE
from aapt.vae.config import VAEConfig, light
from aapt.vae.cost import Work, decoder_work
from aapt.vae.float8 import ENDS, Float8Conv3d
from aapt.vae.folder import LIGHT, ORIGINAL, load_vae
from aapt.vae.layers import CausalConv3d
from aapt.vae.pixels import to_pixels, to_video

MODEL, SIZE = "tiny-world", (80, 128)
STEPS = 12  # latent frames of a clip: two seconds
RATE = 1100e12  # FP8 operations per second, as far below the chip's peak as BF16's 630e12


def layers_of(vae: CausalVAE) -> dict[str, CausalConv3d]:
    """Return the convolutions of a decoder by name, in the order they run."""
    modules = vae.decoder.named_modules()
    return {name: module for name, module in modules if isinstance(module, CausalConv3d)}


@contextmanager
def in_e4m3(layers: Iterable[CausalConv3d]) -> Iterator[None]:
    """Compute these layers in 8 bits inside."""
    rounded = {layer: Float8Conv3d(layer).forward for layer in layers}
    for layer, forward in rounded.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer in rounded:
            del layer.forward


def decode(vae: CausalVAE, latents: Tensor) -> Tensor:
    """Return pixels, uint8 (clips, F, H, W, 3)."""
    return torch.cat([to_pixels(vae.decode(latent[None])) for latent in latents])


@torch.inference_mode()
def measure(part: str, clips: int, steps: int) -> Iterator[tuple[str, float, float]]:
    """Yield what is in 8 bits, PSNR against bfloat16 and PSNR against the truth, in dB."""
    encoder, vae = load_vae(MODEL, LIGHT), load_vae(MODEL, part, dtype=torch.bfloat16)
    walks = held_out_starts(clips, steps, seed=0)
    truth = render_truth(walks, range(1 + 4 * steps), *SIZE).pixels
    latents = torch.cat([encoder.encode(to_video(clip[None])) for clip in truth]).bfloat16()
    layers, plain = layers_of(vae), decode(vae, latents)
    chosen = {"no layer": [], "all layers": [*layers.values()]}
    chosen["inner layers"] = [layer for name, layer in layers.items() if name not in ENDS]
    chosen |= {name: [layer] for name, layer in layers.items()}
    for name, rounded in chosen.items():
        with in_e4m3(rounded):
            video = decode(vae, latents)
        yield name, metrics.psnr(video, plain), metrics.psnr(video, truth)


def predict(config: VAEConfig, height: int, width: int, gpu: Gpu) -> tuple[float, float]:
    """Return the seconds of a decoder's step in bfloat16, and in e4m3 with inputs of one byte that
    the layer before has written, without the gaps between kernels."""

    def seconds(works: Iterable[Work], rate: float) -> float:
        return sum(max(work.folded_flops / rate, work.bytes / gpu.memory) for work in works)

    plain, rounded = (decoder_work(config, height, width, size) for size in (2, 1))
    return seconds(plain, gpu.convolutions), seconds(rounded, RATE)


def main() -> None:
    for part in (LIGHT, ORIGINAL):
        print(f"{MODEL}, {part}; in 8 bits | dB against bfloat16 | dB against the truth")
        for name, lost, quality in measure(part, clips=6, steps=STEPS):
            print(f"{name} | {lost:.1f} | {quality:.2f}", flush=True)
    for name, gpu in GPUS.items():
        plain, rounded = (1e3 * each for each in predict(light(), 720, 1280, gpu))
        print(f"light decoder at 1280x720 on {name}, predicted: {plain:.1f}, {rounded:.1f} ms")


if __name__ == "__main__":
    main()
