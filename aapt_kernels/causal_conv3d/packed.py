"""Weights laid out for a kernel, once for every version of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Packed(NamedTuple):
    tensor: Tensor
    version: tuple  # of the weight that it was made from
    ready: torch.cuda.Event | None
    stream: torch.cuda.Stream | None


class PackedWeights:
    """`pack(weight, *options)`, remembered for frozen weights as long as they live.

    A weight that changes in place (load_state_dict, an optimiser) is packed again when it is next
    used, to the same address, which CUDA graphs may hold: from then on they replay with the new
    weights. Changes that autograd does not count, through `.data`, are not seen. A weight that
    requires a gradient is packed in every call: it is about to change, and sharding does that
    uncounted.

    Capture a CUDA graph after a call outside of it: what a capture has to pack itself belongs to
    the graph and is packed in every replay.
    """

    def __init__(self, pack: Callable[..., Tensor]):
        self._pack = pack
        self._packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __call__(self, weight: Tensor, *options) -> Tensor:
        if weight.requires_grad or weight.is_inference():  # those have no versions
            return self._pack(weight, *options)
        of_weight = self._packed.get(weight, {})
        version = (weight._version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        before = of_weight.get(options)
        capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
        if before is None or before.version != version:
            tensor = self._pack(weight, *options)
            if capturing:
                return tensor
            if before is not None and like(tensor, before.tensor):
                tensor = before.tensor.copy_(tensor)
            before = Packed(tensor, version, *mark(tensor))
            self._packed[weight] = of_weight | {options: before}
        elif before.ready is not None and not capturing:  # a capture begins with all work done
            stream = torch.cuda.current_stream(weight.device)
            if stream != before.stream:
                stream.wait_event(before.ready)
        return before.tensor


def like(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def mark(tensor: Tensor) -> tuple:
    """The work on `tensor` so far, for other streams to wait for."""
    if not tensor.is_cuda:
        return None, None
    stream = torch.cuda.current_stream(tensor.device)
    return stream.record_event(), stream
