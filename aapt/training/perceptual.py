"""Perceptual distance of videos, by a network whose weights the user brings."""

from pathlib import Path

from torch import Tensor, nn

from ..torchscript import TorchScriptFeatures


class PerceptualDistance(nn.Module):
    """Squared distance in the features of a network, mean over video frames.

    This is LPIPS (Zhang et al., 2018) for a network such as the `vgg16.pt` of StyleGAN2-ADA.
    Nothing is downloaded.

    Args:
        path: A TorchScript file that maps images, float (N, 3, H, W) from 0 to 255, to features
            (N, D). If its `forward` has an argument `return_lpips`, it is passed as true, and
            `resize_images` as false. ValueError if the file is not a TorchScript network.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.features = TorchScriptFeatures("perceptual", path).requires_grad_(False)
        known = {"return_lpips": True, "resize_images": False}
        names = {argument.name for argument in self.features.network.forward.schema.arguments}
        self.features.arguments = {name: known[name] for name in known if name in names}

    def forward(self, video: Tensor, target: Tensor) -> Tensor:
        """Distance of two videos (B, 3, F, H, W) in [-1, 1]."""
        ours, theirs = (
            self.features((x.transpose(1, 2).flatten(0, 1).float() + 1) * 127.5)
            for x in (video, target)
        )
        return (ours - theirs).square().sum(dim=1).mean()
