"""FID and FVD: Frechet distances in the features of a network whose weights the user brings.

FID (Heusel et al., 2017) compares video frames, FVD (Unterthiner et al., 2018) clips of 16. The
distance is torchmetrics'; nothing is downloaded. Usual files are `inception-2015-12-05.pt` and
`i3d_torchscript.pt`; any other TorchScript file with the same inputs serves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..media.figures import MissingLibrary
from ..torchscript import TorchScriptFeatures
from .scenes import Scenes
from .windows import Window

CLIP_FRAMES = 16
BATCH = 32  # video frames or clips per forward pass
Kind = Literal["fid", "fvd"]


class PretrainedDistance:
    """A distance between generated and real videos.

    Args:
        kind: "fid": the network takes frames, uint8 (N, 3, H, W); "fvd": clips of 16 frames, float
            (N, 3, 16, H, W) in 0 to 255. It returns features (N, D).
        path: A TorchScript file. If its `forward` has arguments `return_features`, `rescale` or
            `resize`, they are set to true.

    ValueError if the file is not a TorchScript network; MissingLibrary without torchmetrics.
    """

    of_truth: ClassVar[bool] = False

    def __init__(self, kind: Kind, path: Path):
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError:
            raise MissingLibrary(
                f"torchmetrics: expected to be installed, for {kind}; pip install 'aapt[train]'"
            ) from None
        self.kind, self.path, self._metric = kind, path, FrechetInceptionDistance
        self.network = TorchScriptFeatures(kind, path)

    @property
    def frames(self) -> int:
        """Least number of video frames of a sample."""
        return 1 if self.kind == "fid" else CLIP_FRAMES

    def measure(
        self, video: Tensor, truth: Tensor, scenes: Scenes, window: Window
    ) -> Mapping[str, float | None]:
        """Measure a window of videos, uint8 (starts, 1 + F, H, W, 3), against the truth's (starts,
        F, H, W, 3), if it is long enough."""
        enough = truth.shape[1] >= self.frames
        return {self.kind: self(video[:, 1:], truth)} if enough else {}

    @torch.no_grad()
    def __call__(self, videos: Tensor, truth: Tensor) -> float | None:
        """Compute the distance between two sets of videos, uint8 (starts, F, H, W, 3) each.

        None if one of them holds fewer than two samples.
        """
        made, real = (self._samples(x) for x in (videos, truth))
        if min(len(made), len(real)) < 2:
            return None
        metric = self._metric(self.network, input_img_size=tuple(real.shape[1:]))
        for samples, is_real in ((made, False), (real, True)):
            for batch in samples.split(BATCH):
                metric.update(batch, real=is_real)
        return metric.compute().item()

    def _samples(self, videos: Tensor) -> Tensor:
        """Cut videos into frames (N, 3, H, W), or into clips (N, 3, 16, H, W) without overlap."""
        if self.kind == "fid":
            return videos.flatten(0, 1).permute(0, 3, 1, 2)
        count = videos.shape[1] // CLIP_FRAMES
        clips = videos[:, : count * CLIP_FRAMES].unflatten(1, (count, CLIP_FRAMES)).flatten(0, 1)
        return clips.permute(0, 4, 1, 2, 3)
