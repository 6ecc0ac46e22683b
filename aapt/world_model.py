"""A transformer with what turns prompts and controls into its inputs."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .conditioning import camera_rays, control_rays
from .config import CameraConfig, ModelConfig
from .model import VideoTransformer
from .text import ByteTextEncoder


class Conditions(NamedTuple):
    """The conditions of a clip, in the order the transformer takes them."""

    condition: Tensor | None  # (B, condition_channels, T, H, W)
    text: Tensor  # (B, text_tokens, text_width)
    text_lens: Tensor  # (B,)


class WorldModel(nn.Module):
    """Video transformer with its own byte-level text encoder, controlled by a camera if it has
    one."""

    def __init__(self, config: ModelConfig, camera: CameraConfig | None):
        super().__init__()
        channels = camera.channels if camera else 0
        if config.condition_channels != channels:
            raise ValueError(
                f"condition_channels: expected {channels} for "
                f"{'the rays of the camera' if camera else 'a model without a camera'}, "
                f"got {config.condition_channels}"
            )
        self.config = config
        self.camera = camera
        self.transformer = VideoTransformer(config)
        self.text_encoder = ByteTextEncoder(config.text_tokens, config.text_width)

    def conditions(
        self, motion: Tensor | None, prompts: Sequence[str], size: Sequence[int]
    ) -> Conditions:
        """One prompt per clip, latents of `size` = (height, width). motion: controls (B, T, 2) of
        (yaw, forward), or the camera's poses (B, T, frames, 4, 4); unused without a camera."""
        condition = None
        if self.camera:
            rays = control_rays if motion.dim() == 3 else camera_rays
            condition = rays(motion, self.camera, *size)
        return Conditions(condition, *self.text_encoder(prompts))
