"""Small models and clips that several tests build."""

import dataclasses

import numpy as np
import torch

from aapt.data.clips import LatentClips
from aapt.data.randomness import ClipRandom
from aapt.model.config import CameraConfig, ModelConfig
from aapt.model.wan import WanTransformer
from aapt.model.world_model import WorldModel

CAMERA = CameraConfig(1.5, 0.04, 0.07, 0.05, 0.025)

CONFIG = ModelConfig(
    width=32,
    heads=2,
    head_dim=16,
    depth=3,
    text_width=8,
    text_tokens=6,
    window_frames=2,
    reference_grid=(2, 3),
    rope_axes=(4, 6, 6),
    latent_channels=4,
    condition_channels=CAMERA.channels,
)
WAN = dataclasses.replace(
    CONFIG,
    block="wan",
    mlp_width=40,
    reference_grid=None,
    condition_channels=0,
    recycle=False,
)
SIZE = (4, 6)  # latent height and width
PROMPTS = ["ab", "abcdefgh"]


def tiny_model(**changes) -> WorldModel:
    """A random model with modulation other than zero, so that every path matters."""
    torch.manual_seed(0)
    model = WorldModel(dataclasses.replace(CONFIG, **changes), CAMERA)
    for name, parameter in model.named_parameters():
        if "modulation" in name or "video_out" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def wan_transformer(**changes) -> WanTransformer:
    """A random Wan-type transformer in which every path matters."""
    torch.manual_seed(0)
    model = WanTransformer(dataclasses.replace(WAN, **changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2)
        elif "modulation" in name or "table" in name or "video_out" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def latents(frames: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, CONFIG.latent_channels, frames, *SIZE, dtype=torch.float64)


def controls(frames: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, frames, 2, dtype=torch.float64) * 2 - 1


def draws(clips: int, seed: int = 0, step: int = 0) -> ClipRandom:
    return ClipRandom(seed, step, range(clips))


def clips(count: int = 6, length: int = 9) -> LatentClips:
    return LatentClips(
        torch.randn(count, CONFIG.latent_channels, length, *SIZE),
        torch.rand(count, length - 1, 2) * 2 - 1,
        [("ab", "abc")] * count,
    )


def read_video(path) -> torch.Tensor:
    """The frames of a video file, uint8 (F, H, W, 3)."""
    import av  # not on a machine that has PyTorch alone, where other helpers are used

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames))
