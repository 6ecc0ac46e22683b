"""The discriminator: the generator's backbone with one logit per frame (SPEC 8, 12)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .model import KeysValues, VideoTransformer

TAP_FRACTIONS = (4 / 9, 13 / 18, 1.0)


class LogitHead(nn.Module):
    """One learned query that cross-attends the tokens of each frame on its own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Parameter(torch.randn(config.width) * 0.02)
        self.keys_values = nn.Linear(config.width, 2 * config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T, tokens_per_frame, width) -> (B, T, width)."""
        batch, frames = tokens.shape[:2]
        keys_values = self.keys_values(self.norm(tokens)).flatten(0, 1)
        k, v = keys_values.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.query.unflatten(0, (self.heads, 1, -1)).expand(len(k), -1, -1, -1).to(k.dtype)
        return F.scaled_dot_product_attention(q, k, v).reshape(batch, frames, -1)


class Discriminator(nn.Module):
    """D(x, c): its noise channels hold the frames to judge, its recycled channels the frame
    before each. Starts from the stage-1 weights (`backbone`)."""

    def __init__(self, backbone: VideoTransformer):
        super().__init__()
        self.backbone = backbone
        depth = backbone.config.depth
        self.taps = [round(fraction * depth) - 1 for fraction in TAP_FRACTIONS]
        self.heads = nn.ModuleList(LogitHead(backbone.config) for _ in self.taps)
        joined = len(self.taps) * backbone.config.width
        self.norm = nn.LayerNorm(joined)
        self.logit = nn.Linear(joined, 1)
        # The velocity head is not used here; frozen, it costs no optimizer state.
        for layer in (backbone.out_modulation, backbone.video_out):
            layer.requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        previous: Tensor,
        condition: Tensor | None,
        text: Tensor,
        text_lens: Tensor,
        t: Tensor,
        *,
        prefix: KeysValues | None = None,
        start_frame: int = 0,
    ) -> Tensor:
        """Logits (B, T) of frames x (B, C, T, H, W), each after `previous` alike."""
        _, _, tapped = self.backbone.features(
            x,
            previous,
            condition,
            text,
            text_lens,
            t,
            prefix=prefix,
            start_frame=start_frame,
            taps=self.taps,
        )
        frames = x.shape[2]
        pooled = [
            head(tokens.unflatten(1, (frames, -1)))
            for head, tokens in zip(self.heads, tapped, strict=True)
        ]
        # The penalty multiplies differences of logits by lambda: half precision would drown them.
        with torch.autocast(x.device.type, enabled=False):
            joined = torch.cat(pooled, dim=-1).to(self.logit.weight.dtype)
            return self.logit(self.norm(joined)).squeeze(-1)
