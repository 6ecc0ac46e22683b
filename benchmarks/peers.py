"""Implementations by others of the work of an op. A peer that cannot be built here is the exception
that says why, and `against` records its words."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import deterministic as memory

from aapt_kernels import FrameLayout, backend, use_backend


class Compiled(NamedTuple):
    """A peer that has to be compiled first, which may take minutes; `--quick` leaves it out."""

    build: Callable[[], Callable[[], object]]


Peer = Callable[[], object] | Exception | Compiled


def attempt(build: Callable[[], Callable[[], object]]) -> Peer:
    """The peer that `build` makes, or why it makes none."""
    try:
        return build()
    except Exception as error:
        return error


def compiled(function: Callable, device: str, mode: str | None = None) -> Callable:
    """Compile a function with torch.compile, without graph breaks; a dry run only traces.

    mode: torch.compile's own, such as max-autotune-no-cudagraphs.
    """
    torch._dynamo.reset()  # every case is a program of its own, not a recompilation
    if device != "cuda":
        return torch.compile(function, fullgraph=True, dynamic=False, backend="eager")
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def other_backends(op: str, x: Tensor, call: Callable[[], object]) -> dict[str, Peer]:
    """Our other backends of an op, besides the one that `auto` takes."""
    chosen = backend.resolve(op, x)
    peers = {}
    for name in ("cuda", "triton"):
        reason = backend.obstacle(op, name, x.device.type)
        if reason is None and backend.implementation(op, name) is chosen:
            continue
        peer = backend.BackendError(reason) if reason else forced(name, call)
        if name == "triton" and not reason:
            peer = Compiled(partial(forced, name, call))
        peers[f"ours, {name}"] = peer
    return peers


def forced(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def run():
        with use_backend(name):
            return call()

    return run


def attentions(q: Tensor, k: Tensor, v: Tensor, device: str) -> dict[str, Peer]:
    """Unmasked attention of q (B, L, H, D) against k, v that lie head-major in memory."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]

    def sdpa(choice: SDPBackend):
        def run():
            with sdpa_kernel(choice):
                return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

        return run

    def flex():
        from torch.nn.attention.flex_attention import flex_attention

        attend = compiled(flex_attention, device)
        return lambda: attend(*heads_first).transpose(1, 2)

    def flash(module: str):
        attend = import_module(module).flash_attn_func
        return lambda: first(attend(q, k, v))

    return {
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA flash (FA2)": sdpa(SDPBackend.FLASH_ATTENTION),
        "FlexAttention compiled": Compiled(flex),
        "FA3": attempt(lambda: flash("flash_attn_interface")),
        "FA4": attempt(lambda: flash("flash_attn.cute")),
    }


def masked_attentions(
    layout: FrameLayout, device: str, timed: Callable[[Callable], Callable[[], object]]
) -> dict[str, Peer]:
    """Attention of q, k, v (B, L, H, D) under the mask of `layout`; `timed` makes of such a
    function what is to run."""

    def dense():
        mask = layout.dense_mask("cuda" if device == "cuda" else "cpu")

        def attend(*tensors):
            q, k, v = (x.transpose(1, 2) for x in tensors)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        return timed(attend)

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(
            layout.mask_mod,
            None,
            None,
            layout.query_length,
            layout.key_length,
            device="cuda" if device == "cuda" else "cpu",
            _compile=device == "cuda",  # else it would make the dense mask
        )
        attend = compiled(flex_attention, device)

        def run(*tensors):
            return attend(*(x.transpose(1, 2) for x in tensors), block_mask=mask).transpose(1, 2)

        return timed(run)

    def per_frame(attend: Callable):
        """A loop over frames with an attention that needs no mask; (B, L, H, D)."""

        def run(q, k, v):
            text, tokens = layout.text_tokens, layout.tokens_per_frame
            outs = [attend(q[:, :text], k[:, :text], v[:, :text])] if text else []
            for frame in range(layout.frames):
                start = text + frame * tokens
                seen = [slice(*interval) for interval in layout.intervals(frame)]
                keys, values = (torch.cat([x[:, part] for part in seen], dim=1) for x in (k, v))
                outs.append(attend(q[:, start : start + tokens], keys, values))
            return torch.cat(outs, dim=1)

        return timed(run)

    def sdpa(choice: SDPBackend | None):
        def attend(*tensors):
            q, k, v = (x.transpose(1, 2) for x in tensors)
            if choice is None:
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            with sdpa_kernel(choice):
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return lambda: per_frame(attend)

    def flash(module: str):
        attend = import_module(module).flash_attn_func
        return per_frame(lambda *tensors: first(attend(*tensors)))

    if device == "cpu":
        return {"dense-mask SDPA": attempt(dense), "SDPA per frame": attempt(sdpa(None))}
    return {
        "SDPA, dense mask": attempt(dense),
        "SDPA cuDNN per frame": attempt(sdpa(SDPBackend.CUDNN_ATTENTION)),
        "SDPA flash (FA2) per frame": attempt(sdpa(SDPBackend.FLASH_ATTENTION)),
        "FlexAttention compiled": Compiled(flex),
        "FA3 per frame": attempt(lambda: flash("flash_attn_interface")),
    }


def deterministic(call: Callable[[], object]) -> Callable[[], object]:
    """Wrap a call in PyTorch's deterministic mode, without its fill of fresh memory."""

    def run():
        before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(before[0])
            memory.fill_uninitialized_memory = before[1]

    return run


def first(result):
    """The output of a function that may return the log-sum-exp beside it."""
    return result[0] if isinstance(result, tuple) else result


def plain_copy(total_bytes: int, device: torch.device) -> Callable[[], None]:
    """A copy that reads and writes `total_bytes` together, as fast as a memory can be used."""
    source = torch.randint(0, 127, (total_bytes // 2,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def run():
        target.copy_(source)

    return run
