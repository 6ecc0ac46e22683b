"""Wan's transformer: self-attention over frames, cross-attention to text (docs/method.md#15).

Weights of Wan 2.1, Wan 2.2-5B and of the causal models made from them fit it once their layout is
changed: queries and keys rotate in halves here, in neighbours there.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_kernels import (
    FrameLayout,
    KVCache,
    block_causal_attention,
    qk_norm_rope,
)

from .caches import fit_scales
from .config import ModelConfig
from .layers import NORM_EPS, CacheStep, Residual, StreamWeights, attend_to_caches
from .rope import Rotation
from .transformer import KeysValues, TimeEmbedding, VideoTransformer
from .ulysses import Ulysses


class TextBesideCache(KVCache):
    """A `KVCache` without a text slot, and beside it the text of a cross-attention.

    words: keys and values of the text, (2, layers, batch, tokens, heads, head_dim), all of which
    every frame sees. Arguments besides `words` are those of `KVCache`.
    """

    def __init__(self, *sizes: int, words: Sequence[int], **options):
        super().__init__(*sizes, text_tokens=0, **options)
        layers, batch = self.k.shape[:2]
        like = {"dtype": self.compute_dtype, "device": self.k.device}
        with torch.inference_mode(False), torch.no_grad():
            self.words = torch.zeros((2, layers, batch, *words), **like)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state by name, not copied: those of `KVCache`, and words."""
        return super().tensors() | {"words": self.words}

    def check_twin(self, other: KVCache) -> None:
        """Raise ValueError unless the other cache has the sizes, dtypes and device of this one."""
        if not isinstance(other, TextBesideCache):
            raise ValueError(
                f"cache: expected a cache with text beside it, got a {type(other).__name__}"
            )
        super().check_twin(other)
        shapes = [tuple(cache.words.shape) for cache in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"cache: expected one with words {shapes[0]}, got {shapes[1]}")

    def write_text(self, layer: int, k: Tensor, v: Tensor, text_lens: Tensor | None = None) -> None:
        """Replace one layer's text by k and v (batch, tokens, heads, head_dim).

        text_lens: ignored, because every frame sees padding too (`WanTransformer.embed_text`).
        IndexError or ValueError if an argument does not fit the cache.
        """
        self.check_layer(layer)
        expected = tuple(self.words.shape[2:])
        for name, words in (("k", k), ("v", v)):
            if words.shape != expected:
                raise ValueError(f"{name}: expected {expected}, got {tuple(words.shape)}")
        with torch.no_grad():
            self.words[0, layer].copy_(k)
            self.words[1, layer].copy_(v)


class CrossAttention(nn.Module):
    """Attention of the frames to the text, with norms of its own.

    Ranks that share a clip hold the whole text, so each attends for its own tokens.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.q = nn.Linear(width, width)
        self.text_kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.Parameter(torch.ones(width))
        self.k_norm = nn.Parameter(torch.ones(width))

    def keys_values(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values (B, L, heads, head_dim) of text tokens (B, L, width)."""
        k, v = self.text_kv(words).chunk(2, dim=-1)
        k = F.rms_norm(k, k.shape[-1:], self.k_norm.to(k.dtype), NORM_EPS)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Adds what x (B, L, width) attends to in k and v."""
        q = self.q(self.norm(x))
        q = F.rms_norm(q, q.shape[-1:], self.q_norm.to(q.dtype), NORM_EPS)
        q, k, v = (part.transpose(1, 2) for part in (q.unflatten(-1, (self.heads, -1)), k, v))
        attended = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))
        return x + self.out(attended.transpose(1, 2).flatten(2))


class WanBlock(nn.Module):
    """Self-attention over frames, cross-attention to text, MLP; in parallel or step by step.

    In a `context` of several ranks, video tokens are this rank's shard, and cached keys and values
    are its heads; the text is whole on every rank.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.video = StreamWeights(config)
        self.cross = CrossAttention(config)
        self.context = Ulysses()

    def forward(
        self,
        video: Tensor,
        words: Tensor,
        modulation: tuple[Tensor, None],
        rotation: Rotation,
        layout: FrameLayout,
        text_lens: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Runs all frames in parallel and returns the next (video, words); arguments as in `Block`,
        with the prefix of [sink | past]."""
        own = self.video.modulation(modulation[0])
        _, normed = Residual(video).norm(*own[:2], self.video.qkv)
        q, k, v, *norms = self._project(normed, layout.frames * layout.tokens_per_frame)
        q, k, *q_sink = qk_norm_rope(
            q,
            k,
            *norms,
            rotation.cos,
            rotation.sin,
            eps=NORM_EPS,
            cos_sink=rotation.cos_sink,
            sin_sink=rotation.sin_sink,
        )
        if prefix is not None:
            k, v = (torch.cat([p.to(x.dtype), x], 1) for p, x in zip(prefix, (k, v), strict=True))
        attended = block_causal_attention(
            q,
            k,
            v,
            layout,
            q_sink=q_sink[0] if q_sink else None,
            prefix_grad=prefix is None,
        )
        return self._mix(video, attended, own, *self.cross.keys_values(words)).sum(), words

    def encode_text(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of text tokens that frames attend to."""
        return self.cross.keys_values(words)

    def step_modulation(self, shared: Tensor) -> tuple[Tensor, ...]:
        """Returns the modulation that `step` takes, from the shared one (B, 6, width)."""
        return self.video.modulation(shared)

    def step(
        self,
        video: Residual,
        modulation: tuple[Tensor, ...],
        caches: Sequence[CacheStep],
        layer: int,
    ) -> Residual:
        """Runs the frames of one step (B, tokens, width) against the caches, of type
        `TextBesideCache`, and appends them there, see `attend_to_caches`.

        The MLP's update is left to the first norm of the next block.
        """
        x, normed = video.norm(*modulation[:2], self.video.qkv)
        *qkv, q_norm, k_norm = self._project(normed, len(caches[0].rotation.cos))
        attended = attend_to_caches(qkv, caches, layer, q_norm, k_norm)
        words = [cache.words[:, layer] for cache, _ in caches]
        text = words[0] if len(words) == 1 else torch.cat(words, dim=1)
        return self._mix(x, attended, modulation, *text)

    def _project(self, normed: Tensor, tokens: int) -> tuple[Tensor | None, ...]:
        """Projects normed tokens to q, k and v (B, tokens, heads of this rank, head_dim); also
        returns the weights with which q and k are still to be normed.

        The norm is over all heads. Ranks that share a clip hold a token's heads together before the
        exchange alone, so they norm there.
        """
        stream = self.video
        qkv, norms = stream.project(normed), (stream.q_norm, stream.k_norm)
        if self.context.size > 1:
            q, k, v = qkv.unbind(2)
            q, k = qk_norm_rope(q, k, *norms, None, None, eps=NORM_EPS)
            qkv, norms = torch.stack([q, k, v], dim=2), (None, None)
        return *self.context.to_heads(qkv, tokens).unbind(2), *norms

    def _mix(
        self,
        video: Tensor,
        attended: Tensor,
        modulation: tuple[Tensor, ...],
        text_k: Tensor,
        text_v: Tensor,
    ) -> Residual:
        """Adds the attended values and the cross-attention to the residual, and returns it with the
        MLP's update."""
        _, _, gate_attention, shift, scale, gate_mlp = modulation
        update = self.video.out(self.context.to_tokens(attended).flatten(2))
        x = Residual(video, update, gate_attention).sum()
        residual = Residual(self.cross(x, text_k, text_v))
        x, normed = residual.norm(shift, scale, self.video.mlp_up)
        return Residual(x, self.video.mlp(normed), gate_mlp)


class WanTransformer(VideoTransformer):
    """Video transformer whose frames see the text through cross-attention."""

    JOINT_TEXT = False

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        width, area = config.width, config.patch_area
        self.video_in = nn.Linear(config.input_channels * area, width)
        self.text_in = nn.Sequential(
            nn.Linear(config.text_width, width),
            nn.GELU(approximate="tanh"),
            nn.Linear(width, width),
        )
        self.time = TimeEmbedding(width)
        self.video_modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.depth))
        self.out_table = nn.Parameter(torch.zeros(2, width))  # shift and scale
        self.video_out = nn.Linear(width, config.latent_channels * area)
        nn.init.zeros_(self.video_modulation.weight)
        nn.init.zeros_(self.video_modulation.bias)
        nn.init.normal_(self.video_out.weight, std=0.01)
        nn.init.zeros_(self.video_out.bias)

    def embed_text(self, text: Tensor, text_lens: Tensor) -> Tensor:
        """Turns text embeddings (B, L, text_width) into text tokens (B, text_tokens, width).

        Rows from text_lens on, and those that are missing, are zero, and all are attended to: Wan
        has learnt so. ValueError for more rows than `text_tokens`.
        """
        tokens, rows = self.config.text_tokens, text.shape[1]
        if rows > tokens:
            raise ValueError(f"text: expected at most {tokens} tokens, got {rows}")
        padding = torch.arange(rows, device=text.device) >= text_lens[:, None]
        text = text.masked_fill(padding[..., None], 0)
        return self.text_in(F.pad(text, (0, 0, 0, tokens - rows)))

    def modulations(self, t: Tensor) -> tuple[Tensor, Tensor, None]:
        """Returns the time embedding, and the shared modulation of video; text has none."""
        time = self.time(t)
        return time, self.video_modulation(F.silu(time)).unflatten(-1, (6, -1)), None

    def output_modulation(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Returns shift and scale, (B, 1 or frames, width), of the last norm."""
        per_frame = time if time.dim() == 3 else time[:, None]
        shift, scale = (self.out_table + per_frame[:, :, None]).unbind(2)
        return shift, scale

    def output_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the last norm's table and the parameters of the last layers."""
        yield self.out_table
        yield from self.video_out.parameters()
        yield from self.residual_map.parameters()

    def encode_text(self, text: Tensor, text_lens: Tensor, t: Tensor) -> KeysValues:
        """Returns every block's text keys and values, which are those of any time t."""
        words = self.embed_text(text, text_lens)
        return [block.encode_text(words) for block in self.blocks]

    def new_cache(
        self,
        batch: int,
        size: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        pinned: bool = True,
    ) -> TextBesideCache:
        """Returns an empty cache for latents of `size` = (height, width), see `VideoTransformer`.

        Without `pinned` its window has the frames of the sink as well, and nothing stays visible
        for good.
        """
        config, grid = self.config, self.config.token_grid(*size)
        sink, window = config.sink_frames, config.window(grid)
        cache = TextBesideCache(
            batch,
            config.depth,
            config.heads // self.context.size,
            config.head_dim,
            words=(config.text_tokens, config.heads, config.head_dim),
            tokens_per_frame=grid[0] * grid[1],
            window_frames=window if pinned else sink + window,
            sink_frames=sink if pinned else 0,
            device=device or self.video_in.weight.device,
            **self.cache_choice.options(dtype, config.head_dim),
        )
        fit_scales(cache, self.blocks, self.context)
        return cache
