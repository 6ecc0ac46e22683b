"""A discriminator of small patches of video, for decoders."""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """One logit for each patch of a video (Isola et al., 2017): strided convolutions that read
    three frames each, so that flicker shows.

    Patches are 2^depth pixels apart; width doubles with every halving.
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        widths = [3, *(width * 2**i for i in range(depth))]
        self.layers = nn.ModuleList(
            nn.Conv3d(wide, wider, (3, 4, 4), stride=(1, 2, 2), padding=1)
            for wide, wider in zip(widths, widths[1:])
        )
        self.logit = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def forward(self, video: Tensor) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1] -> (B, F, H / 2^depth, W / 2^depth)."""
        x = video
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return self.logit(x).squeeze(1)
