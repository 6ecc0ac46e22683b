"""Many ranks equal one in losses, gradients, streams and updates, under FSDP2 and Ulysses."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from aapt.model.discriminator import Discriminator
from aapt.model.ulysses import Ulysses
from aapt.model.world_model import WorldModel
from aapt.runs.parallel import Parallel
from aapt.streaming.student import StudentRollout
from aapt.training.forcing import parallel_pass
from aapt.training.optimization import MovingAverage, MuonAdamW, frozen, update

from ..helpers import CONFIG, WAN, tiny_model, wan_transformer
from . import ranks

BATCH, FRAMES, SIZE = 4, 3, (2, 6)  # 3 tokens a frame: 5 + 4 on two ranks, 1 + 1 + 1 + 0 on four
PROMPTS = ["ab", "abcdefgh", "", "a"]


def model(**changes) -> WorldModel:
    return tiny_model(
        width=64, heads=4, window_frames=1, sink_distance="clamped", residual_head=True, **changes
    )


class Clips:
    """A rank's clips of an update, sliced from the tensors that a single rank would draw."""

    def __init__(self, parallel: Parallel):
        share = parallel.clips(BATCH)
        self.share = slice(share.start, share.stop)
        self.random = torch.Generator().manual_seed(1)
        self.prompts = PROMPTS[self.share]

    def __call__(self, *shape: int) -> Tensor:
        everyone = torch.randn(BATCH, *shape, generator=self.random, dtype=torch.float64)
        return everyone[self.share]

    def latents(self, frames: int = FRAMES) -> Tensor:
        return self(CONFIG.latent_channels, frames, *SIZE)

    def condition(self) -> Tensor:
        return self(CONFIG.condition_channels, FRAMES, *SIZE)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def together(parallel: Parallel, mine: Tensor) -> Tensor:
    """Join the results that all ranks have for their clips."""
    return torch.cat(parallel.collect(mine)[:: parallel.context.size])


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    """The whole gradients, with zeros for a parameter without a gradient."""
    return {
        f"{index}.{name}": torch.zeros(p.shape) if p.grad is None else whole(p.grad).clone()
        for index, module in enumerate(modules)
        for name, p in module.named_parameters()
    }


def diffusion(parallel: Parallel, checkpointing: bool) -> dict[str, Tensor]:
    """One teacher-forced pass."""
    net, clips = model(), Clips(parallel)
    parallel.shard(net)
    net.transformer.checkpoint_blocks = checkpointing
    x, recycled, condition = clips.latents(), clips.latents(), clips.condition()
    text = net.text_encoder(clips.prompts)
    output = net.transformer(x, recycled, condition, *text, clips().sigmoid())
    loss = (output - x).square().mean()
    loss.backward()
    mean = parallel.mean({"loss": loss.item()})
    return {"loss": torch.tensor(mean["loss"]), **gradients(net)}


def half_precision(parallel: Parallel) -> dict[str, Tensor]:
    """Blocks gathered in bfloat16, as on GPUs, compute nearly what autocast of float32 does.

    Gradients and parameters stay float32.
    """
    losses = []
    for dtype in (None, torch.bfloat16):
        net, clips = model().float(), Clips(parallel)
        dataclasses.replace(parallel, gather_dtype=dtype).shard(net)
        x = clips.latents().float()
        with torch.autocast("cpu", torch.bfloat16):
            given = (clips.condition().float(), *net.text_encoder(clips.prompts))
            output = net.transformer(x, x, *given, clips().sigmoid().float())
        loss = (output.float() - x).square().mean()
        loss.backward()
        losses.append(parallel.mean({"loss": loss.item()})["loss"])
        grads = [p.grad for p in net.parameters()]
        assert {g.dtype for g in grads} == {p.dtype for p in net.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and math.isfinite(losses[1])
    return {}


def adversarial(parallel: Parallel, checkpointing: bool) -> dict[str, Tensor]:
    """Two segments with gradients of both networks, an update, and a rollout with new weights."""
    net, clips = model(), Clips(parallel)
    discriminator = Discriminator(model()).double()
    parallel.shard(net, keep_gathered=True)
    parallel.shard(discriminator)
    for transformer in (net.transformer, discriminator.backbone):
        transformer.checkpoint_blocks = checkpointing
    learning = [p for p in discriminator.parameters() if p.requires_grad]
    optimizers = [torch.optim.RMSprop(p, alpha=0.9) for p in (list(net.parameters()), learning)]
    average = MovingAverage(net, 0.5)
    result, first = {}, clips.latents(1)
    with torch.no_grad():
        rollout = StudentRollout(net.transformer, *net.text_encoder(clips.prompts), first)
    for segment_index in range(2):
        previous, condition = rollout.last, clips.condition()
        segment = rollout.roll(clips.latents(), condition)
        result |= {f"output {segment_index}": together(parallel, segment.output)}
        fake = parallel_pass(net.transformer, segment, *net.text_encoder(clips.prompts))
        torch.testing.assert_close(fake, segment.output)
        real, t = clips.latents(), clips().sigmoid()

        def logits(x: Tensor, condition=condition, previous=previous, t=t) -> Tensor:
            before = torch.cat([previous, x[:, :, :-1]], dim=2)
            return discriminator(
                x, before, condition, *discriminator.world.text_encoder(clips.prompts), t
            )

        shaken = real + 0.1 * clips.latents()
        on_real, on_fake = logits(real), logits(fake.detach())
        penalty = (on_real - logits(shaken)).square().mean()
        (nn.functional.softplus(on_fake - on_real).mean() + 10 * penalty).backward()
        with frozen(discriminator):
            nn.functional.softplus(on_real.detach() - logits(fake)).mean().backward()
    result |= gradients(net, discriminator)
    norms = [
        update(optimizer, 1e-3, parameters, max_norm=0.1)
        for optimizer, parameters in zip(optimizers, (net.parameters(), learning), strict=True)
    ]
    average.update(net)
    average.copy_to(net)
    segment = rollout.roll(clips.latents(), clips.condition())
    return {
        **result,
        "norms": torch.tensor(norms),
        "after": together(parallel, segment.output),
        **{name: tensor.clone() for name, tensor in parallel.gather(net).items()},
    }


def updates(parallel: Parallel) -> dict[str, Tensor]:
    """Three updates, with gradients clipped, and their average."""
    net = model()
    parallel.shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    average = MovingAverage(net, 0.9, from_scratch=True)
    clips, norms = Clips(parallel), []
    for _ in range(3):
        x = clips.latents()
        text = net.text_encoder(clips.prompts)
        output = net.transformer(x, clips.latents(), clips.condition(), *text, clips().sigmoid())
        output.square().mean().backward()
        norms.append(update(optimizer, 1e-2, net.parameters(), max_norm=1.0))
        average.update(net)
    trained = {name: whole(p.detach()).clone() for name, p in net.named_parameters()}
    average.copy_to(net)
    averaged = {f"average {name}": whole(p.detach()) for name, p in net.named_parameters()}
    return {"norms": torch.tensor(norms), **trained, **averaged}


def muon_sees_whole_matrices(parallel: Parallel) -> dict[str, Tensor]:
    """Its half precision allows a few percent; orthogonalised shards would differ far more."""
    net, alone = model(), model()
    parallel.shard(net)
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        q.grad = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(7))
        mesh = getattr(p, "device_mesh", None)
        p.grad = q.grad.clone() if mesh is None else distribute_tensor(q.grad, mesh, p.placements)
    before = {name: q.detach().clone() for name, q in alone.named_parameters()}
    for each in (net, alone):
        update(MuonAdamW(each, (0.9, 0.95), 0.1), 1e-2, each.parameters(), max_norm=None)
    for (name, q), p in zip(alone.named_parameters(), net.parameters(), strict=True):
        moved = (q - before[name]).norm()
        assert (whole(p.detach()) - q).norm() < 0.08 * moved, name
    return {}


def refuses_what_is_not_finite(parallel: Parallel) -> dict[str, Tensor]:
    """If one rank's shard holds a NaN, every rank raises and no parameter has moved."""
    layer = nn.Linear(8, 8)
    parallel.shard(layer)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 8)).sum().backward()
    if parallel.rank == parallel.world - 1:
        getattr(layer.weight.grad, "_local_tensor", layer.weight.grad)[-1] = torch.nan
    before = whole(layer.weight.detach()).clone()
    with pytest.raises(RuntimeError, match="non-finite"):
        update(optimizer, 0.1, layer.parameters(), None)
    assert torch.equal(whole(layer.weight.detach()), before) and not optimizer.state
    return {}


def wan(parallel: Parallel) -> dict[str, Tensor]:
    """A Wan-type generator: student forcing in two segments, whose norm over all heads crosses the
    ranks that share a clip."""
    changes = dict(width=64, heads=4, window_frames=1, sink_frames=1, recycle=True)
    torch.manual_seed(0)
    net, clips = WorldModel(dataclasses.replace(WAN, **changes), None), Clips(parallel)
    net.transformer = wan_transformer(sink_distance="clamped", **changes)
    net.double()
    parallel.shard(net, keep_gathered=True)
    with torch.no_grad():
        text = net.text_encoder(clips.prompts)
        rollout = StudentRollout(net.transformer, *text, clips.latents(1))
    result = {}
    for index in range(2):
        segment = rollout.roll(clips.latents(), None)
        fake = parallel_pass(net.transformer, segment, *net.text_encoder(clips.prompts))
        torch.testing.assert_close(fake, segment.output)
        fake.square().mean().backward()
        result[f"output {index}"] = together(parallel, segment.output)
    return {**result, **gradients(net)}


def stream(parallel: Parallel) -> dict[str, Tensor]:
    """Every rank has all parameters and a part of a frame's tokens, beyond the window."""
    net, clips = model(), Clips(parallel)
    parallel.share_tokens(net)
    with torch.inference_mode():
        text = net.text_encoder(clips.prompts)
        rollout = StudentRollout(net.transformer, *text, clips.latents(1))
        outputs = [rollout.roll(clips.latents(), clips.condition()).output for _ in range(2)]
    assert rollout.cache.k.shape[3] == 4 // parallel.context.size
    return {"output": together(parallel, torch.cat(outputs, dim=2))}


def exchanges(parallel: Parallel) -> dict[str, Tensor]:
    """Every exchange of tokens and heads, and its inverse, in the types that training uses."""
    context, heads = parallel.context, 2 * parallel.context.size
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.arange(2 * 7 * 3 * heads * 2).view(2, 7, 3, heads, 2).to(dtype)
        shard = context.shard(x)
        assert shard.shape[1] == context.lengths(7)[context.rank]
        mine = context.to_heads(shard, 7)
        assert torch.equal(mine, context.own_heads(x))
        assert torch.equal(context.to_tokens(mine[:, :, 0]), shard[:, :, 0])
        assert torch.equal(context.all_heads(mine[:, :, 0]), x[:, :, 0])
        assert torch.equal(context.gather(shard, 7), x)
    return {}


SCENARIOS = {
    "diffusion": (diffusion, False),
    "diffusion, checkpointed": (diffusion, True),
    "adversarial": (adversarial, True),
    "updates": (updates,),
    "Muon": (muon_sees_whole_matrices,),
    "not finite": (refuses_what_is_not_finite,),
    "half precision": (half_precision,),
    "stream": (stream,),
    "wan": (wan,),
    "exchanges": (exchanges,),
}
GROUPS = {
    2: {
        1: ["diffusion", "Muon", "half precision", "wan"],
        2: ["adversarial", "stream", "exchanges", "wan"],
    },
    4: {
        1: ["updates", "not finite"],
        2: ["diffusion, checkpointed"],
        4: ["adversarial", "exchanges"],
    },
}


def on_a_rank(contexts: dict[int, list[str]]) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Run scenarios one after another in one process group. The main rank returns results."""
    results = {}
    for context, names in contexts.items():
        parallel = Parallel.from_environment(context)
        for name in names:
            scenario, *arguments = SCENARIOS[name]
            results[context, name] = scenario(parallel, *arguments)
    return {
        key: {name: tensor.numpy() for name, tensor in result.items()}
        for key, result in results.items()
        if parallel.main
    }


@pytest.fixture(scope="module")
def alone():
    """The results of one rank."""
    torch.manual_seed(0)
    return {
        name: scenario(Parallel.single(), *arguments)
        for name, (scenario, *arguments) in SCENARIOS.items()
    }


@pytest.mark.parametrize("world", GROUPS)
def test_many_ranks_equal_one(world, alone):
    results, *silent = ranks.run(world, on_a_rank, GROUPS[world])
    assert set(results) == {(c, name) for c, names in GROUPS[world].items() for name in names}
    assert silent == [{}] * (world - 1)
    for (context, scenario), result in results.items():
        expected = alone[scenario]
        assert list(result) == list(expected)
        for name, value in result.items():
            message = f"{world} ranks, context {context}, {scenario}: {name}: "
            value, wanted = torch.from_numpy(value), expected[name]
            torch.testing.assert_close(
                value, wanted, rtol=1e-9, atol=1e-10, msg=lambda text, m=message: m + text
            )


def test_shares_of_tokens_differ_by_at_most_one():
    eight = Ulysses()
    eight.size = 8
    assert eight.lengths(1196) == [150] * 4 + [149] * 4
    assert eight.lengths(3600) == [450] * 8
    assert eight.lengths(3) == [1, 1, 1, 0, 0, 0, 0, 0]


def test_clips_are_shared_by_groups():
    pair = Ulysses()
    pair.size = 2
    shares = [Parallel(rank=rank, world=6, context=pair).clips(9) for rank in range(6)]
    assert shares == [range(3), range(3), range(3, 6), range(3, 6), range(6, 9), range(6, 9)]
    with pytest.raises(ValueError, match=r"batch: expected a multiple of 3 \(6 ranks, 2 .*, got 8"):
        Parallel(world=6, context=pair).clips(8)


def test_heads_must_be_shared_evenly():
    three = Ulysses()
    three.size = 3
    with pytest.raises(ValueError, match="context: expected a divisor of the model's 4 heads, got"):
        Parallel(world=3, context=three).shard(model())


def test_context_must_divide_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="context: expected a divisor of the 6 ranks, got 4"):
        Parallel.from_environment(4)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="context: expected a divisor of the 1 ranks, got 2"):
        Parallel.from_environment(2)
    assert Parallel.from_environment().world == 1


def test_frozen_lets_gradients_through():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    layer.bias.requires_grad_(False)
    with frozen(layer):
        layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    assert [p.requires_grad for p in layer.parameters()] == [True, False]
