"""Many ranks as one: clips on the data axis, a clip's tokens on the context axis, parameters over
all ranks (FSDP2). SPEC 11.

    torchrun --nproc-per-node 8 ...          one process per GPU

    parallel = Parallel.from_environment(context=2)
    model = WorldModel(...).to(parallel.device)     # the same weights on every rank
    parallel.shard(model, keep_gathered=True)       # before optimizers and averages are made
    clips = parallel.clips(batch)                   # this rank's share of an update
    ... forward, backward, update as on one rank ...
    metrics = parallel.mean(metrics)

A loss is the mean over its rank's clips; gradients are averaged over all ranks (`ulysses.py` says
why that is right for ranks that share clips). So everything equals what one rank computes from all
clips, up to the order of sums.
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
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from ..model.layers import Block
from ..model.transformer import VideoTransformer
from ..model.ulysses import Ulysses

# What is called besides `forward`; parameters must be gathered for these too.
CALLED = {
    VideoTransformer: ("features", "encode_text", "step"),
    Block: ("encode_text", "step"),
}


@dataclass(frozen=True)
class Parallel:
    """The ranks of a run: `world` of them, every `context.size` consecutive ones share clips.

    gather_dtype: what blocks compute in; bfloat16 halves the traffic and memory of gathered
    parameters, None keeps their own type, in which many ranks equal one. Gradients are reduced in
    float32 or better and parameters stay what they are.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    context: Ulysses = Ulysses()
    mesh: DeviceMesh | None = None  # every rank; None for a single one
    gather_dtype: torch.dtype | None = None

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "Parallel":
        return cls(device=torch.device(device))

    @classmethod
    def from_environment(cls, context: int = 1) -> "Parallel":
        """What torchrun says, else a single rank; NCCL where there is CUDA, gloo elsewhere.

        ValueError unless `context` divides the number of ranks.
        """
        cuda = torch.cuda.is_available()
        world = int(os.environ.get("WORLD_SIZE", 1))
        if context < 1 or world % context:
            raise ValueError(f"context: expected a divisor of the {world} ranks, got {context}")
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
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def clips(self, batch: int) -> range:
        """This rank's share of an update's clips; ranks of one context group have the same.

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
        """Split every transformer in `model` over the context group, for training or streaming.

        ValueError unless its heads can be shared evenly.
        """
        for module in model.modules():
            if isinstance(module, VideoTransformer) and module.config.heads % self.context.size:
                raise ValueError(
                    f"context: expected a divisor of the model's {module.config.heads} heads, "
                    f"got {self.context.size}"
                )
        for module in model.modules():
            if isinstance(getattr(module, "context", None), Ulysses):
                module.context = self.context

    def shard(self, model: nn.Module, keep_gathered: bool = False) -> None:
        """Shard a model's parameters over all ranks, and its tokens over the context group.

        Blocks, and what is around them, are gathered when they run and given up after (ZeRO-3), or
        with `keep_gathered` kept until the backward pass has used them (ZeRO-2): a rollout runs
        every block at every frame. Parameters become DTensors: load weights and copy models
        before, make optimizers and averages after.
        """
        self.share_tokens(model)
        if self.mesh is None:
            return
        for network in networks(model):
            for block in [module for module in network.modules() if isinstance(module, Block)]:
                self._shard(block, keep_gathered, self.gather_dtype)
            # What is around the blocks is small, and the logits among it need precision (SPEC 8).
            self._shard(network, keep_gathered, None)

    def _shard(self, module: nn.Module, keep_gathered: bool, dtype: torch.dtype | None) -> None:
        methods = CALLED.get(type(module), ())
        # It warns of outputs that are views, which must not be changed in place; none is.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        policy = MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32 if dtype else None,
            cast_forward_inputs=False,
        )
        fully_shard(
            module, mesh=self.mesh, reshard_after_forward=not keep_gathered, mp_policy=policy
        )
        module.set_force_sum_reduction_for_comms(self.device.type == "cpu")  # gloo has no mean
        for method in methods:
            register_fsdp_forward_method(module, method)

    def reshard(self, model: nn.Module) -> None:
        """Give up parameters that a rollout has left gathered."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gather(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole state of a model on the main rank's CPU, to export it; nothing elsewhere. Every
        rank must call it."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(model, options=whole)

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """The mean over all ranks; every rank has the same names in the same order."""
        if self.mesh is None:
            return metrics
        values = torch.tensor(list(metrics.values()), dtype=torch.float64)
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.world).tolist(), strict=True))

    def agree(self, value):
        """The main rank's `value` on every rank: anything that pickles."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def collect(self, value) -> list:
        """Every rank's `value` on every rank, in order: anything that pickles."""
        if self.mesh is None:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every rank is here.

        The last thing a process does together with others: gloo's threads may still hold tensors
        of what came before, and let go of them only while there is an interpreter to ask. One that
        ends at once after another collective sometimes aborts.
        """
        if self.mesh is not None:
            dist.barrier()

    def close(self) -> None:
        if self.mesh is not None:
            dist.destroy_process_group()


def networks(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of a model that are called on their own: transformers, and otherwise the outermost
    modules that hold parameters themselves."""
    if isinstance(model, VideoTransformer) or list(model.parameters(recurse=False)):
        yield model
    else:
        for child in model.children():
            yield from networks(child)
