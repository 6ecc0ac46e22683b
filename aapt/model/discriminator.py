"""The discriminator: the generator's backbone with one logit per frame (docs/method.md#8, #12)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .transformer import KeysValues, VideoTransformer
from .ulysses import Ulysses
from .world_model import WorldModel

TAP_FRACTIONS = (4 / 9, 13 / 18, 1.0)
Judgement = Literal["frame", "clip", "both"]
Pooling = Literal["query", "average"]


class LogitHead(nn.Module):
    """One learned query that cross-attends to sets of tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Parameter(torch.randn(config.width) * 0.02)
        self.keys_values = nn.Linear(config.width, 2 * config.width)
        self.context = Ulysses()

    def forward(self, tokens: Tensor, sets: int, size: int) -> Tensor:
        """Pools each set of tokens on its own: (B, sets x size, width), or this rank's shard, to
        (B, sets, width)."""
        keys_values = self.keys_values(self.norm(tokens)).unflatten(-1, (2, self.heads, -1))
        whole = self.context.to_heads(keys_values, sets * size).unflatten(1, (sets, size))
        k, v = whole.flatten(0, 1).permute(2, 0, 3, 1, 4)
        q = self.context.own_heads(self.query.unflatten(0, (self.heads, -1)))[:, None]
        pooled = F.scaled_dot_product_attention(q.expand(len(k), -1, -1, -1).to(k.dtype), k, v)
        return self.context.all_heads(pooled[:, :, 0].unflatten(0, (-1, sets))).flatten(2)


class Discriminator(nn.Module):
    """D(x, c): the noise channels hold the judged frames, the recycled channels the frame before
    each.

    Args:
        world: The backbone, with the weights of stage 1; it is taken over, not copied.
        judgement: "frame" is causal with one logit per frame (paper); with "clip" every frame sees
            all others and the clip has one logit; "both" is causal, and heads of its own give the
            clip's logit from the tokens of all frames (docs/method.md#12).
        pooling: A learned "query" (paper), or the "average" of all tokens.
    """

    def __init__(
        self, world: WorldModel, judgement: Judgement = "frame", pooling: Pooling = "query"
    ):
        super().__init__()
        if judgement not in ("frame", "clip", "both"):
            raise ValueError(f"judgement: expected 'frame', 'clip' or 'both', got {judgement!r}")
        if pooling not in ("query", "average"):
            raise ValueError(f"pooling: expected 'query' or 'average', got {pooling!r}")
        self.world = world
        self.judgement = judgement
        config = world.config
        self.taps = [round(fraction * config.depth) - 1 for fraction in TAP_FRACTIONS]
        if min(self.taps) < 0 or len(set(self.taps)) < len(self.taps):
            raise ValueError(f"depth: expected enough blocks for three heads, got {config.depth}")
        self.heads = nn.ModuleList(LogitHead(config) for _ in self.taps)
        joined = len(self.taps) * config.width
        self.norm = nn.LayerNorm(joined)
        self.logit = nn.Linear(joined, 1)
        if judgement == "both":
            self.clip_heads = nn.ModuleList(LogitHead(config) for _ in self.taps)
            self.clip_norm = nn.LayerNorm(joined)
            self.clip_logit = nn.Linear(joined, 1)
        if pooling == "average":
            for head in self.modules():
                if isinstance(head, LogitHead):  # a zero query weighs all keys the same
                    nn.init.zeros_(head.query).requires_grad_(False)
        # The velocity head is not used; frozen, it costs no optimizer state.
        for parameter in self.backbone.output_parameters():
            parameter.requires_grad_(False)

    @property
    def backbone(self) -> VideoTransformer:
        return self.world.transformer

    def freeze_trunk(self) -> None:
        """Freezes the backbone and its text encoder, so that the heads alone learn."""
        self.world.requires_grad_(False)

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
        """Returns logits (B, T), or (B, 1) of whole clips, or (B, T + 1) with the clip's last, for
        frames x (B, C, T, H, W), each after its frame of `previous` (B, C, T, H, W)."""
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
            causal=self.judgement != "clip",
        )
        rows, columns = self.backbone.config.token_grid(*x.shape[-2:])
        frame, frames = rows * columns, x.shape[2]
        sets = (1, frames * frame) if self.judgement == "clip" else (frames, frame)
        logits = _logits(self.heads, self.norm, self.logit, tapped, sets)
        if self.judgement == "both":
            layers = self.clip_heads, self.clip_norm, self.clip_logit
            logits = torch.cat([logits, _logits(*layers, tapped, (1, frames * frame))], dim=1)
        return logits


def _logits(
    heads: nn.ModuleList,
    norm: nn.LayerNorm,
    logit: nn.Linear,
    tapped: list[Tensor],
    sets: tuple[int, int],
) -> Tensor:
    """Returns logits (B, sets[0]), each from sets[1] consecutive tokens."""
    pooled = [head(tokens, *sets) for head, tokens in zip(heads, tapped, strict=True)]
    # The penalty multiplies differences of logits by lambda; half precision would round them away.
    with torch.autocast(tapped[0].device.type, enabled=False):
        joined = torch.cat(pooled, dim=-1).to(logit.weight.dtype)
        return logit(norm(joined)).squeeze(-1)
