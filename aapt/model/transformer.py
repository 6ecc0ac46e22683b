"""The causal video transformer: many frames in parallel, or one frame against the cache."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aapt_kernels import FrameLayout, KVCache

from .config import ModelConfig
from .flow import to_clean
from .layers import Block, Residual
from .rope import RotaryPositions, Rotation
from .ulysses import Ulysses

TIME_FREQUENCIES = 256
KeysValues = list[tuple[Tensor, Tensor]]  # per block, each (B, L, heads, head_dim)


class StepConstants(NamedTuple):
    """The inputs of a step that never change while a stream runs: time and size are fixed."""

    modulation: list[tuple[Tensor, ...]]  # per block, six (B, 1, width)
    out_modulation: tuple[Tensor, Tensor]  # shift and scale of the last norm, (B, 1, width)
    places: tuple[Tensor, Tensor]  # cosines and sines of rows and columns, of one frame's tokens

    def tensors(self) -> Iterator[Tensor]:
        for group in (*self.modulation, self.out_modulation, self.places):
            yield from group

    def copy_(self, other: "StepConstants") -> None:
        """Copies the values of `other` to the addresses that a captured step reads."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


class TimeEmbedding(nn.Module):
    """Sinusoids of t in [0, 1], then an MLP: (B,) -> (B, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(TIME_FREQUENCIES, width)
        self.down = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        angles = 1000 * t[:, None] * frequency
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(waves)))


class VideoTransformer(nn.Module):
    """MMDiT over [text | frames] with a block-causal mask (docs/method.md#3).

    Latents are (B, channels, T, height, width). Token-frame i carries the noise of latent frame
    i + 1, the recycled latent frame i and the conditions of frame i + 1 (docs/method.md#2).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        area = config.patch**2
        self.video_in = nn.Linear(config.input_channels * area, config.width)
        self.text_in = nn.Linear(config.text_width, config.width)
        self.time = TimeEmbedding(config.width)
        self.video_modulation = nn.Linear(config.width, 6 * config.width)
        self.text_modulation = nn.Linear(config.width, 6 * config.width)
        self.blocks = nn.ModuleList(
            Block(config, last=index == config.depth - 1) for index in range(config.depth)
        )
        self.out_modulation = nn.Linear(config.width, 2 * config.width)
        self.video_out = nn.Linear(config.width, config.latent_channels * area)
        self.positions = RotaryPositions(config)
        self.checkpoint_blocks = False
        self.context = Ulysses()
        for layer in (self.video_modulation, self.text_modulation, self.out_modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.video_out.weight, std=0.01)
        nn.init.zeros_(self.video_out.bias)

    def patchify(
        self, x: Tensor, recycled: Tensor, condition: Tensor | None, frames: Tensor
    ) -> Tensor:
        """Embeds latents as tokens (B, T rows columns, width), or this rank's shard of them;
        `frames`: the indices (T,) of the frames."""
        if not self.config.recycle:
            recycled = recycled * (frames == 0)[:, None, None]
        channels = [x, recycled] if condition is None else [x, recycled, condition]
        stacked = torch.cat(channels, dim=1)
        if stacked.shape[1] != self.config.input_channels:
            raise ValueError(
                f"x, recycled, condition: expected {self.config.input_channels} channels together, "
                f"got {stacked.shape[1]}"
            )
        patch = self.config.patch
        tokens = rearrange(stacked, "b c t (h p) (w q) -> b (t h w) (p q c)", p=patch, q=patch)
        return self.video_in(self.context.shard(tokens))

    def last_modulation(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Returns shift and scale (B, 1, width) of the last norm, from the time embedding."""
        shift, scale = self.out_modulation(time)[:, None].chunk(2, dim=-1)
        return shift, scale

    def unpatchify(
        self, tokens: Residual, modulation: tuple[Tensor, Tensor], shape: Sequence[int]
    ) -> Tensor:
        """Turns tokens into the output (B, latent_channels, T, H, W) of `shape` = (T, H, W);
        modulation: `last_modulation`."""
        patch, (frames, *size) = self.config.patch, shape
        rows, columns = self.config.token_grid(*size)
        patches = self.video_out(tokens.norm(*modulation)[1])
        return rearrange(
            self.context.gather(patches, frames * rows * columns),
            "b (t h w) (p q c) -> b c t (h p) (w q)",
            h=rows,
            w=columns,
            p=patch,
            q=patch,
        )

    def modulations(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the activated time embedding, and the shared modulation of video and of text."""
        time = F.silu(self.time(t))
        video = self.video_modulation(time).unflatten(-1, (6, -1))
        text = self.text_modulation(time).unflatten(-1, (6, -1))
        return time, video, text

    def features(
        self,
        x: Tensor,
        recycled: Tensor,
        condition: Tensor | None,
        text: Tensor,
        text_lens: Tensor,
        t: Tensor,
        *,
        prefix: KeysValues | None = None,
        start_frame: int = 0,
        taps: Sequence[int] = (),
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns tokens after the last block, the time embedding, and tokens after each block of
        `taps`. If ranks share a clip, tokens are this rank's shard.

        x, recycled: (B, C, T, H, W); condition: (B, condition_channels, T, H, W); text:
        (B, text_tokens, text_width); text_lens: (B,); t: (B,), one time per clip. If the frames
        continue a sequence at token-frame `start_frame` > 0, `prefix` holds each block's keys and
        values of [first frame | past]. Without `causal` every frame sees all others.
        """
        frames = x.shape[2]
        grid = self.config.token_grid(*x.shape[-2:])
        tokens_per_frame = grid[0] * grid[1]
        if prefix is not None and not causal:
            raise ValueError("prefix: expected None without `causal`, got keys and values")
        if (start_frame > 0) != (prefix is not None):
            raise ValueError(
                f"prefix: expected keys and values exactly when start_frame > 0, got "
                f"start_frame {start_frame} {'without' if prefix is None else 'with'} a prefix"
            )
        indices = torch.arange(start_frame, start_frame + frames, device=x.device)
        rotation = self.positions(indices, grid)
        if causal:
            layout = FrameLayout(
                text_tokens=text.shape[1],
                tokens_per_frame=tokens_per_frame,
                frames=frames,
                window_frames=self.config.window(grid),
                past_frames=prefix[0][0].shape[1] // tokens_per_frame - 1 if prefix else None,
            )
        else:  # one frame of all tokens, at distances that are never clamped
            layout = FrameLayout(
                text_tokens=text.shape[1],
                tokens_per_frame=tokens_per_frame * frames,
                frames=1,
                window_frames=None,
            )
            rotation = Rotation(rotation.cos, rotation.sin)
        time, *modulation = self.modulations(t)
        video, words = self.patchify(x, recycled, condition, indices), self.text_in(text)
        tapped = []
        for index, block in enumerate(self.blocks):
            block_prefix = prefix[index] if prefix else None
            inputs = (video, words, modulation, rotation, layout, text_lens, block_prefix)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                video, words = checkpoint(block, *inputs, use_reentrant=False)
            else:
                video, words = block(*inputs)
            if index in taps:
                tapped.append(video)
        return video, time, tapped

    def forward(self, x: Tensor, recycled: Tensor, condition: Tensor | None, *args, **kwargs):
        """Returns the raw output (B, latent_channels, T, H, W); arguments as in `features`."""
        # The plain function: in a sharded model `self.features` would release the parameters.
        video, time, _ = VideoTransformer.features(self, x, recycled, condition, *args, **kwargs)
        return self.unpatchify(Residual(video), self.last_modulation(time), x.shape[2:])

    def encode_text(self, text: Tensor, text_lens: Tensor, t: Tensor) -> KeysValues:
        """Returns every block's text keys and values at time t; a stream needs them once per
        prompt."""
        _, _, modulation = self.modulations(t)
        words, pairs = self.text_in(text), []
        for block in self.blocks:
            words, k, v = block.encode_text(words, modulation, text_lens)
            pairs.append((k, v))
        return pairs

    def step_constants(self, t: Tensor, size: Sequence[int]) -> StepConstants:
        """Computes what every step at time t (B,) needs, for latents of `size` = (height, width).

        Weights must not change between this call and a step that takes its result.
        """
        time, shared, _ = self.modulations(t)
        return StepConstants(
            [block.step_modulation(shared) for block in self.blocks],
            self.last_modulation(time),
            self.positions.places(self.config.token_grid(*size)),
        )

    def step(
        self,
        x: Tensor,
        recycled: Tensor,
        condition: Tensor | None,
        t: Tensor,
        cache: KVCache,
        constants: StepConstants | None = None,
    ) -> Tensor:
        """Runs one frame against the cache and appends it there (docs/method.md#5).

        x, recycled, condition: one frame each, (B, C, 1, H, W). constants: `step_constants` of t
        and this size, computed here unless given. Returns the raw output.
        """
        if constants is None:
            constants = self.step_constants(t, x.shape[-2:])
        index = cache.step[None]
        rotation = self.positions(index, self.config.token_grid(*x.shape[-2:]), constants.places)
        video = Residual(self.patchify(x, recycled, condition, index))
        for layer, block in enumerate(self.blocks):
            video = block.step(video, constants.modulation[layer], rotation, cache, layer)
        cache.advance()
        return self.unpatchify(video, constants.out_modulation, x.shape[2:])

    def new_cache(self, batch: int, size: Sequence[int], *, dtype: torch.dtype) -> KVCache:
        """Returns an empty cache for latents of `size` = (height, width)."""
        grid = self.config.token_grid(*size)
        return KVCache(
            batch,
            self.config.depth,
            self.config.heads // self.context.size,
            self.config.head_dim,
            text_tokens=self.config.text_tokens,
            tokens_per_frame=grid[0] * grid[1],
            window_frames=self.config.window(grid),
            dtype=dtype,
            device=self.video_in.weight.device,
        )


def velocity(config: ModelConfig, output: Tensor, x_t: Tensor, recycled: Tensor) -> Tensor:
    """Returns v = e - x_0 from the network's output (docs/method.md#2, `residual_head`: #12)."""
    return x_t - recycled - output if config.residual_head else output


def clean(config: ModelConfig, output: Tensor, x_t: Tensor, recycled: Tensor, t: Tensor) -> Tensor:
    """Returns f(x, t) = x - t v, softly clamped if the config says so (docs/method.md#7, #12)."""
    x_0 = to_clean(x_t, velocity(config, output, x_t, recycled), t)
    limit = config.output_clamp
    return x_0 if limit is None else limit * torch.tanh(x_0 / limit)
