"""KVCache: pinned text, pinned first frame and a ring of frames, in fixed memory (SPEC 5).

cache = KVCache(1, layers, heads, head_dim, text_tokens=24, tokens_per_frame=40,
                window_frames=6, dtype=torch.bfloat16)
for layer in range(layers):
    cache.write_text(layer, text_k[layer], text_v[layer])
while playing:
    for layer in range(layers):
        q = kv_append(q, k, v, cache, layer, q_weight, k_weight, cos, sin)
        out = cached_attention(q, cache, layer)
    cache.advance()
"""

import copy

import torch
from torch import Tensor

from .checks import check_dense_rows, check_device, check_dtype, check_shape


class KVCache:
    """Keys and values of every layer: k and v (layers, batch, capacity, heads, head_dim), views
    of a head-major buffer.

    capacity = `[text | sink | ring of window_frames + 1]`, in tokens. `step` is a () int64 tensor
    on the device: how many frames the finished steps have appended, which is the index of the
    frame now being made. Frame i < sink_frames lives in its pinned slot, every later frame in
    ring slot (i - sink_frames) mod (window_frames + 1). text_lens (batch,) int64: how many of
    the text slot's last rows are text. Nothing is ever shifted, and no step reads the counter on
    the host.
    """

    def __init__(
        self,
        batch: int,
        layers: int,
        heads: int,
        head_dim: int,
        *,
        text_tokens: int,
        tokens_per_frame: int,
        window_frames: int,
        sink_frames: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        for name, value, least in (
            ("batch", batch, 1),
            ("layers", layers, 1),
            ("heads", heads, 1),
            ("head_dim", head_dim, 1),
            ("text_tokens", text_tokens, 0),
            ("tokens_per_frame", tokens_per_frame, 1),
            ("window_frames", window_frames, 0),
            ("sink_frames", sink_frames, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
        self.text_tokens = text_tokens
        self.tokens_per_frame = tokens_per_frame
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        # Head-major in memory: a head's keys lie in one piece, as every attention reads them.
        shape = (layers, batch, heads, self.capacity, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3)
        self.v = torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.text_lens = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def ring_frames(self) -> int:
        return self.window_frames + 1

    @property
    def capacity(self) -> int:
        """Tokens of one layer: text, sink and ring."""
        frames = self.sink_frames + self.ring_frames
        return self.text_tokens + frames * self.tokens_per_frame

    @property
    def integers(self) -> tuple[int, int, int, int]:
        """text_tokens, tokens_per_frame, window_frames, sink_frames: as the ops take them."""
        return self.text_tokens, self.tokens_per_frame, self.window_frames, self.sink_frames

    def write_text(self, layer: int, k: Tensor, v: Tensor, text_lens: Tensor | None = None) -> None:
        """Replace one layer's text by k and v (batch, length <= text_tokens, heads, head_dim).

        text_lens (batch,): how many of the first rows are text, all of them unless given; it is
        one for all layers. They go to the end of the text slot, beside the frames, so that what a
        frame sees is one piece of memory. The frames already in the cache stay as they were made.
        """
        self.check_layer(layer)
        _, batch, _, heads, head_dim = self.k.shape
        length = check_shape("k", k, (batch, "length", heads, head_dim), "this cache")[1]
        check_shape("v", v, tuple(k.shape))
        if length > self.text_tokens:
            raise ValueError(
                f"k: expected at most {self.text_tokens} text tokens, the slot of this cache, "
                f"got {length}"
            )
        check_dtype({"cache": self.k, "k": k, "v": v})
        check_device({"cache": self.k, "k": k, "v": v})
        if text_lens is not None:
            check_shape("text_lens", text_lens, (batch,))
            check_dtype({"text_lens": text_lens}, (torch.int32, torch.int64))
        with torch.no_grad():
            slot = slice(self.text_tokens - length, self.text_tokens)
            if text_lens is None:
                self.text_lens.fill_(length)
            else:
                self.text_lens.copy_(text_lens).clamp_(0, length)
                shift = length - self.text_lens[:, None]
                source = (torch.arange(length, device=k.device) - shift).clamp(min=0)
                source = source[..., None, None].expand_as(k)
                k, v = k.gather(1, source), v.gather(1, source)
            self.k[layer, :, slot].copy_(k)
            self.v[layer, :, slot].copy_(v)

    def advance(self) -> None:
        """Finish a step: the frame that every layer has appended is now part of the past."""
        self.step.add_(1)

    def reset(self) -> None:
        """Forget every frame. The text stays."""
        self.step.zero_()

    def clone(self) -> "KVCache":
        """An independent copy, to branch a stream or to keep its state for training."""
        twin = copy.copy(self)
        for name in ("k", "v", "step", "text_lens"):
            setattr(twin, name, getattr(self, name).clone())
        return twin

    @property
    def past_frames(self) -> int:
        """How many frames `prefix` gives besides the sink. Waits for the device."""
        return min(self.window_frames, max(0, int(self.step) - self.sink_frames))

    def prefix(self, layer: int) -> tuple[Tensor, Tensor]:
        """Copies of one layer's `[sink | past]` keys and values, oldest first, as
        FrameLayout(past_frames=cache.past_frames) wants them to continue the sequence in parallel:
        (batch, (sink_frames + past_frames) * tokens_per_frame, heads, head_dim).

        Call it between steps; it waits for the device. RuntimeError before the sink is complete.
        """
        self.check_layer(layer)
        step = int(self.step)
        if step < self.sink_frames:
            raise RuntimeError(
                f"prefix: expected at least {self.sink_frames} finished steps, got {step}"
            )
        index = torch.arange(-self.past_frames, 0, device=self.k.device) + step - self.sink_frames
        past = self.sink_frames + index % self.ring_frames
        index = torch.cat([torch.arange(self.sink_frames, device=self.k.device), past])
        frames = (-1, self.tokens_per_frame)

        def take(x: Tensor) -> Tensor:
            slots = x[layer, :, self.text_tokens :].unflatten(1, frames)
            return slots.index_select(1, index).flatten(1, 2)

        return take(self.k), take(self.v)

    def check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.k.shape[0]:
            raise IndexError(f"layer: expected 0 ... {self.k.shape[0] - 1}, got {layer}")

    def check_frame(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Each tensor is one frame of this cache, (batch, tokens_per_frame, heads, head_dim), or
        IndexError, ValueError or TypeError."""
        self.check_layer(layer)
        _, batch, _, heads, head_dim = self.k.shape
        for name, tensor in tensors.items():
            check_shape(name, tensor, (batch, self.tokens_per_frame, heads, head_dim), "this cache")
        check_dense_rows(tensors)
        check_dtype({"cache": self.k, **tensors})
        check_device({"cache": self.k, **tensors})
