"""The causal video transformer: many frames in parallel, or one step against the cache.

`VideoTransformer` is the part that the families share: `MMDiT` (mmdit.py) and `WanTransformer`
(wan.py).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aapt_kernels import FrameLayout, KVCache

from .caches import CacheChoice
from .config import ModelConfig
from .flow import to_clean
from .layers import CacheStep, Residual
from .rope import RotaryPositions, Rotation
from .ulysses import Ulysses

TIME_FREQUENCIES = 256
KeysValues = list[tuple[Tensor, Tensor]]  # per block, each (B, L, heads, head_dim)


class StepConstants(NamedTuple):
    """The inputs of a step that never change while a stream runs: time and size are fixed."""

    modulation: list[tuple[Tensor, ...]]  # per block, six (B, 1 or n, width)
    out_modulation: tuple[Tensor, Tensor]  # shift and scale of the last norm, (B, 1 or n, width)
    places: tuple[Tensor, Tensor]  # cosines and sines of rows and columns, of one frame's tokens

    def tensors(self) -> Iterator[Tensor]:
        for group in (*self.modulation, self.out_modulation, self.places):
            yield from group

    def copy_(self, other: "StepConstants") -> None:
        """Copies the values of `other` to the addresses that a captured step reads."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)

    def expand(self, clips: int) -> "StepConstants":
        """Returns the constants of one clip as those of several at its time, in its memory."""

        def each(modulation: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(x.expand(clips, -1, -1) for x in modulation)

        blocks = [each(modulation) for modulation in self.modulation]
        return StepConstants(blocks, each(self.out_modulation), self.places)


class TimeEmbedding(nn.Module):
    """Sinusoids of t in [0, 1], then an MLP: (B,) -> (B, width), (B, T) -> (B, T, width).

    The sinusoids are computed in float64, because 1000 t in half precision is wrong by whole units.
    """

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(TIME_FREQUENCIES, width)
        self.down = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float64, device=t.device) / half
        angles = 1000 * t.double()[..., None] * 10_000**-exponent
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(waves)))


class VideoTransformer(nn.Module):
    """Transformer over frames with a block-causal mask (docs/method.md#3).

    Latents are (B, channels, T, height, width). Where frames are recycled, token-frame i carries
    the noise of latent frame i + 1, the recycled latent frame i and the conditions of frame i + 1
    (docs/method.md#2); elsewhere it carries latent frame i.

    A family has the layers below, the abstract methods, and blocks with `forward` and `step`.

    Attributes:
        cache_choice: The cache of streams that begin from now on; the model's precision unless set.
    """

    JOINT_TEXT: bool  # True if text tokens stand before the frames in one attention
    video_in: nn.Linear
    blocks: nn.ModuleList
    video_out: nn.Linear

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.positions = RotaryPositions(config)
        self.residual_map = nn.Identity()
        if config.residual_map:
            numbers = config.latent_channels * config.patch_area
            self.residual_map = nn.Linear(numbers, numbers, bias=False)
            nn.init.zeros_(self.residual_map.weight)
        self.checkpoint_blocks = False
        self.context = Ulysses()
        self.cache_choice = CacheChoice()

    def embed_text(self, text: Tensor, text_lens: Tensor) -> Tensor:
        """Turns text embeddings (B, text_tokens, text_width) into text tokens (B, L, width)."""
        raise NotImplementedError

    def modulations(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the time embedding (B, width), and the shared modulation (B, 6, width) of video
        and of text, None for text without any. With t (B, T), those of video are (B, T, ...)."""
        raise NotImplementedError

    def output_modulation(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Returns shift and scale, (B, 1, width), of the last norm at a time embedding."""
        raise NotImplementedError

    def output_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that turn the last tokens into the output, and do nothing else."""
        raise NotImplementedError

    def encode_text(self, text: Tensor, text_lens: Tensor, t: Tensor) -> KeysValues:
        """Returns every block's text keys and values at time t; a stream needs them once per
        prompt."""
        raise NotImplementedError

    def new_cache(
        self,
        batch: int,
        size: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> KVCache:
        """Returns an empty cache for latents of `size` = (height, width), as `cache_choice` says.

        dtype: of keys and values outside of the cache. device: the model's unless given.
        """
        raise NotImplementedError

    def patchify(
        self, x: Tensor, recycled: Tensor | None, condition: Tensor | None, frames: Tensor
    ) -> Tensor:
        """Embeds latents as tokens (B, T rows columns, width), or this rank's shard of them.

        frames: the indices (T,) of the frames, or (B, T). recycled: ignored by a model without
        channels for it.
        """
        if not self.config.recycled_channels:
            recycled = None
        elif not self.config.recycle:
            recycled = recycled * (frames == 0)[..., None, :, None, None]
        stacked = torch.cat([part for part in (x, recycled, condition) if part is not None], dim=1)
        if stacked.shape[1] != self.config.input_channels:
            raise ValueError(
                f"x, recycled, condition: expected {self.config.input_channels} channels together, "
                f"got {stacked.shape[1]}"
            )
        p, q = self.config.patch_shape
        tokens = rearrange(stacked, "b c t (h p) (w q) -> b (t h w) (p q c)", p=p, q=q)
        return self.video_in(self.context.shard(tokens))

    def unpatchify(
        self, tokens: Residual, modulation: tuple[Tensor, Tensor], shape: Sequence[int]
    ) -> Tensor:
        """Turns tokens into the output (B, latent_channels, T, H, W) of `shape` = (T, H, W);
        modulation: `output_modulation`."""
        (p, q), (frames, *size) = self.config.patch_shape, shape
        rows, columns = self.config.token_grid(*size)
        patches = self.video_out(tokens.norm(*modulation, self.video_out)[1])
        return rearrange(
            self.context.gather(patches, frames * rows * columns),
            "b (t h w) (p q c) -> b c t (h p) (w q)",
            h=rows,
            w=columns,
            p=p,
            q=q,
        )

    def mapped(self, output: Tensor, recycled: Tensor | None) -> Tensor:
        """Adds to the output what `residual_map` makes of the recycled frames, both
        (B, latent_channels, T, H, W): with a residual head, how much of a frame stays."""
        if not self.config.residual_map:
            return output
        (p, q), order = self.config.patch_shape, "b t h w (p q c)"
        tokens = rearrange(recycled, f"b c t (h p) (w q) -> {order}", p=p, q=q)
        kept = self.residual_map(tokens)
        return output + rearrange(kept, f"{order} -> b c t (h p) (w q)", p=p, q=q)

    def features(
        self,
        x: Tensor,
        recycled: Tensor | None,
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
        (B, text_tokens, text_width); text_lens: (B,); t: one time per clip (B,), or per frame
        (B, T). If the frames continue a sequence at token-frame `start_frame` > 0, `prefix` holds
        each block's keys and values of [sink | past]. Without `causal` every frame sees all others.

        ValueError where chunks do not divide the frames, the sink or the window and its own chunk:
        such a model runs in steps alone. Also for times per frame that this model cannot take.
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
        chunk = self.config.chunk
        rotation = self.positions(indices, grid, indices - indices % chunk + chunk - 1)
        words = self.embed_text(text, text_lens)
        joint = words.shape[1] if self.JOINT_TEXT else 0
        if causal:
            before = prefix[0][0].shape[1] // tokens_per_frame if prefix else None
            layout = self._layout(joint, grid, start_frame, frames, before)
        else:  # one frame of all tokens, at distances that are never clamped
            layout = FrameLayout(
                text_tokens=joint,
                tokens_per_frame=tokens_per_frame * frames,
                frames=1,
                window_frames=None,
            )
            rotation = Rotation(rotation.cos, rotation.sin)
        self._check_times(t, frames)
        time, *modulation = self.modulations(t)
        video = self.patchify(x, recycled, condition, indices)
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

    def _check_times(self, t: Tensor, frames: int) -> None:
        """ValueError for times of single frames, unless there is one for each frame, text has no
        time, and every rank has whole frames."""
        if t.dim() == 1:
            return
        if self.JOINT_TEXT or self.context.size > 1 or t.shape[1] != frames:
            raise ValueError(
                "t: expected one time per clip (B,), or with block 'wan' on one rank one per frame "
                f"(B, {frames}), got {tuple(t.shape)}"
            )

    def _layout(
        self, text: int, grid: tuple[int, int], start: int, frames: int, before: int | None
    ) -> FrameLayout:
        """Returns the layout of chunks, each of which is one frame to the attention, for frames
        from `start` after `before` frames of [sink | past]."""
        config, chunk = self.config, self.config.chunk
        if config.opening_frames != chunk:
            raise ValueError(
                f"first_chunk: expected {chunk} like chunk in a pass over all frames, "
                f"got {config.opening_frames}"
            )
        window, sink = config.window(grid), config.sink_frames
        for name, count in (
            ("frames", frames),
            ("start_frame", start),
            ("window_frames + 1", window + 1),
            ("sink_frames", sink),
            ("past frames of the prefix", 0 if before is None else before - sink),
        ):
            if count % chunk:
                raise ValueError(
                    f"{name}: expected a multiple of the chunk, {chunk}, in a pass over all "
                    f"frames, got {count}"
                )
        return FrameLayout(
            text_tokens=text,
            tokens_per_frame=chunk * grid[0] * grid[1],
            frames=frames // chunk,
            window_frames=(window + 1) // chunk - 1,
            sink_frames=sink // chunk,
            past_frames=None if before is None else (before - sink) // chunk,
        )

    def forward(
        self, x: Tensor, recycled: Tensor | None, condition: Tensor | None, *args, **kwargs
    ):
        """Returns the raw output (B, latent_channels, T, H, W); arguments as in `features`."""
        # The plain function: in a sharded model `self.features` would release the parameters.
        video, time, _ = VideoTransformer.features(self, x, recycled, condition, *args, **kwargs)
        output = self.unpatchify(Residual(video), self.output_modulation(time), x.shape[2:])
        return self.mapped(output, recycled)

    def step_constants(self, t: Tensor, size: Sequence[int]) -> StepConstants:
        """Computes what every step at time t, (B,) or (B, n), needs, for latents of `size` =
        (height, width).

        Weights must not change between this call and a step that takes its result.
        """
        time, shared, _ = self.modulations(t)
        return StepConstants(
            [block.step_modulation(shared) for block in self.blocks],
            self.output_modulation(time),
            self.positions.places(self.config.token_grid(*size)),
        )

    def step(
        self,
        x: Tensor,
        recycled: Tensor | None,
        condition: Tensor | None,
        t: Tensor,
        cache: KVCache | Sequence[KVCache],
        constants: StepConstants | None = None,
        advance: bool = True,
    ) -> Tensor:
        """Runs the frames of one step against the cache and appends them there
        (docs/method.md#5, #15).

        x, recycled, condition: n frames each, (B, C, n, H, W), which see each other; n is at most
        `window_frames` + 1. cache: of all B clips, or B caches of one clip each, whose streams may
        be at different steps and have different prompts. t: one time per clip (B,), or per frame
        (B, n). constants: `step_constants` of t and this size, computed here unless given. Without
        `advance` the next call makes the frames of this step again. Returns the raw output.
        """
        self._check_times(t, x.shape[2])
        if constants is None:
            constants = self.step_constants(t, x.shape[-2:])
        grid, frames = self.config.token_grid(*x.shape[-2:]), x.shape[2]
        caches = [cache] if isinstance(cache, KVCache) else cache
        indices = [each.step[None] for each in caches]
        if frames > 1:
            offsets = torch.arange(frames, device=caches[0].step.device)
            indices = [index + offsets for index in indices]
        rotations = (self.positions(index, grid, index[-1:], constants.places) for index in indices)
        steps = list(map(CacheStep, caches, rotations))
        numbers = indices[0] if len(indices) == 1 else torch.stack(indices)
        video = Residual(self.patchify(x, recycled, condition, numbers))
        for layer, block in enumerate(self.blocks):
            video = block.step(video, constants.modulation[layer], steps, layer)
        if advance:
            for each in caches:
                each.advance(frames)
        output = self.unpatchify(video, constants.out_modulation, x.shape[2:])
        return self.mapped(output, recycled)


def share_tokens(model: nn.Module, context: Ulysses) -> None:
    """Splits the tokens of every transformer in `model` over ranks, for training and streaming.

    Caches made before have other heads. ValueError unless the number of ranks divides the heads.
    """
    for module in model.modules():
        if isinstance(module, VideoTransformer) and module.config.heads % context.size:
            raise ValueError(
                f"context: expected a divisor of the model's {module.config.heads} heads, "
                f"got {context.size}"
            )
    for module in model.modules():
        if isinstance(getattr(module, "context", None), Ulysses):
            module.context = context


def velocity(config: ModelConfig, output: Tensor, x_t: Tensor, recycled: Tensor | None) -> Tensor:
    """Returns v = e - x_0 from the network's output (docs/method.md#2, `residual_head`: #12)."""
    return x_t - recycled - output if config.residual_head else output


def clean(
    config: ModelConfig, output: Tensor, x_t: Tensor, recycled: Tensor | None, t: Tensor
) -> Tensor:
    """Returns f(x, t) = x - t v, softly clamped if the config says so (docs/method.md#7, #12)."""
    x_0 = to_clean(x_t, velocity(config, output, x_t, recycled), t)
    limit = config.output_clamp
    return x_0 if limit is None else limit * torch.tanh(x_0 / limit)
