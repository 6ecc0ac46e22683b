"""Weights laid out for a kernel, once for every version of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

MAX_KEPT = 16  # of one weight: a CPU packs for every size of picture


class Packed(NamedTuple):
    tensor: Tensor
    version: tuple  # of the weight that it was made from
    ready: torch.cuda.Event | None
    stream: torch.cuda.Stream | None


class PackedWeights:
    """`pack(weight, *options)`, remembered for frozen weights as long as they live.

    A weight that changes in place (load_state_dict, an optimiser) is packed again in the next call
    outside of CUDA graphs, to the same address: graphs that hold it replay with the old weights
    until then, and with the new ones after. Changes that autograd does not count, through `.data`,
    are not seen. A weight that requires a gradient is packed in every call: it is about to change,
    and sharding does that uncounted. Of one weight the `MAX_KEPT` newest are kept.

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
            # A tensor of inference mode could not be written to outside of it
            with torch.inference_mode(False), torch.no_grad():
                tensor = self._pack(weight, *options)
            if capturing:
                return tensor
            if before is not None and like(tensor, before.tensor):
                tensor = before.tensor.copy_(tensor)
            before = Packed(tensor, version, *mark(tensor))
            of_weight = {key: kept for key, kept in of_weight.items() if key != options}
            newest = list(of_weight.items())[1 - MAX_KEPT :]
            self._packed[weight] = dict([*newest, (options, before)])
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
