"""FrameLayout: the block-causal mask as a handful of integers (docs/method.md#3)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_integer

Interval = tuple[int, int]  # half-open
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FrameLayout:
    """Tokens of a sequence of frames, and which token sees which.

    The query is `[text | frames]`. With `past_frames=None` the key is `[text | frames]` and the
    sequence starts at frame 0. With an integer the frames continue an earlier segment and the key
    is `[text | sink | past | frames]`; `past` never holds a sink frame.

    A query in frame i sees all text, the sink frames (the first `sink_frames` of the sequence) up
    to i, and frames i - window_frames ... i. Text sees text only.

    text_tokens: rows of text, padding included.
    tokens_per_frame: tokens of one latent frame.
    frames: new frames in the query.
    window_frames: earlier frames that a frame sees besides the sink; None for all.
    sink_frames: first frames of the sequence, which all frames see; 1 unless given.
    past_frames: earlier non-sink frames in the key; None if the sequence starts here.

    Raises TypeError for a field that is not an integer, ValueError for one out of range.
    """

    text_tokens: int
    tokens_per_frame: int
    frames: int
    window_frames: int | None
    sink_frames: int = 1
    past_frames: int | None = None

    def __post_init__(self):
        for name, least in (
            ("text_tokens", 0),
            ("tokens_per_frame", 1),
            ("frames", 0),
            ("window_frames", 0),
            ("sink_frames", 0),
            ("past_frames", 0),
        ):
            optional = name in ("window_frames", "past_frames")
            value = check_integer(name, getattr(self, name), least, optional)
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def integers(self) -> tuple[int, int, int, int | None, int, int | None]:
        """Fields in order, as the ops' schemas take them."""
        return (
            self.text_tokens,
            self.tokens_per_frame,
            self.frames,
            self.window_frames,
            self.sink_frames,
            self.past_frames,
        )

    @property
    def query_length(self) -> int:
        """Rows of the query: text and new frames."""
        return self.text_tokens + self.frames * self.tokens_per_frame

    @property
    def key_frames(self) -> int:
        """Frames in the key: of `[sink | past | frames]`, or of `[frames]` from the start."""
        before = 0 if self.past_frames is None else self.sink_frames + self.past_frames
        return before + self.frames

    @property
    def key_length(self) -> int:
        """Rows of the key: text and all its frames."""
        return self.text_tokens + self.key_frames * self.tokens_per_frame

    def __str__(self) -> str:
        """Describe the layout in words, for errors."""
        before = ""
        if self.past_frames is not None:
            before = f"{self.sink_frames} sink + {self.past_frames} past + "
        return (
            f"{self.text_tokens} text tokens + {before}{self.frames} frames "
            f"of {self.tokens_per_frame} tokens"
        )

    @property
    def sink(self) -> Interval:
        """Interval of the sink frames in the key, in tokens."""
        given = self.past_frames is not None
        frames = self.sink_frames if given else min(self.sink_frames, self.frames)
        return self.text_tokens, self.text_tokens + frames * self.tokens_per_frame

    @property
    def prefix(self) -> Interval:
        """Interval of `[sink | past]` in the key, in tokens; empty if the sequence starts here."""
        given = self.key_frames - self.frames
        return self.text_tokens, self.text_tokens + given * self.tokens_per_frame

    def intervals(self, frame: int) -> tuple[Interval, Interval, Interval]:
        """Return the intervals of key tokens that a query in `frame` sees: text, sink and window.

        Frame 0 is the first of the query. Intervals do not overlap and may be empty.
        """
        first_frame, tokens = self.text_tokens, self.tokens_per_frame
        position = self.key_frames - self.frames + frame  # of its own frame among the key frames
        oldest = 0 if self.window_frames is None else position - self.window_frames
        sink = min(self.sink_frames, position + 1)
        window = max(oldest, sink)
        return (
            (0, self.text_tokens),
            (first_frame, first_frame + sink * tokens),
            (first_frame + window * tokens, first_frame + (position + 1) * tokens),
        )

    @property
    def mask_mod(self) -> MaskMod:
        """Mask as a function of (batch, head, query, key) indices, for FlexAttention:
        `create_block_mask(layout.mask_mod, None, None, layout.query_length, layout.key_length)`.

        It is a plain function, because FlexAttention takes no methods.
        """
        text, tokens = self.text_tokens, self.tokens_per_frame
        before = self.key_frames - self.frames
        window, sink = self.window_frames, self.sink_frames

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            query_frame = torch.div(query - text, tokens, rounding_mode="floor") + before
            key_frame = torch.div(key - text, tokens, rounding_mode="floor")
            seen = key_frame <= query_frame
            if window is not None:
                seen = seen & ((key_frame >= query_frame - window) | (key_frame < sink))
            return (key < text) | ((query >= text) & seen)

        return mask_mod

    def dense_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the mask (query_length, key_length) bool, True if the query sees the key."""
        query = torch.arange(self.query_length, device=device)[:, None]
        key = torch.arange(self.key_length, device=device)
        return self.mask_mod(torch.zeros_like(key), torch.zeros_like(key), query, key)
