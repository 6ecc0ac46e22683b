"""A module that calls the operators, sharded by FSDP2 over two ranks, checkpointed and compiled in
one graph, has the gradients that one rank has alone."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from aapt_kernels import FrameLayout, block_causal_attention, qk_norm_rope

from ..aapt.runs import ranks

LAYOUT = FrameLayout(text_tokens=3, tokens_per_frame=5, frames=4, window_frames=2)
BATCH, HEADS, HEAD_DIM = 4, 2, 8
WIDTH = HEADS * HEAD_DIM


class Block(nn.Module):
    """Self-attention with normed and rotated queries and keys, and a residual."""

    def __init__(self, checkpointed: bool):
        super().__init__()
        self.checkpointed = checkpointed
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q_weight, self.k_weight = (nn.Parameter(torch.rand(HEAD_DIM)) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.attend, x, cos, sin, use_reentrant=False)
        return self.attend(x, cos, sin)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        q, k = qk_norm_rope(q, k, self.q_weight, self.k_weight, cos, sin)
        return x + self.out(block_causal_attention(q, k, v, LAYOUT).flatten(2))


def gradients(checkpointed: bool, compiled: bool) -> dict[str, Tensor]:
    """Return whole gradients of the mean over all clips, and the output of this rank's clips."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block(checkpointed) for _ in range(2))).double()
    x = torch.randn(BATCH, LAYOUT.query_length, WIDTH, dtype=torch.float64)
    angles = torch.rand(LAYOUT.query_length, HEAD_DIM // 2, dtype=torch.float64)
    graphs = CompileCounterWithBackend("aot_eager")
    for block in blocks:
        if compiled:
            block.compile(fullgraph=True, backend=graphs)
    if dist.is_initialized():
        for block in blocks:
            fully_shard(block).set_force_sum_reduction_for_comms(True)  # gloo has no mean
        x = x.chunk(dist.get_world_size())[dist.get_rank()]
    for block in blocks:
        x = block(x, angles.cos(), angles.sin())
    x.square().mean().backward()
    assert (graphs.frame_count > 0) == compiled
    whole = {
        name: p.grad.full_tensor() if dist.is_initialized() else p.grad
        for name, p in blocks.named_parameters()
    }
    return {"output": x.detach(), **whole}


CASES = [(False, False), (True, False), (False, True), (True, True)]


def on_a_rank() -> list[dict[str, Tensor]]:
    dist.init_process_group("gloo")
    return [{name: tensor.numpy() for name, tensor in gradients(*case).items()} for case in CASES]


def test_two_ranks_have_the_gradients_of_one():
    alone = gradients(False, False)
    results = ranks.run(2, on_a_rank)
    for rank, result in enumerate(results):
        for case, actual in zip(CASES, result, strict=True):
            assert list(actual) == list(alone)
            for name, expected in alone.items():
                if name == "output":
                    expected = expected.chunk(2)[rank]
                torch.testing.assert_close(
                    torch.from_numpy(actual[name]),
                    expected,
                    rtol=1e-10,
                    atol=1e-12,
                    msg=lambda m, case=case, name=name: f"{name}, {case}: {m}",
                )
