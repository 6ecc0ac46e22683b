"""How different two videos look to a network whose weights the user brings."""

from pathlib import Path

from torch import Tensor, nn

from ..torchscript import TorchScriptFeatures


class PerceptualDistance(nn.Module):
    """Squared distance in the features of a network (LPIPS: Zhang et al., 2018), mean over frames.

    path: a TorchScript file that makes frames, float (N, 3, H, W) in 0 to 255, into features
    (N, D), such as the `vgg16.pt` that came with StyleGAN2-ADA. Of the arguments `return_lpips` and
    `resize_images` those that its `forward` has are true and false.

    ValueError for a file that is none. Nothing is ever downloaded.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.features = TorchScriptFeatures("perceptual", path).requires_grad_(False)
        known = {"return_lpips": True, "resize_images": False}
        names = {argument.name for argument in self.features.network.forward.schema.arguments}
        self.features.arguments = {name: known[name] for name in known if name in names}

    def forward(self, video: Tensor, target: Tensor) -> Tensor:
        """Both (B, 3, F, H, W) in [-1, 1]."""
        ours, theirs = (
            self.features((x.transpose(1, 2).flatten(0, 1).float() + 1) * 127.5)
            for x in (video, target)
        )
        return (ours - theirs).square().sum(dim=1).mean()
