"""PyTorch's own flash attention on a CPU, in parts that are merged by their log-sum-exp."""

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]  # out (B, H, L, D), lse (B, H, L)
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Part:
    """Attend with q, k and v (B, L, H, D)."""
    return FLASH(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)


def merge(parts: list[Part]) -> Part:
    """Merge parts that saw disjoint keys into one attention."""
    (out, lse), *others = parts
    if not others:
        return out, lse
    for _, other in others:
        lse = torch.logaddexp(lse, other)
    weights = [(each - lse).exp_()[..., None] for _, each in parts]
    out = out * weights[0]
    for (other, _), weight in zip(others, weights[1:], strict=True):
        out.addcmul_(other, weight)
    return out, lse


def clips_of_one_text(text_lens: Tensor, text_tokens: int) -> list[tuple[slice, int]]:
    """Return slices of the batch whose clips have one length of text, and that length, limited to
    the text tokens."""
    lens = [max(0, min(length, text_tokens)) for length in text_lens.tolist()]
    if len(set(lens)) <= 1:
        return [(slice(0, len(lens)), length) for length in lens[:1]]
    return [(slice(clip, clip + 1), length) for clip, length in enumerate(lens)]


def without_float16(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors, those of float16 as float32, in which PyTorch's attention is several
    times faster."""
    return [x.float() if x is not None and x.dtype == torch.float16 else x for x in tensors]
