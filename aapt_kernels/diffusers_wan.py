"""Attention of diffusers' Wan replaced by `block_causal_attention`, without an import of diffusers.

with patch(pipeline):
    video = pipeline(prompt).frames
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .block_causal_attention import block_causal_attention
from .checks import check_integer
from .layout import FrameLayout
from .qk_norm_rope import qk_norm_rope

PARTS = ("heads", "to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "set_processor")


class patch:  # noqa: N801  read as a verb, like use_backend
    """Replace the self-attention of a diffusers Wan pipeline or transformer, until `undo` or the
    end of a `with` block.

    pipeline: a pipeline with `transformer` (and `transformer_2`), or a transformer, in whose blocks
    `attn1` is a WanAttention; diffusers 0.35 or later. causal: False for Wan's own attention of all
    frames to all, True for the block-causal mask. window_frames: with causal, number of earlier
    latent frames that a frame sees besides the sink, None for all. sink_frames: with causal, number
    of first latent frames that every later frame sees.

    Weights, `state_dict`, cross-attention, LoRA, gradients, gradient checkpointing and compiled
    blocks stay as they are, and any size of video goes through. Weights trained to see the future
    must be trained further before `causal` gives good video.

    Raises TypeError if there is no such attention in the pipeline or an integer is none, ValueError
    for integers out of range, for a window or sink without causal, and in a forward pass for an
    attention mask or diffusers' context parallelism.
    """

    def __init__(
        self,
        pipeline: object,
        *,
        causal: bool = False,
        window_frames: int | None = None,
        sink_frames: int | None = None,
    ):
        if not causal and (window_frames, sink_frames) != (None, None):
            raise ValueError(
                "causal: expected True with window_frames or sink_frames, got False; "
                "pass causal=True"
            )
        window_frames = check_integer("window_frames", window_frames, 0, optional=True)
        sink_frames = check_integer("sink_frames", 1 if sink_frames is None else sink_frames, 0)
        self._replaced: list[tuple[nn.Module, object, WanProcessor]] = []
        self._hooks = []
        for transformer in _transformers(pipeline):
            processor = WanProcessor(window_frames, sink_frames)
            if causal:
                hook = transformer.register_forward_pre_hook(processor.measure, with_kwargs=True)
                self._hooks.append(hook)
            for attention in _self_attentions(transformer):
                self._replaced.append((attention, attention.processor, processor))
                attention.set_processor(processor)

    def undo(self) -> None:
        """Give every layer the processor it had; a layer that has been given another since keeps
        that. A second call changes nothing."""
        for attention, before, ours in self._replaced:
            if attention.processor is ours:
                attention.set_processor(before)
        for hook in self._hooks:
            hook.remove()
        self._replaced, self._hooks = [], []

    def __enter__(self) -> "patch":
        return self

    def __exit__(self, *error) -> None:
        self.undo()


class WanProcessor:
    """Computes everything between the input and the output of a diffusers WanAttention."""

    # diffusers writes its context parallelism here: refused below, because tokens of other ranks
    # would be missing
    _parallel_config = None

    def __init__(self, window_frames: int | None, sink_frames: int):
        self.window_frames, self.sink_frames = window_frames, sink_frames
        self.tokens_per_frame: int | None = None

    def measure(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Read the tokens of one latent frame from the latents (B, C, T, H, W) of a forward
        pass."""
        latents = args[0] if args else kwargs["hidden_states"]
        _, rows, columns = transformer.config.patch_size
        self.tokens_per_frame = (latents.shape[3] // rows) * (latents.shape[4] // columns)

    def layout(self, tokens: int) -> FrameLayout:
        """Return the mask of a clip of `tokens` tokens; one frame unless `measure` is called."""
        if self.tokens_per_frame is None:
            return FrameLayout(0, tokens, 1, 0)
        frames = tokens // self.tokens_per_frame
        return FrameLayout(0, self.tokens_per_frame, frames, self.window_frames, self.sink_frames)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend within (B, tokens, width); arguments by the names that diffusers gives them.
        rotary_emb: cosines and sines, (1, tokens, 1, head_dim) each."""
        if attention_mask is not None:
            raise ValueError("attention_mask: expected none in a patched layer, got a tensor")
        if self._parallel_config is not None:
            raise ValueError(
                "pipeline: expected no context parallelism in a patched pipeline, got one; "
                "undo the patch"
            )

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        def halves(x: Tensor) -> Tensor:
            # Wan rotates neighbours, the operator halves; the scores are the same
            return heads(x).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

        cos, sin = (table[0, :, 0] for table in rotary_emb)
        if cos.dtype != torch.float64:
            cos, sin = cos.float(), sin.float()
        q, k = (halves(linear(hidden_states)) for linear in (attn.to_q, attn.to_k))
        weights = (halves(norm.weight) for norm in (attn.norm_q, attn.norm_k))
        q, k = qk_norm_rope(q, k, *weights, cos[:, ::2], sin[:, 1::2], eps=attn.norm_q.eps)
        v = heads(attn.to_v(hidden_states))
        out = block_causal_attention(q, k, v, self.layout(q.shape[1]))
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def _transformers(pipeline: object) -> list[nn.Module]:
    """Return the Wan transformers of a pipeline, or the one given; TypeError if there is none."""
    parts = [getattr(pipeline, name, None) for name in ("transformer", "transformer_2")]
    candidates = [pipeline, *parts]
    found = [x for x in candidates if isinstance(x, nn.Module) and any(_self_attentions(x))]
    if not found:
        raise TypeError(
            "pipeline: expected a diffusers Wan pipeline or transformer, got "
            f"{type(pipeline).__name__}, in which no attn1 is a WanAttention"
        )
    return found


def _self_attentions(transformer: nn.Module) -> Iterator[nn.Module]:
    for module in transformer.modules():
        attention = getattr(module, "attn1", None)
        if attention is not None and all(hasattr(attention, part) for part in PARTS):
            yield attention
