"""The transformer block: two streams, joint attention, adaLN-single modulation
(docs/method.md#2)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aapt_kernels import (
    FrameLayout,
    KVCache,
    bias_gelu,
    bias_gelu_e4m3,
    block_causal_attention,
    cached_attention,
    kv_append,
    modulated_norm,
    modulated_norm_e4m3,
    qk_norm_rope,
)

from .config import ModelConfig
from .float8 import Float8Linear, Rounded
from .linear import product
from .rope import Rotation
from .ulysses import Ulysses

NORM_EPS = 1e-6


class Residual(NamedTuple):
    """The residual stream x (B, L, width) and an update that is not added yet.

    The next norm adds gate * update in its own launch. gate: (B, 1, width), or (B, frames, width)
    where each frame has a time of its own.
    """

    x: Tensor
    update: Tensor | None = None
    gate: Tensor | None = None

    def norm(
        self, shift: Tensor, scale: Tensor, reader: nn.Module
    ) -> tuple[Tensor, Tensor | Rounded]:
        """Returns the sum, and the sum normed and modulated, rounded if the layer that reads it is
        in 8 bits."""
        added = {} if self.update is None else {"update": self.update, "gate": self.gate}
        if isinstance(reader, Float8Linear):
            *x, values, scales = modulated_norm_e4m3(self.x, shift, scale, **added, eps=NORM_EPS)
            return x[0] if x else self.x, Rounded(values, scales, self.x.dtype)
        normed = modulated_norm(self.x, shift, scale, **added, eps=NORM_EPS)
        return normed if added else (self.x, normed)

    def sum(self) -> Tensor:
        """Returns x + gate * update."""
        if self.update is None:
            return self.x
        count = self.gate.shape[1]
        groups = (count, self.x.shape[1] // count)
        x, update = self.x.unflatten(1, groups), self.update.unflatten(1, groups)
        return torch.addcmul(x, self.gate[:, :, None], update).flatten(1, 2)


class CacheStep(NamedTuple):
    """A cache, and the rotation of the frames that a step appends to it."""

    cache: KVCache
    rotation: Rotation

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
    ) -> Tensor:
        """Norms and rotates q and k, appends k and v to a layer, and returns the attended values;
        all tensors are (B, L, heads, head_dim)."""
        cache, rotation = self
        appended = kv_append(
            q,
            k,
            v,
            cache,
            layer,
            q_norm,
            k_norm,
            rotation.cos,
            rotation.sin,
            eps=NORM_EPS,
            cos_sink=rotation.cos_sink,
            sin_sink=rotation.sin_sink,
        )
        q, q_sink = appended if isinstance(appended, tuple) else (appended, None)
        return cached_attention(q, cache, layer, q_sink=q_sink)


def attend_to_caches(
    qkv: Sequence[Tensor],
    caches: Sequence[CacheStep],
    layer: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> Tensor:
    """Runs `CacheStep.attend` on the q, k and v of B clips, against one cache of B clips or
    B caches of one clip each."""
    if len(caches) == 1:
        return caches[0].attend(*qkv, layer, q_norm, k_norm)
    clips = zip(caches, *(x.split(1) for x in qkv), strict=True)
    return torch.cat([cache.attend(*clip, layer, q_norm, k_norm) for cache, *clip in clips])


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
        """Splits the shared (B, 6, width) into six (B, 1, width): shift, scale, gate, twice. One
        for each frame, (B, frames, 6, width), into six (B, frames, width)."""
        per_frame = shared if shared.dim() == 4 else shared[:, None]
        return (per_frame + self.modulation_bias).unbind(2)

    def project(self, normed: Tensor | Rounded) -> Tensor:
        """Projects normed tokens to q, k and v: (B, L, 3, heads, head_dim)."""
        return self.qkv(normed).unflatten(-1, (3, self.heads, -1))

    def mix(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Residual:
        """Adds the attended values (B, L, heads, head_dim) to the residual x, and returns it with
        the MLP's update."""
        _, _, gate_attention, shift, scale, gate_mlp = modulation
        residual = Residual(x, self.out(attended.flatten(2)), gate_attention)
        x, normed = residual.norm(shift, scale, self.mlp_up)
        return Residual(x, self.mlp(normed), gate_mlp)

    def mlp(self, normed: Tensor | Rounded) -> Tensor:
        """Returns the MLP's update (B, L, width) of normed tokens."""
        raw = product(self.mlp_up, normed)
        if isinstance(self.mlp_down, Float8Linear):
            hidden = Rounded(*bias_gelu_e4m3(raw, self.mlp_up.bias), raw.dtype)
        else:
            hidden = bias_gelu(raw, self.mlp_up.bias)
        return self.mlp_down(hidden)


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
        _, normed = Residual(video).norm(*video_modulation[:2], self.video.qkv)
        _, text_normed = Residual(text).norm(*text_modulation[:2], self.text.qkv)
        qkv = context.to_heads(self.video.project(normed), tokens)
        text_qkv = context.own_heads(self.text.project(text_normed))
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
        video = self.video.mix(video, context.to_tokens(video_attended), video_modulation).sum()
        if self.last:
            return video, None
        text = self.text.mix(text, context.all_heads(text_attended), text_modulation).sum()
        return video, text

    def encode_text(
        self, text: Tensor, modulation: Tensor, text_lens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the text stream alone: returns the next text, and the keys and values that video
        attends to."""
        text_modulation = self.text.modulation(modulation)
        _, normed = Residual(text).norm(*text_modulation[:2], self.text.qkv)
        q, k, v = self.context.own_heads(self.text.project(normed)).unbind(2)
        q, k = qk_norm_rope(q, k, self.text.q_norm, self.text.k_norm, None, None, eps=NORM_EPS)
        if not self.last:
            layout = FrameLayout(
                text_tokens=text.shape[1], tokens_per_frame=1, frames=0, window_frames=None
            )
            attended = block_causal_attention(q, k, v, layout, text_lens=text_lens)
            text = self.text.mix(text, self.context.all_heads(attended), text_modulation).sum()
        return text, k, v

    def step_modulation(self, shared: Tensor) -> tuple[Tensor, ...]:
        """Returns the modulation that `step` takes, from the shared one (B, 6, width) of video."""
        return self.video.modulation(shared)

    def step(
        self,
        video: Residual,
        modulation: tuple[Tensor, ...],
        caches: Sequence[CacheStep],
        layer: int,
    ) -> Residual:
        """Runs the frames of one step (B, tokens, width) against the caches and appends them there,
        see `attend_to_caches`.

        The MLP's update is left to the first norm of the next block, so that a block takes nine
        launches, and ten with linear layers in 8 bits.
        """
        x, normed = video.norm(*modulation[:2], self.video.qkv)
        qkv = self.context.to_heads(self.video.project(normed), len(caches[0].rotation.cos))
        norms = self.video.q_norm, self.video.k_norm
        attended = attend_to_caches(qkv.unbind(2), caches, layer, *norms)
        return self.video.mix(x, self.context.to_tokens(attended), modulation)
