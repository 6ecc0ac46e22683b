"""The world model: a transformer with the encoders of its prompts and controls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor, nn

from ..checkpoint import (
    CheckpointError,
    fill_module,
    load_config,
    read_tensors,
    reading_config,
    tuples,
)
from .conditioning import camera_rays, control_rays
from .config import CameraConfig, ModelConfig
from .latent_relation import LatentRelation
from .mmdit import MMDiT
from .text_encoders import text_encoder
from .transformer import VideoTransformer
from .wan import WanTransformer

TRANSFORMERS: dict[str, type[VideoTransformer]] = {"mmdit": MMDiT, "wan": WanTransformer}


class Conditions(NamedTuple):
    """The conditions of a clip, in the order the transformer takes them."""

    condition: Tensor | None  # (B, condition_channels, T, H, W)
    text: Tensor  # (B, text_tokens, text_width)
    text_lens: Tensor  # (B,)


class WorldModel(nn.Module):
    """Video transformer with its text encoder, see `text_encoders`.

    A model with a camera is driven by controls or poses. One without takes ready condition
    channels (a skeleton's latents), if its configuration has any.
    """

    def __init__(self, config: ModelConfig, camera: CameraConfig | None):
        super().__init__()
        if camera and config.condition_channels != camera.channels:
            raise ValueError(
                f"condition_channels: expected {camera.channels} for the camera's rays, "
                f"got {config.condition_channels}"
            )
        self.config = config
        self.camera = camera
        self.transformer = TRANSFORMERS[config.block](config)
        sizes = config.text_tokens, config.text_width
        self.text_encoder = text_encoder(config.text_encoder, *sizes)

    def load_start(self, path: Path, new_channels: Literal["random", "zero"] = "random") -> None:
        """Fills the model with weights to start training from.

        The weights may be those of a model with fewer input channels: of the noise alone, or of
        noise, recycled frame and fewer conditions. Columns of the other channels keep their random
        initialisation (docs/method.md#10), or are zero. CheckpointError as in `load_module`.
        """
        name, config = "transformer.video_in.weight", self.config
        tensors, whole = read_tensors(path), self.state_dict()[name].clone()
        area, given = config.patch_area, tensors.get(name, whole)
        if given.dim() == 2 and given.shape[0] == len(whole) and given.shape[1] % area == 0:
            channels = given.shape[1] // area  # of a pixel: noise, recycled frame, conditions
            if config.can_start_from(channels):
                if new_channels == "zero":
                    whole.zero_()
                whole.unflatten(1, (area, -1))[..., :channels] = given.unflatten(1, (area, -1))
                tensors[name] = whole
        fill_module(path, tensors, self)

    def load_grown(self, folder: Path, relation: LatentRelation | None = None) -> None:
        """Fills the model with the generator of a checkpoint that has larger tokens, or equal ones.

        A token's embedding is the sum of the larger token's over its parts, so that a constant
        patch is embedded as before; its output is the mean of the parts. Positions stretch if both
        have one reference grid (docs/method.md#4). CheckpointError unless the models agree in
        everything else.

        relation: between the checkpoint's latents and this model's; None if both have one
        autoencoder. The tokens of a model with finer latents are the blocks of the relation, each
        on one latent pixel of the checkpoint. ValueError for such a model without `residual_map`.
        """
        if relation and not self.config.residual_map:
            raise ValueError("residual_map: expected True for a model on other latents, got False")
        path = folder / "model.safetensors"
        with reading_config(folder):
            large = ModelConfig(**tuples(load_config(folder)["model"])).patch_shape
        rows, columns = (1, 1) if relation else self.config.patch_shape
        tensors = {name: tensor.float() for name, tensor in read_tensors(path).items()}
        if large[0] % rows or large[1] % columns:
            raise CheckpointError(
                f"{path}: expected tokens of multiples of {rows} x {columns} latent pixels, got "
                f"{large[0]} x {large[1]}"
            )
        parts = (large[0] // rows, rows, large[1] // columns, columns, -1)
        name = "transformer.video_in.weight"
        tensors[name] = tensors[name].unflatten(1, parts).sum(dim=(1, 3)).flatten(1)
        for name in ("transformer.video_out.weight", "transformer.video_out.bias"):
            tensors[name] = tensors[name].unflatten(0, parts).mean(dim=(0, 2)).flatten(0, 2)
        if relation:
            relation.grow(tensors, self.config.patch_area)
        fill_module(path, tensors, self)

    def conditions(
        self, motion: Tensor | None, prompts: Sequence[str], size: Sequence[int]
    ) -> Conditions:
        """Returns the conditions of clips with one prompt each and latents of `size` =
        (height, width).

        motion: with a camera, controls (B, T, 2) of (yaw, forward) or poses (B, T, frames, 4, 4);
        without a camera, condition channels (B, condition_channels, T, H, W); ignored by a model
        that has neither.
        """
        return Conditions(self.channels(motion, size), *self.text_encoder(prompts))

    def channels(self, motion: Tensor | None, size: Sequence[int]) -> Tensor | None:
        """Returns the condition channels of a motion, see `conditions`. No weight is involved."""
        if self.camera:
            rays = control_rays if motion.dim() == 3 else camera_rays
            return rays(motion, self.camera, *size)
        return motion if self.config.condition_channels else None
