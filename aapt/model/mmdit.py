"""MMDiT: text and video as two streams with joint attention (docs/method.md#2)."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aapt_kernels import KVCache

from .caches import fit_scales
from .config import ModelConfig
from .layers import Block
from .transformer import KeysValues, TimeEmbedding, VideoTransformer


class MMDiT(VideoTransformer):
    """Video transformer over [text | frames] in one attention."""

    JOINT_TEXT = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        area = config.patch_area
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
        for layer in (self.video_modulation, self.text_modulation, self.out_modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.video_out.weight, std=0.01)
        nn.init.zeros_(self.video_out.bias)

    def embed_text(self, text: Tensor, text_lens: Tensor) -> Tensor:
        """Turns text embeddings (B, L, text_width) into text tokens (B, L, width)."""
        return self.text_in(text)

    def modulations(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the activated time embedding, and the shared modulation of video and of text."""
        time = F.silu(self.time(t))
        video = self.video_modulation(time).unflatten(-1, (6, -1))
        text = self.text_modulation(time).unflatten(-1, (6, -1))
        return time, video, text

    def output_modulation(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Returns shift and scale, (B, 1, width), of the last norm."""
        shift, scale = self.out_modulation(time)[:, None].chunk(2, dim=-1)
        return shift, scale

    def output_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters of the last norm's modulation and of the last layers."""
        yield from self.out_modulation.parameters()
        yield from self.video_out.parameters()
        yield from self.residual_map.parameters()

    def encode_text(self, text: Tensor, text_lens: Tensor, t: Tensor) -> KeysValues:
        """Returns every block's text keys and values at time t; a stream needs them once per
        prompt."""
        _, _, modulation = self.modulations(t)
        words, pairs = self.embed_text(text, text_lens), []
        for block in self.blocks:
            words, k, v = block.encode_text(words, modulation, text_lens)
            pairs.append((k, v))
        return pairs

    def new_cache(
        self,
        batch: int,
        size: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> KVCache:
        """Returns an empty cache for latents of `size` = (height, width), see
        `VideoTransformer`."""
        config, grid = self.config, self.config.token_grid(*size)
        cache = KVCache(
            batch,
            config.depth,
            config.heads // self.context.size,
            config.head_dim,
            text_tokens=config.text_tokens,
            tokens_per_frame=grid[0] * grid[1],
            window_frames=config.window(grid),
            sink_frames=config.sink_frames,
            device=device or self.video_in.weight.device,
            **self.cache_choice.options(dtype, config.head_dim),
        )
        fit_scales(cache, self.blocks, self.context)
        return cache
