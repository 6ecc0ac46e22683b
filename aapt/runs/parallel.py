"""Training on several ranks, with the result of one rank (docs/method.md#11).

Clips are split over groups of ranks, the tokens of a clip over the ranks of its group (Ulysses),
and parameters over all ranks (FSDP2).

    torchrun --nproc-per-node 8 ...          one process per GPU

    parallel = Parallel.from_environment(context=2)
    model = WorldModel(...).to(parallel.device)     # the same weights on every rank
    parallel.shard(model, keep_gathered=True)       # before optimizers and averages are made
    clips = parallel.clips(batch)                   # this rank's share of an update
    ... forward, backward, update as on one rank ...
    metrics = parallel.mean(metrics)

A loss is the mean over its rank's clips, and gradients are averaged over all ranks.
`model/ulysses.py` says why this is right for ranks that share clips. All results therefore equal
the results of one rank on all clips, up to the order of sums.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from ..model.transformer import VideoTransformer, share_tokens
from ..model.ulysses import Ulysses

# Methods called besides `forward`, for which parameters must be gathered too.
CALLED_ON_BLOCKS = ("encode_text", "step_modulation", "step")
CALLED_ON_TRANSFORMERS = ("features", "encode_text", "step_constants", "step")


@dataclass(frozen=True)
class Parallel:
    """The ranks of a run.

    Attributes:
        rank: Number of this rank.
        world: Number of ranks. Every `context.size` consecutive ranks share clips.
        gather_dtype: Type of gathered parameters, in which blocks compute. bfloat16 halves their
            traffic and memory; with None, their own type, many ranks equal one. Gradients are
            reduced in float32 or better, and stored parameters keep their type.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    context: Ulysses = Ulysses()
    mesh: DeviceMesh | None = None  # every rank; None for a single one
    gather_dtype: torch.dtype | None = None

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "Parallel":
        """Make a run of a single rank."""
        return cls(device=torch.device(device))

    @classmethod
    def from_environment(cls, context: int = 1) -> "Parallel":
        """Read the ranks from torchrun's environment; without it, make a single rank.

        Ranks communicate over NCCL if CUDA is available, over gloo otherwise. ValueError unless
        `context`, the ranks per clip, divides the number of ranks.
        """
        cuda = torch.cuda.is_available()
        world = int(os.environ.get("WORLD_SIZE", 1))
        if context < 1 or world % context:
            raise ValueError(
                f"context: expected a divisor of the {world} ranks, got {context}; start with "
                f"torchrun --nproc-per-node {context}, or a multiple"
            )
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
        if world == 1:
            return cls.single(device)
        if cuda:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            # The other ranks wait while one renders clips or trains the decoder.
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=1))
        return cls(
            rank=dist.get_rank(),
            world=world,
            device=torch.device(device),
            context=Ulysses(dist.new_subgroups(context)[0] if context > 1 else None),
            mesh=init_device_mesh("cuda" if cuda else "cpu", (world,)),
            gather_dtype=torch.bfloat16 if cuda else None,
        )

    @property
    def main(self) -> bool:
        """True on the rank that writes files and reports progress."""
        return self.rank == 0

    def clips(self, batch: int) -> range:
        """Numbers of this rank's clips among the `batch` clips of an update.

        Ranks of one context group have the same clips.

        ValueError unless the groups can share `batch` clips evenly.
        """
        groups = self.world // self.context.size
        if batch % groups:
            raise ValueError(
                f"batch: expected a multiple of {groups} ({self.world} ranks, {self.context.size} "
                f"to a clip), got {batch}"
            )
        share = batch // groups
        start = self.rank // self.context.size * share
        return range(start, start + share)

    def share_tokens(self, model: nn.Module) -> None:
        """Split the tokens of every transformer in `model` over the context group.

        It serves training and streaming. ValueError unless the size of the group divides the heads.
        """
        share_tokens(model, self.context)

    def shard(self, model: nn.Module, keep_gathered: bool = False, offload: bool = False) -> None:
        """Shard a model's parameters over all ranks, and its tokens over the context group.

        Parameters are gathered block by block when they are used, and released afterwards (ZeRO-3).
        With `keep_gathered` they are kept until the backward pass has used them (ZeRO-2), because a
        rollout runs every block at every frame. Parameters become DTensors: load weights and copy
        models before, make optimizers and averages after.

        With `offload` the shards are in the memory of the CPU, in pages that a GPU reads directly,
        and so are gradients, optimizer states and averages made of them. Buffers stay.
        """
        self.share_tokens(model)
        if self.mesh is None:
            return
        pinned = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        place = pinned if offload else OffloadPolicy()
        for network in networks(model):
            called = ()
            if isinstance(network, VideoTransformer):
                called = CALLED_ON_TRANSFORMERS
                for block in network.blocks:
                    self._shard(block, keep_gathered, place, self.gather_dtype, CALLED_ON_BLOCKS)
            # Layers around the blocks are small, and logits need precision (docs/method.md#8).
            self._shard(network, keep_gathered, place, None, called)

    def _shard(
        self,
        module: nn.Module,
        keep_gathered: bool,
        place: OffloadPolicy,
        dtype: torch.dtype | None,
        methods: tuple[str, ...],
    ) -> None:
        # FSDP warns that outputs are views, which must not be changed in place; none is changed.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        precision = MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32 if dtype else None,
            cast_forward_inputs=False,
        )
        fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=not keep_gathered,
            mp_policy=precision,
            offload_policy=place,
        )
        module.set_force_sum_reduction_for_comms(self.device.type == "cpu")  # gloo has no mean
        for method in methods:
            register_fsdp_forward_method(module, method)

    def reshard(self, model: nn.Module) -> None:
        """Release parameters that a rollout has left gathered."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gather(self, model: nn.Module) -> dict[str, Tensor]:
        """Gather the whole state of a model on the main rank's CPU, for export.

        Every rank calls it; on other ranks the result is empty.
        """
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(model, options=whole)

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """Average metrics over all ranks, which have the same names in the same order."""
        if self.mesh is None:
            return metrics
        values = torch.tensor(list(metrics.values()), dtype=torch.float64)
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.world).tolist(), strict=True))

    def agree(self, value):
        """Return the main rank's `value`, anything that pickles, on every rank."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def collect(self, value) -> list:
        """Return every rank's `value`, anything that pickles, in order of ranks."""
        if self.mesh is None:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every rank is here.

        This must be the last collective of a process. Threads of gloo may still hold tensors of
        the collective before, and need a running interpreter to release them. A process that ends
        right after another collective sometimes aborts.
        """
        if self.mesh is not None:
            dist.barrier()

    def close(self) -> None:
        """Leave the group of ranks."""
        if self.mesh is not None:
            dist.destroy_process_group()


def networks(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of a model that are called separately.

    They are its transformers, and the outermost other modules that hold parameters themselves.
    """
    if isinstance(model, VideoTransformer) or list(model.parameters(recurse=False)):
        yield model
    else:
        for child in model.children():
            yield from networks(child)
