"""Measure decoders on videos that they have not seen: a light one beside the original, or one
alone."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import find_checkpoint, load_config
from ..clock import FPS
from ..data.videos.buckets import Bucket
from ..data.videos.pixel_clips import video_clips
from ..media.figures import MissingLibrary
from ..vae import CausalVAE
from ..vae.folder import LIGHT, ORIGINAL, is_foreign, load_vae
from ..vae.pixels import to_pixels, to_video
from . import metrics
from .world_scenes import held_out_starts, render_truth

WARMUP = 6  # untimed steps of each decoder


def compare_decoders(
    checkpoint: str | Path,
    *,
    videos: Path | None = None,
    size: Bucket | None = None,
    clips: int = 24,
    seconds: float = 2.0,
    seed: int = 0,
    steps: int = 60,
    log: Callable[[str], None] = print,
) -> dict:
    """Measure how the decoders of a checkpoint reconstruct clips, and how fast they stream.

    videos: videos to cut clips from; None for held-out walks through the rendered world. size: of
    the clips; None for the checkpoint's. The decoders are "original" and "light", or
    "decoder" alone. For each the result holds:

        psnr: dB, over all pixels.
        ssim: Structural similarity, mean over video frames (torchmetrics).
        flicker: Mean absolute difference between the change of a decoded pixel from one video frame
            to the next and the change of the true pixel, as a share of the full range.
        sharpness: Mean absolute difference of horizontal neighbours, as a share of the full range.
        seam: `metrics.seam` across cells of one latent pixel; 1 without visible cells.
        edge_sharpness: `metrics.edge_energy` over the truth's; 1 for outlines as steep.
        step_ms: Median time of one latent frame in a stream, batch 1.

    `sharpness` and `seam` are the truth's. For two decoders, `agreement` is the PSNR between them,
    and `speedup` the median over steps of the original's time divided by the light decoder's; None
    for one.
    """
    vaes = {"decoder": load_vae(checkpoint, LIGHT)}
    if not is_foreign(checkpoint) and ORIGINAL in load_config(find_checkpoint(checkpoint)):
        vaes = {"original": load_vae(checkpoint, ORIGINAL), "light": vaes["decoder"]}
    for vae in vaes.values():
        vae.eval().requires_grad_(False)
    size = size or _own_size(checkpoint)
    vae = list(vaes.values())[-1]
    latents = max(1, round(seconds * FPS / vae.config.time_factor))
    frames = 1 + vae.config.time_factor * latents
    if videos is None:
        starts = held_out_starts(clips, latents, seed)
        truth = render_truth(starts, range(frames), size.height, size.width).pixels
    else:
        truth = torch.stack(list(video_clips(videos, size, frames, clips, fps=FPS, report=log)))
    decoded, latent = _decode(vaes, truth)
    cell = vae.config.space_factor
    step_ms, speedup = time_alternating(vaes, latent, steps)
    return {
        "checkpoint": str(checkpoint),
        "clips": len(truth),
        "frames": frames,
        "size": str(size),
        "decoders": {
            name: {
                **quality(video, truth, cell),
                "step_ms": step_ms[name],
                "parameters": sum(p.numel() for p in vaes[name].decoder.parameters()),
            }
            for name, video in decoded.items()
        },
        "sharpness": metrics.sharpness(truth),
        "seam": metrics.seam(truth, cell),
        "agreement": metrics.psnr(*decoded.values()) if len(decoded) == 2 else None,
        "speedup": speedup,
        "threads": torch.get_num_threads(),
    }


def quality(video: Tensor, truth: Tensor, cell: int) -> dict[str, float | None]:
    """Measure a decoded video against the truth, both uint8 (clips, F, H, W, 3).

    cell: width in pixels of a latent pixel. The metrics are those of `compare_decoders`; None if a
    ratio has no denominator.
    """
    steepest = metrics.edge_energy(truth)
    return {
        "psnr": metrics.psnr(video, truth),
        "ssim": ssim(video, truth),
        "flicker": flicker(video, truth),
        "sharpness": metrics.sharpness(video),
        "seam": metrics.seam(video, cell),
        "edge_sharpness": metrics.edge_energy(video) / steepest if steepest else None,
    }


def flicker(video: Tensor, truth: Tensor) -> float:
    """Compute the mean |(v[t+1] - v[t]) - (truth[t+1] - truth[t])| of uint8 (clips, F, H, W, 3).

    It is a share of the full range, and 0 if the error does not change with time.
    """
    total = sum((a.int() - b.int()).diff(dim=0).abs().sum().item() for a, b in zip(video, truth))
    return total / 255 / truth[:, 1:].numel()


def ssim(video: Tensor, truth: Tensor) -> float:
    """Compute the mean structural similarity of video frames (Wang et al., 2004).

    MissingLibrary without torchmetrics.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise MissingLibrary(
            "torchmetrics: expected to be installed, for SSIM; pip install 'aapt[train]'"
        ) from None
    scores = [
        structural_similarity_index_measure(
            *(clip.permute(0, 3, 1, 2).float() for clip in pair), data_range=255.0
        )
        for pair in zip(video, truth)
    ]
    return torch.stack(scores).mean().item()


@torch.inference_mode()
def _decode(vaes: dict[str, CausalVAE], truth: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Encode the truth, and decode the latents with each decoder.

    Returns videos by decoder, uint8 like the truth, and the last clip's latents.
    """
    decoded, encoder = {name: [] for name in vaes}, next(iter(vaes.values()))
    for clip in truth:
        latent = encoder.encode(to_video(clip[None]))
        for name, vae in vaes.items():
            decoded[name].append(to_pixels(vae.decode(latent)))
    return {name: torch.cat(videos) for name, videos in decoded.items()}, latent


@torch.inference_mode()
def time_alternating(
    vaes: dict[str, CausalVAE], latent: Tensor, steps: int
) -> tuple[dict[str, float], float | None]:
    """Time decoders on a stream of latent frames.

    They alternate, so that other work on the machine slows all. Returns the median milliseconds of
    each, and the median of the original's time divided by the light decoder's; None for one.
    """
    states = {name: vae.decode_frame(latent[:, :, :1])[1] for name, vae in vaes.items()}
    times = {name: [] for name in vaes}
    for step in range(WARMUP + steps):
        place = step % latent.shape[2]
        for name, vae in vaes.items():
            start = time.perf_counter()
            _, states[name] = vae.decode_frame(latent[:, :, place : place + 1], states[name])
            times[name].append(1e3 * (time.perf_counter() - start))
    times = {name: values[WARMUP:] for name, values in times.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    if len(times) < 2:
        return medians, None
    ratios = [slow / fast for slow, fast in zip(times["original"], times["light"])]
    return medians, statistics.median(ratios)


def _own_size(checkpoint: str | Path) -> Bucket:
    config = {} if is_foreign(checkpoint) else load_config(find_checkpoint(checkpoint))
    if "width" not in config:
        raise ValueError(
            f"size: expected WIDTHxHEIGHT, got none, and {checkpoint} has no size; pass --size WxH"
        )
    return Bucket(config["width"], config["height"])
