"""The transformer block: two streams, joint attention, adaLN-single modulation
(docs/method.md#2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_kernels import (
    FrameLayout,
    KVCache,
    block_causal_attention,
    cached_attention,
    kv_append,
    qk_norm_rope,
)

from .config import ModelConfig
from .rope import Rotation
from .ulysses import Ulysses

NORM_EPS = 1e-6


class StreamWeights(nn.Module):
    """The weights of one stream (video or text) in one block.

    A `keys_only` stream only supplies keys and values: the text stream of the last block. Queries
    and keys are normed per head, or in Wan's block over all heads.
    """

    def __init__(self, config: ModelConfig, keys_only: bool = False):
        super().__init__()
        width, hidden = config.width, config.mlp_hidden
        self.heads = config.heads
        self.qkv = nn.Linear(width, 3 * width)
        normed = (config.head_dim,) if config.block == "mmdit" else (self.heads, config.head_dim)
        self.q_norm = nn.Parameter(torch.ones(normed))
        self.k_norm = nn.Parameter(torch.ones(normed))
        # Added to the shared modulation; the gates start open.
        bias = torch.zeros(6, width)
        bias[2::3] = 1
        self.modulation_bias = nn.Parameter(bias)
        if not keys_only:
            self.out = nn.Linear(width, width)
            self.mlp_up = nn.Linear(width, hidden)
            self.mlp_down = nn.Linear(hidden, width)

    def modulation(self, shared: Tensor) -> tuple[Tensor, ...]:
        """Splits the shared (B, 6, width) into six (B, 1, width): shift, scale, gate, twice."""
        return (shared + self.modulation_bias).unsqueeze(2).unbind(1)

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Norms, modulates and projects to q, k and v: (B, L, 3, heads, head_dim)."""
        return self.qkv(modulated_norm(x, shift, scale)).unflatten(-1, (3, self.heads, -1))

    def mix(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Adds the attended values (B, L, heads, head_dim), then the MLP, to the residual x."""
        return self.add_mlp(self.add_attended(x, attended, modulation), modulation)

    def add_attended(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Adds the attended values (B, L, heads, head_dim) to the residual x."""
        return x + modulation[2] * self.out(attended.flatten(2))

    def add_mlp(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Adds the MLP to the residual x."""
        shift, scale, gate = modulation[3:]
        hidden = F.gelu(self.mlp_up(modulated_norm(x, shift, scale)), approximate="tanh")
        return x + gate * self.mlp_down(hidden)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class Block(nn.Module):
    """Joint attention of the text and video streams, in parallel or one frame at a time.

    In a `context` of several ranks, video tokens are this rank's shard, and cached keys and values
    are its heads; the text stream is whole on every rank.
    """

    def __init__(self, config: ModelConfig, last: bool):
        super().__init__()
        self.video = StreamWeights(config)
        self.text = StreamWeights(config, keys_only=last)
        self.last = last
        self.context = Ulysses()

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        modulation: tuple[Tensor, Tensor],
        rotation: Rotation,
        layout: FrameLayout,
        text_lens: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs all frames in parallel and returns the next (video, text); text is None after the
        last block.

        video (B, frames x tokens, width), text (B, text, width); modulation: the shared (B, 6,
        width) of video and of text; prefix: keys and values of [first frame | past] from an
        earlier segment, detached.
        """
        video_modulation = self.video.modulation(modulation[0])
        text_modulation = self.text.modulation(modulation[1])
        context, tokens = self.context, layout.frames * layout.tokens_per_frame
        qkv = context.to_heads(self.video.project(video, *video_modulation[:2]), tokens)
        text_qkv = context.own_heads(self.text.project(text, *text_modulation[:2]))
        (q, k, v), (text_q, text_k, text_v) = qkv.unbind(2), text_qkv.unbind(2)
        q, k, *q_sink = qk_norm_rope(
            q,
            k,
            self.video.q_norm,
            self.video.k_norm,
            rotation.cos,
            rotation.sin,
            eps=NORM_EPS,
            cos_sink=rotation.cos_sink,
            sin_sink=rotation.sin_sink,
        )
        text_q, text_k = qk_norm_rope(
            text_q, text_k, self.text.q_norm, self.text.k_norm, None, None, eps=NORM_EPS
        )
        past_k, past_v = ([past.to(k.dtype)] for past in prefix) if prefix else ([], [])
        attended = block_causal_attention(
            torch.cat([text_q, q], dim=1),
            torch.cat([text_k, *past_k, k], dim=1),
            torch.cat([text_v, *past_v, v], dim=1),
            layout,
            text_lens=text_lens,
            q_sink=q_sink[0] if q_sink else None,
            prefix_grad=prefix is None,
        )
        text_attended, video_attended = attended.split([text.shape[1], tokens], dim=1)
        video = self.video.mix(video, context.to_tokens(video_attended), video_modulation)
        if self.last:
            return video, None
        return video, self.text.mix(text, context.all_heads(text_attended), text_modulation)

    def encode_text(
        self, text: Tensor, modulation: Tensor, text_lens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the text stream alone: returns the next text, and the keys and values that video
        attends to."""
        text_modulation = self.text.modulation(modulation)
        qkv = self.context.own_heads(self.text.project(text, *text_modulation[:2]))
        q, k, v = qkv.unbind(2)
        q, k = qk_norm_rope(q, k, self.text.q_norm, self.text.k_norm, None, None, eps=NORM_EPS)
        if not self.last:
            layout = FrameLayout(
                text_tokens=text.shape[1], tokens_per_frame=1, frames=0, window_frames=None
            )
            attended = block_causal_attention(q, k, v, layout, text_lens=text_lens)
            text = self.text.mix(text, self.context.all_heads(attended), text_modulation)
        return text, k, v

    def step(
        self, video: Tensor, modulation: Tensor, rotation: Rotation, cache: KVCache, layer: int
    ) -> Tensor:
        """Runs one new frame (B, tokens, width) against the cache and appends it there."""
        video_modulation = self.video.modulation(modulation)
        qkv = self.video.project(video, *video_modulation[:2])
        q, k, v = self.context.to_heads(qkv, len(rotation.cos)).unbind(2)
        appended = kv_append(
            q,
            k,
            v,
            cache,
            layer,
            self.video.q_norm,
            self.video.k_norm,
            rotation.cos,
            rotation.sin,
            eps=NORM_EPS,
            cos_sink=rotation.cos_sink,
            sin_sink=rotation.sin_sink,
        )
        q, q_sink = appended if isinstance(appended, tuple) else (appended, None)
        attended = cached_attention(q, cache, layer, q_sink=q_sink)
        return self.video.mix(video, self.context.to_tokens(attended), video_modulation)
