"""A transformer with what turns prompts and controls into its inputs."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .conditioning import control_rays
from .config import CameraConfig, ModelConfig
from .model import VideoTransformer
from .text import ByteTextEncoder


class Conditions(NamedTuple):
    """The conditions of a clip, in the order the transformer takes them."""

    condition: Tensor | None  # (B, condition_channels, T, H, W)
    text: Tensor  # (B, text_tokens, text_width)
    text_lens: Tensor  # (B,)


class WorldModel(nn.Module):
    """Camera-controlled video transformer with its own byte-level text encoder."""

    def __init__(self, config: ModelConfig, camera: CameraConfig):
        super().__init__()
        if config.condition_channels != camera.channels:
            raise ValueError(
                f"condition_channels: expected {camera.channels} for the camera's rays, "
                f"got {config.condition_channels}"
            )
        self.config = config
        self.camera = camera
        self.transformer = VideoTransformer(config)
        self.text_encoder = ByteTextEncoder(config.text_tokens, config.text_width)

    def conditions(
        self, controls: Tensor, prompts: Sequence[str], size: Sequence[int]
    ) -> Conditions:
        """controls (B, T, 2) of (yaw, forward), one prompt per clip, latent (height, width)."""
        rays = control_rays(controls, self.camera, *size)
        return Conditions(rays, *self.text_encoder(prompts))
