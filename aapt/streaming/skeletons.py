"""Poses of a stream as condition channels: drawn, and encoded step by step."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..model.pose import POINTS, Pose, draw_skeletons
from ..vae import CausalVAE, EncoderState

NOBODY = Pose(np.zeros((1, len(POINTS), 3)))


class SkeletonEncoder:
    """Draws the poses of one stream as skeletons, and encodes them as one video
    (docs/method.md#10).

    The encoder's state goes from step to step, so the channels of every step equal those of the
    whole video encoded at once.

    Attributes:
        state: What the encoder remembers of the video frames so far; it is replaced, never written
            to.
    """

    def __init__(self, vae: CausalVAE, height: int, width: int):
        self.vae, self.height, self.width = vae, height, width
        self.state: EncoderState = ()

    def start(self, pose: Pose) -> None:
        """Begins a video with the pose of its first video frame."""
        _, self.state = self.vae.encode_frames(self._draw(pose))

    def encode(self, pose: Pose) -> tuple[Tensor, EncoderState]:
        """Encodes the poses of the next step. Returns its channels (1, C, 1, h, w), and the state
        for the step after, which the caller stores once the step is made."""
        return self.vae.encode_frames(self._draw(pose), self.state)

    def _draw(self, pose: Pose) -> Tensor:
        """The drawn skeletons as video (1, 3, frames, height, width) in [-1, 1]."""
        like = self.vae.latent_mean
        drawn = torch.from_numpy(draw_skeletons(pose.points, self.height, self.width))
        video = drawn.to(like.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return video.to(like.dtype)


def copied(state: Sequence[Tensor]) -> EncoderState:
    """Copies the state of an encoder."""
    return tuple(part.clone() for part in state)
