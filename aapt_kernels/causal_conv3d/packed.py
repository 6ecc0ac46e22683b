"""Weights laid out for a kernel, once for every version of them."""

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

MAX_KEPT = 16  # layouts of one weight: a CPU packs for every size of image


class Packed(NamedTuple):
    """Packed weight, and what it was made from."""

    tensor: Tensor
    version: tuple[int, int]  # of the weight: changes in place, address
    ready: torch.cuda.Event | None
    stream: torch.cuda.Stream | None


class ByMemory:
    """Dictionary for each weight, as long as the weight's memory lives.

    A weak reference to the parameter itself would forbid `torch.utils.swap_tensors`, by which
    PyTorch converts, loads and offloads weights.
    """

    def __init__(self):
        self._places: WeakKeyDictionary[torch.UntypedStorage, dict] = WeakKeyDictionary()

    def __getitem__(self, weight: Tensor) -> dict:
        """Return the dictionary of this weight, a new one at first."""
        place = (weight.storage_offset(), weight.dtype, weight.shape, weight.stride())
        return self._places.setdefault(weight.untyped_storage(), {}).setdefault(place, {})

    def __contains__(self, weight: Tensor) -> bool:
        return weight.untyped_storage() in self._places

    def __len__(self) -> int:
        """Number of memories."""
        return len(self._places)


class PackedWeights:
    """`pack(weight, *options)`, remembered for frozen weights as long as their memory lives.

    A weight that changes in place (load_state_dict, an optimiser) is packed again in the next call
    outside of CUDA graphs, to the same address: graphs that hold this address replay with the old
    weights until then, and with the new weights after. Changes through `.data`, which autograd does
    not count, are not seen. While a weight is packed again, no graph that reads it may replay on
    another stream: a frame could see half of the old and half of the new weights. A weight that
    requires a gradient is packed in every call, because it is about to change and sharding changes
    it uncounted; so is a weight made in inference mode, which has no version. The `MAX_KEPT` newest
    layouts of a weight are kept.

    Capture a CUDA graph after a call outside of it: what a capture has to pack itself belongs to
    the graph and is packed in every replay.
    """

    def __init__(self, pack: Callable[..., Tensor]):
        self._pack = pack
        self._packed = ByMemory()

    def __call__(self, weight: Tensor, *options) -> Tensor:
        if weight.requires_grad or weight.is_inference():  # neither has a version to go by
            return self._pack(weight, *options)
        of_weight = self._packed[weight]
        version = (weight._version, weight.data_ptr())
        before = of_weight.get(options)
        capturing = weight.is_cuda and is_capturing(weight.device)
        if before is None or before.version != version:
            # A tensor of inference mode could not be written to outside of it
            with torch.inference_mode(False), torch.no_grad():
                tensor = self._pack(weight, *options)
            if capturing:
                return tensor
            if before is not None and like(tensor, before.tensor):
                tensor = before.tensor.copy_(tensor)
            before = Packed(tensor, version, *mark(tensor))
            of_weight.pop(options, None)
            of_weight[options] = before
            if len(of_weight) > MAX_KEPT:
                of_weight.pop(next(iter(of_weight)))
        elif before.ready is not None and not capturing:  # a capture begins with all work done
            stream = torch.cuda.current_stream(weight.device)
            if stream != before.stream:
                stream.wait_event(before.ready)
        return before.tensor


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is captured on the device's current stream: PyTorch asks the
    current device, which need not be the weight's."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def like(a: Tensor, b: Tensor) -> bool:
    """Return whether a can be copied into the memory of b."""
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def mark(tensor: Tensor) -> tuple:
    """Return an event after the work on `tensor` so far, for other streams to wait for, and its
    stream; None on a CPU."""
    if not tensor.is_cuda:
        return None, None
    stream = torch.cuda.current_stream(tensor.device)
    return stream.record_event(), stream
