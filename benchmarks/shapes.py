"""The sizes that benchmarks of attention run at."""

from dataclasses import dataclass, replace

import torch

from aapt_kernels import FrameLayout, KVCache


@dataclass(frozen=True)
class Shape:
    """One new frame of `tokens` queries against a full cache of `frames` frames, sink and new
    frame included, and `text` text tokens."""

    tokens: int
    frames: int
    heads: int
    head_dim: int
    text: int

    @property
    def keys(self) -> int:
        return self.text + self.frames * self.tokens

    @property
    def attention_flops(self) -> int:
        """Operations of the two products, padding not counted."""
        return 4 * self.tokens * self.keys * self.heads * self.head_dim

    def reduced(self) -> "Shape":
        """A shape with as odd sizes, small enough for a CPU."""
        return replace(
            self, tokens=self.tokens % 128 or 8, frames=3, heads=min(self.heads, 2), text=16
        )

    def make_cache(self, dtype: torch.dtype, device: torch.device, **options) -> KVCache:
        """Full of normal numbers, after several turns of the ring. options: more of KVCache's."""
        cache = KVCache(
            1,
            1,
            self.heads,
            self.head_dim,
            text_tokens=self.text,
            tokens_per_frame=self.tokens,
            window_frames=self.frames - 2,
            dtype=dtype,
            device=device,
            **options,
        )
        for part in (cache,) if cache.past is None else (cache, cache.past):
            for x in (part.k, part.v):
                x.copy_(torch.randn(x.shape, device=device))
            part.step.fill_(3 * self.frames + 1)
        cache.text_lens.fill_(self.text)
        return cache

    def make_frame(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """(1, tokens, heads, head_dim)"""
        shape = (1, self.tokens, self.heads, self.head_dim)
        return torch.randn(shape, dtype=dtype, device=device)


CPU = {
    "tiny world": Shape(tokens=40, frames=8, heads=6, head_dim=32, text=24),
    "large": Shape(tokens=440, frames=10, heads=8, head_dim=64, text=24),
}

# aapt-8b at 736x416 and 1280x720, on one GPU and under Ulysses; the bundled model.
CUDA = {
    f"{tokens} q x {frames} frames, {heads} heads": Shape(tokens, frames, heads, 128, 512)
    for tokens, frames in ((1196, 32), (3600, 17))
    for heads in (24, 12, 6, 3)
}
CUDA["1196 q x 32 frames, 24 heads of 64"] = Shape(1196, 32, 24, 64, 512)
CUDA["tiny world"] = Shape(tokens=40, frames=10, heads=3, head_dim=64, text=25)


def shapes_for(device: str) -> dict[str, Shape]:
    """Shapes by name. `device`: the value of --device, cpu, cuda or dry."""
    if device == "cpu":
        return CPU
    if device == "cuda":
        return CUDA
    smaller = {shape.reduced(): name for name, shape in CUDA.items()}
    return {f"{name}, reduced": shape for shape, name in smaller.items()}


def dtypes_for(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] if device == "cpu" else [torch.bfloat16]


@dataclass(frozen=True)
class TrainingShape:
    """A whole clip under the mask of `layout`."""

    layout: FrameLayout
    heads: int
    head_dim: int
    batch: int = 1

    @property
    def visible(self) -> int:
        """Elements of the mask that are shown, of one head."""
        text, tokens = self.layout.text_tokens, self.layout.tokens_per_frame
        frames = map(self.layout.intervals, range(self.layout.frames))
        seen = sum(end - start for frame in frames for start, end in frame)
        return text * text + tokens * seen

    def flops(self, products: int) -> int:
        """Operations on visible elements. `products`: matrix products, 2 forward, 5 backward."""
        return 2 * products * self.visible * self.head_dim * self.heads * self.batch

    def bytes(self, query_tensors: int, key_tensors: int) -> int:
        """Bytes of BF16 tensors, each read or written once."""
        rows = query_tensors * self.layout.query_length + key_tensors * self.layout.key_length
        return 2 * rows * self.head_dim * self.heads * self.batch

    def reduced(self) -> "TrainingShape":
        """A shape with as odd sizes, small enough for a CPU."""
        layout = self.layout
        tokens = layout.tokens_per_frame % 128 or 8
        return replace(
            self,
            layout=replace(
                layout, text_tokens=16, tokens_per_frame=tokens, frames=3, window_frames=1
            ),
            heads=min(self.heads, 2),
        )

    def make_inputs(self, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """q, k and v, normal."""
        lengths = (self.layout.query_length, *[self.layout.key_length] * 2)
        sizes = [(self.batch, length, self.heads, self.head_dim) for length in lengths]
        return [torch.randn(size, dtype=dtype, device=device) for size in sizes]


TRAINING_CPU = {
    "video": TrainingShape(FrameLayout(0, 128, 32, 6), 8, 64),
    "tiny-world training": TrainingShape(FrameLayout(24, 40, 8, 6), 6, 32, batch=8),
    "tiny-world segment": TrainingShape(FrameLayout(24, 40, 8, 6, past_frames=6), 6, 32, batch=8),
}

# aapt-8b at three sizes, a text of 512 tokens; the bundled model.
TRAINING_CUDA = {
    f"{frames} x {tokens}, window {window}": TrainingShape(
        FrameLayout(512, tokens, frames, window), heads=24, head_dim=128
    )
    for frames, tokens, window in ((31, 1196, 30), (61, 880, 30), (16, 3600, 15))
}
TRAINING_CUDA["tiny world"] = TrainingShape(FrameLayout(25, 40, 16, 8), 3, 64, batch=8)


def training_shapes_for(device: str) -> dict[str, TrainingShape]:
    """Shapes by name. `device`: the value of --device, cpu, cuda or dry."""
    if device == "cpu":
        return TRAINING_CPU
    if device == "cuda":
        return TRAINING_CUDA
    return {f"{name}, reduced": shape.reduced() for name, shape in TRAINING_CUDA.items()}
