"""QK-RMSNorm and rotary position in one op, as `kv_append` fuses them too.

q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin)
"""

import torch
from torch import Tensor

from ..backend import deferred, implement, register_autograd, register_fake
from ..checks import (
    check_dense_rows,
    check_device,
    check_dtype,
    check_no_grad,
    check_no_tangent,
    check_shape,
)
from ..precision import follow_autocast
from ..schemas import ops
from . import cpu, ref


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    eps: float = 1e-6,
    cos_sink: Tensor | None = None,
    sin_sink: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """RMSNorm q and k, then rotate them by their positions (docs/method.md#2, #4).

    q and k (B, L, H, D). The shape of the weights is that of one norm: (D,) for each head
    (docs/method.md#2), (H, D) for all heads of a token (Wan), None for no norm. cos and sin
    (L, D / 2) float32 or float64, None for no rotation (text). A row x = [x1 | x2], split in
    halves, becomes [x1 cos - x2 sin | x1 sin + x2 cos]. Computed in float32 (float64 for float64)
    and cast back at the end. Under autocast q and k are cast to its dtype.

    Returns (q, k); with cos_sink and sin_sink, (L, D / 2), also q_sink: the normed q rotated by
    those tables (docs/method.md#12). Differentiable once in q, k and the weights; on the reference
    again.

    Raises ValueError or TypeError if the arguments do not fit each other, RuntimeError if a table
    requires grad, and NotImplementedError in forward-mode differentiation.
    """
    q, k = follow_autocast(q, k)
    check_arguments(q, k, q_weight, k_weight, cos, sin, cos_sink, sin_sink)
    tables = {"cos": cos, "sin": sin, "cos_sink": cos_sink, "sin_sink": sin_sink}
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    check_no_tangent("qk_norm_rope", {"q": q, "k": k, **weights, **tables})
    check_no_grad("the rotation of qk_norm_rope", tables)
    q, k, q_sink = ops.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, cos_sink, sin_sink, eps)
    return (q, k) if cos_sink is None else (q, k, q_sink)


def check_arguments(q, k, q_weight, k_weight, cos, sin, cos_sink, sin_sink) -> None:
    """Check the arguments that `qk_norm_rope` and `kv_append` share: ValueError or TypeError."""
    batch, length, heads, head_dim = check_shape("q", q, ("batch", "length", "heads", "head_dim"))
    check_shape("k", k, (batch, length, heads, head_dim))
    check_dense_rows({"q": q, "k": k})
    check_dtype({"q": q, "k": k})
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    for name, weight in weights.items():
        per_head = weight.shape == (head_dim,)
        if not per_head and weight.shape != (heads, head_dim):
            raise ValueError(
                f"{name}: expected ({head_dim},) to norm each head or ({heads}, {head_dim}) to "
                f"norm across heads, got {tuple(weight.shape)}"
            )
        check_dtype({name: weight})
    if len(weights) == 2:
        check_shape("k_weight", k_weight, q_weight.shape, "a norm like that of q_weight")
    tensors = {"q": q, "k": k, **weights}
    for (cos_name, cosines), (sin_name, sines) in (
        (("cos", cos), ("sin", sin)),
        (("cos_sink", cos_sink), ("sin_sink", sin_sink)),
    ):
        if (cosines is None) != (sines is None):
            given = sin_name if cosines is None else cos_name
            raise ValueError(f"{cos_name}, {sin_name}: expected both or neither, got {given} only")
        if cosines is None:
            continue
        if head_dim % 2:
            raise ValueError(f"q: expected an even head_dim to rotate, got {head_dim}")
        for name, table in ((cos_name, cosines), (sin_name, sines)):
            check_shape(name, table, (length, head_dim // 2))
            check_dtype({name: table}, (torch.float32, torch.float64))
            tensors[name] = table
    if cos_sink is not None and cos is None:
        raise ValueError("cos_sink: expected cos and sin with it, got cos=None")
    check_device(tensors)


def dense_like(x: Tensor) -> Tensor:
    """Return an empty contiguous tensor of the shape, dtype and device of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake("qk_norm_rope")
def _(q, k, q_weight, k_weight, cos, sin, cos_sink, sin_sink, eps):
    q_sink = q.new_empty(0 if cos_sink is None else q.shape)
    return dense_like(q), dense_like(k), q_sink


@register_fake("qk_norm_rope_backward")
def _(dq, dk, dq_sink, q, k, q_weight, k_weight, *_):
    weights = [q.new_empty(0) if w is None else torch.empty_like(w) for w in (q_weight, k_weight)]
    return dense_like(q), dense_like(k), *weights


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dq, dk, dq_sink):
    saved = ctx.saved_tensors  # read once: checkpointing hands it out no second time
    q, k, q_weight, k_weight, *tables = saved
    check_no_tangent("qk_norm_rope_backward", {"dq": dq, "dk": dk, "dq_sink": dq_sink})
    dq = torch.zeros_like(q) if dq is None else dq
    dk = torch.zeros_like(k) if dk is None else dk
    has_sink = tables[2] is not None
    dq, dk, dq_weight, dk_weight = ops.qk_norm_rope_backward(
        dq, dk, dq_sink if has_sink else None, *saved, ctx.eps
    )
    dq_weight = None if q_weight is None else dq_weight
    dk_weight = None if k_weight is None else dk_weight
    return dq, dk, dq_weight, dk_weight, *[None] * (len(tables) + 1)


implement(
    "qk_norm_rope", reference=ref.reference_forward, cpu=cpu.forward, triton=deferred(__name__)
)
implement(
    "qk_norm_rope_backward",
    reference=ref.reference_backward,
    cpu=cpu.backward,
    triton=deferred(__name__, "backward"),
)
register_autograd("qk_norm_rope", _backward, _save)
