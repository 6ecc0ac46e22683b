"""Linear maps between the latents of two autoencoders, for a generator that changes latents."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

NOISE = 0.2  # deviation in whitened latents


class LatentRelation(NamedTuple):
    """Linear maps between a pixel of coarse latents and the block of fine latents on the same
    pixels of video.

    A block of p x q fine latent pixels of c channels is p q c numbers, in the order of
    `VideoTransformer.patchify`: rows, columns, channels. The change of a block from one frame to
    the next is estimated as `up` of the coarse pixel's change plus `stay` of the block before:
    detail that moves on does not stay.
    """

    down: Tensor  # (coarse channels, p q c): fine latents to coarse latents
    offset: Tensor  # (coarse channels,), added by `down`
    up: Tensor  # (p q c, coarse channels)
    stay: Tensor  # (p q c, p q c)

    @property
    def noise(self) -> Tensor:
        """The map with orthonormal rows next to `down`, (coarse channels, p q c): white noise stays
        white noise."""
        left, _, right = torch.linalg.svd(self.down, full_matrices=False)
        return left @ right

    def grow(self, tensors: dict[str, Tensor], area: int) -> None:
        """Replaces the patch embedding and the head of a generator of coarse latents, whose tokens
        are single latent pixels, by those of a generator whose tokens are blocks of `area` pixels.

        The embedding is of the coarse latents that `down` makes of the recycled block, of `noise`,
        and of the mean of the block's conditions. The head makes the changes that `up` makes of the
        coarse head's, and `residual_map` is `stay`.
        """
        weight, bias = tensors["transformer.video_in.weight"], "transformer.video_in.bias"
        coarse = len(self.down)
        noise, recycled, conditions = weight.tensor_split((coarse, 2 * coarse), dim=1)
        parts = [
            (noise @ self.noise).unflatten(1, (area, -1)),
            (recycled @ self.down).unflatten(1, (area, -1)),
            (conditions / area)[:, None].expand(-1, area, -1),
        ]
        tensors["transformer.video_in.weight"] = torch.cat(parts, dim=2).flatten(1)
        tensors[bias] = tensors[bias] + recycled @ self.offset
        for name in ("transformer.video_out.weight", "transformer.video_out.bias"):
            tensors[name] = self.up @ tensors[name]
        tensors["transformer.residual_map.weight"] = self.stay


def fit_relation(coarse: Tensor, fine: Tensor) -> LatentRelation:
    """Fits the relation of least squared error on clips that both autoencoders encoded.

    coarse: (clips, C, T, H, W). fine: (clips, c, T, p H, q W). ValueError unless the fine latents
    have multiples of H and W, and the same clips and frames.
    """
    (p, rows), (q, columns) = (divmod(fine.shape[a], coarse.shape[a]) for a in (3, 4))
    if rows or columns or (fine.shape[0], fine.shape[2]) != (coarse.shape[0], coarse.shape[2]):
        raise ValueError(
            f"fine: expected clips, frames and multiples of rows and columns of coarse latents "
            f"{tuple(coarse.shape)}, got {tuple(fine.shape)}"
        )
    blocks = rearrange(fine, "b c t (h p) (w q) -> b t h w (p q c)", p=p, q=q).double()
    pixels = rearrange(coarse, "b c t h w -> b t h w c").double()
    known = torch.cat([blocks, blocks.new_ones(*blocks.shape[:-1], 1)], dim=-1)
    down = _least_squares(known, pixels)
    before, wanted = blocks[:, :-1], blocks.diff(dim=1)
    known = torch.cat([pixels.diff(dim=1), before], dim=-1).flatten(0, -2)
    # As if the block had white noise. A map that trusts every detail amplifies a rollout's errors.
    noise = NOISE * len(known) ** 0.5 * torch.eye(before.shape[-1]).to(known)
    known = torch.cat([known, F.pad(noise, (pixels.shape[-1], 0))])
    wanted = torch.cat([wanted.flatten(0, -2), torch.zeros_like(noise)])
    up, stay = _least_squares(known, wanted).split([pixels.shape[-1], before.shape[-1]], dim=1)
    return LatentRelation(*(x.float() for x in (down[:, :-1], down[:, -1], up, stay)))


def _least_squares(known: Tensor, wanted: Tensor) -> Tensor:
    """Returns W of the least |W known - wanted| over all vectors of the last dimension."""
    return torch.linalg.lstsq(known.flatten(0, -2), wanted.flatten(0, -2)).solution.T
