"""Counts of the plan against counted bytes, measured activations and published arithmetic."""

import dataclasses
import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from aapt.commands.app import main
from aapt.model.config import ModelConfig
from aapt.model.discriminator import Discriminator
from aapt.model.low_rank import LoRA, adapt
from aapt.model.mmdit import MMDiT
from aapt.model.presets import aapt_8b
from aapt.model.wan import WanTransformer
from aapt.model.world_model import TRANSFORMERS, WorldModel
from aapt.runs import plan
from aapt.training.curriculum import constant
from aapt.training.optimization import Schedule
from aapt.training.recipes import paper_8b, paper_8b_640, tiny_world, wan_1_3b_matched
from aapt.training.savings import with_switches
from aapt.training.stages.diffusion_adaptation import DiffusionAdaptation, DiffusionConfig
from aapt.training.stages.distribution_matching import (
    DistributionMatching,
    DistributionMatchingConfig,
)
from aapt_kernels import FrameLayout

from ..helpers import CONFIG, SIZE, WAN, clips, draws, tiny_model
from .counting import adversarial_stage


def stages():
    config = DiffusionConfig(
        constant("clips", frames=3, batch=2, steps=1), Schedule(1e-3), muon=True, average=0.9
    )
    yield DiffusionAdaptation(config, tiny_model().float())
    yield adversarial_stage()
    yield adversarial_stage(state_bits=8)
    adapted = tiny_model().float()
    adapt(adapted, LoRA(2))
    config = dataclasses.replace(config, muon=False, lora=LoRA(2), state_bits=8)
    yield DiffusionAdaptation(config, adapted)
    yield matching(critic_updates=1)


def matching(**changes) -> DistributionMatching:
    config = DistributionMatchingConfig("clips", 1, 2, 3, Schedule(1e-3), Schedule(1e-3), **changes)
    return DistributionMatching(config, *(tiny_model().float() for _ in range(3)))


@pytest.mark.parametrize("stage", list(stages()), ids=lambda stage: type(stage).__name__)
def test_bytes_of_states_are_counted(stage):
    """Gradients, optimizer states and averages, without the counters of steps."""
    stage.accumulate({"clips": clips()}, draws(2), 0)
    parts = list(stage.trained.values())
    gradients = sum(p.grad.nbytes for part in parts for p in part.parameters if p.grad is not None)
    stage.update(0)
    counted = {"gradients": gradients, "optimizer": 0, "averages": 0}
    for part in parts:
        for optimizer in getattr(part.optimizer, "optimizers", [part.optimizer]):
            for state in optimizer.state.values():
                counted["optimizer"] += sum(x.nbytes for k, x in state.items() if k != "step")
        if part.average:
            counted["averages"] += sum(x.nbytes for x in part.average.shadow.values())
    assert plan.trained_bytes(parts, gpus=1) == counted


def test_shards_are_rows():
    assert plan.sharded(torch.Size([10, 3]), 4) == 9
    assert plan.sharded(torch.Size([3]), 8) == 1
    eight = sum(plan.sharded(shape, 8) for shape in plan.shapes(tiny_model()))
    assert eight == pytest.approx(sum(p.numel() for p in tiny_model().parameters()) / 8, rel=0.05)


WIDE = {"width": 128, "head_dim": 64, "rope_axes": (24, 20, 20), "condition_channels": 0}
FAMILIES = {
    "mmdit": dataclasses.replace(CONFIG, **WIDE),
    "wan": dataclasses.replace(CONFIG, **WIDE, block="wan", mlp_width=320),
}


def saved_bytes(config: ModelConfig, checkpointed: bool) -> int:
    """Distinct memory that a forward pass of two clips keeps, parameters aside."""
    model = TRANSFORMERS[config.block](config)
    model.blocks.bfloat16()
    model.checkpoint_blocks = checkpointed
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    x, text = torch.randn(2, 4, 6, 8, 12), torch.randn(2, CONFIG.text_tokens, CONFIG.text_width)
    with saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model(x, x, None, text, torch.tensor([5, 6]), torch.rand(2))
    storages = {pointer: x.untyped_storage().nbytes() for pointer, x in kept.items()}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_activations_are_counted(family, checkpointed):
    """Four blocks, within 3 %, because modulations and log-sum-exps are left out.

    Residuals are bfloat16 here, as gathered parameters are.
    """
    two, four, six = (dataclasses.replace(FAMILIES[family], depth=depth) for depth in (2, 4, 6))
    tokens = 6 * 4 * 6
    expected = 4 * plan.block_bytes(four, tokens, norm=plan.HALF)
    if checkpointed:
        expected = plan.activation_bytes(four, tokens, checkpointed=True)
    measured = saved_bytes(six, checkpointed) - saved_bytes(two, checkpointed)
    assert measured == pytest.approx(2 * expected, rel=0.03)


def test_operations_of_products_are_counted():
    model = tiny_model().float()
    x, text = torch.randn(1, 4, 3, *SIZE), torch.randn(1, CONFIG.text_tokens, CONFIG.text_width)
    condition = torch.randn(1, CONFIG.condition_channels, 3, *SIZE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.transformer(x, x, condition, text, torch.tensor([6]), torch.rand(1))
    assert plan.product_flops(model, 3 * 6, CONFIG.text_tokens) == counter.get_total_flops()


def test_operations_of_wan_are_counted():
    model = WorldModel(WAN, None)
    x, text = torch.randn(1, 4, 3, *SIZE), torch.randn(1, WAN.text_tokens, WAN.text_width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.transformer(x, None, None, text, torch.tensor([6]), torch.rand(1))
    assert plan.product_flops(model, 3 * 6, WAN.text_tokens) == counter.get_total_flops()


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 1, 2, 7])
def test_operations_of_wan_attention_follow_the_mask(start, sink):
    frames, tokens, window = 5, 3, WAN.window_frames
    config = dataclasses.replace(WAN, sink_frames=sink)
    layout = FrameLayout(0, tokens, start + frames, window, sink_frames=sink)
    pairs = int(layout.dense_mask()[start * tokens :].sum())
    expected = 4 * config.depth * config.width * (pairs + frames * tokens * config.text_tokens)
    assert plan.attention_flops(config, (1, 3), frames, start) == expected


@pytest.mark.parametrize("start", [0, 1, 2, 7])
def test_operations_of_attention_follow_the_mask(start):
    frames = 5
    config = dataclasses.replace(CONFIG, grid_windows=((2, 1, 3),))
    for grid, tokens, window in (((1, 3), 3, CONFIG.window_frames), ((2, 1), 2, 3)):
        past = min(start - 1, window) if start else None
        layout = FrameLayout(config.text_tokens, tokens, frames, window, past_frames=past)
        pairs = int(layout.dense_mask().sum())
        expected = 4 * config.depth * config.width * pairs
        assert plan.attention_flops(config, grid, frames, start) == expected


def test_published_arithmetic():
    """One frame far into a stream, and the cache at 736x416, as in docs/method.md#14."""
    config, wide, large = aapt_8b(), (26, 46), (45, 80)
    with torch.device("meta"):
        blocks = MMDiT(config).blocks
    assert plan.product_flops(blocks, 1196, 0) == pytest.approx(9.8e12, rel=0.01)
    assert plan.product_flops(blocks, 3600, 0) == pytest.approx(29.4e12, rel=0.01)
    assert plan.attention_flops(config, wide, 1, 100) == pytest.approx(20.5e12, rel=0.01)
    assert plan.attention_flops(config, large, 1, 100) == pytest.approx(98.3e12, rel=0.01)
    assert plan.cache_bytes(config, wide, 1, continued=False) == pytest.approx(17e9, rel=0.02)


@pytest.mark.parametrize("size", [SIZE, (4, 4)])
def test_bytes_of_caches_are_counted(size):
    config = dataclasses.replace(CONFIG, grid_windows=((2, 2, 5),))
    cache = MMDiT(config).new_cache(1, size, dtype=torch.bfloat16)
    expected = cache.k.nbytes + cache.v.nbytes
    assert plan.cache_bytes(config, config.token_grid(*size), 1, continued=False) == expected


@pytest.mark.parametrize("sink", [0, 1, 3])
def test_bytes_of_wan_caches_are_counted(sink):
    config = dataclasses.replace(WAN, sink_frames=sink)
    cache = WanTransformer(config).new_cache(1, SIZE, dtype=torch.bfloat16)
    expected = cache.k.nbytes + cache.v.nbytes + cache.words.nbytes
    grid = config.token_grid(*SIZE)
    assert plan.cache_bytes(config, grid, 1, continued=False) == expected
    prefix = 2 * plan.HALF * config.depth * config.width * 6 * (sink + config.window_frames)
    assert plan.cache_bytes(config, grid, 1, continued=True) == expected + prefix


def test_plan_of_a_wan_recipe():
    """The tiny world's stages with a Wan-type generator."""
    recipe = tiny_world()
    model = dataclasses.replace(recipe.model, block="wan", mlp_width=None)
    plans = plan.plan(dataclasses.replace(recipe, model=model), 2)
    joint = plan.plan(recipe, 2)
    assert [each.workload for each in plans] == [each.workload for each in joint]
    for ours, theirs in zip(plans, joint, strict=True):
        assert ours.at_once >= 1 and 0.5 < ours.flops / theirs.flops < 1.5


def test_plan_of_the_paper():
    eight = {each.workload.name: each for each in plan.plan(paper_8b_640(), 8)}
    many = {each.workload.name: each for each in plan.plan(paper_8b_640(), 256)}
    assert eight["diffusion 1/3"].tokens == many["diffusion 1/3"].tokens == 256 * 30 * 1196
    assert eight["diffusion 2/3"].workload.size == (90, 160)
    assert eight["diffusion 2/3"].flops == pytest.approx(1.56e18, rel=0.01)
    assert eight["extension"].workload.total_frames == 19 * 6
    assert eight["extension-5"].tokens == 64 * 55 * 6 * 880
    assert eight["consistency"].memory["parameters"] == pytest.approx(
        2 * eight["diffusion 1/3"].memory["parameters"]
    )
    for each in (*eight.values(), *many.values()):
        assert each.at_once >= 1 and each.total < 0.9 * plan.H100.memory
        assert each.clips * each.gpus == each.workload.batch * each.context
    for name, each in many.items():
        assert each.memory["optimizer"] == pytest.approx(eight[name].memory["optimizer"] / 32, 0.01)
        assert each.seconds() == pytest.approx(eight[name].seconds() / 32)


def test_stage_three_at_1280x720_needs_more_than_eight_gpus():
    names = {"adversarial", "extension", "extension-5"}
    eight, sixteen = (plan.plan(paper_8b(), gpus) for gpus in (8, 16))
    assert {each.workload.stage for each in eight if not each.at_once} == names
    assert all(each.at_once for each in sixteen)
    for each in sixteen:
        if each.workload.stage in names:
            assert each.workload.size == (90, 160) and each.workload.frames == 5 * 6


def test_phases_of_a_stage_share_a_command():
    """Groups of a stage have the size that its largest phase needs."""
    for gpus in (8, 256):
        contexts = {}
        for each in plan.plan(paper_8b(), gpus):
            contexts.setdefault(each.workload.stage, set()).add(each.context)
        assert all(len(found) == 1 for found in contexts.values())


@pytest.mark.parametrize("gpus, launched", [(8, "--nproc-per-node 8"), (12, "--nproc-per-node 6")])
def test_commands_are_the_plan(gpus, launched):
    """Every stage occurs once, with the options that its plan assumes."""
    recipe = paper_8b_640()
    batches = {
        name: dataclasses.replace(stage, batch=96)
        for name, stage in recipe.stages.items()
        if hasattr(stage, "batch")
    }
    recipe = dataclasses.replace(recipe, stages=batches)
    plans = plan.plan(recipe, gpus)
    said = []
    for line in plan.commands(recipe, plans):
        program, *words = line.split()
        assert program == "torchrun" and launched in line and "--checkpoint-blocks" in words
        assert ("--nnodes 2" in line) == (gpus == 12)
        options = dict(zip(words, words[1:]))
        stages = [after for word, after in zip(words, words[1:]) if word == "--stage"]
        said += stages
        for each in plans:
            if each.workload.stage in stages or not stages:
                assert int(options.get("--context", 1)) == each.context
                assert int(options.get("--clips-at-once", each.clips)) <= each.at_once
    assert said in ([], list(recipe.stages))


def test_a_stage_that_cannot_fit_has_no_command():
    (line,) = plan.commands(paper_8b(), plan.plan(paper_8b(), 1))
    assert line.endswith("extension-5: not even one clip fits")


def test_more_gpus_per_clip_hold_less_of_it():
    one, four = (plan.plan(paper_8b(), 8, context)[0] for context in (1, 4))
    assert four.memory["activations"] / four.at_once == pytest.approx(
        one.memory["activations"] / one.at_once / 4, rel=0.05
    )
    assert four.clips == 4 * one.clips


def test_mismatched_motion_is_a_fifth_copy_of_clips():
    """The discriminator learns from five copies instead of four, in 4 passes each.

    For the generator it processes one copy in 3 passes.
    """
    recipe = tiny_world()
    extension = recipe.stages["extension"]
    discriminator = Discriminator(WorldModel(recipe.model, recipe.camera))
    plans = []
    for mismatch in (0.0, 1.0):
        changed = dataclasses.replace(extension, mismatch=mismatch)
        stages = {**recipe.stages, "extension": changed}
        made = plan.plan(dataclasses.replace(recipe, stages=stages), 1)
        plans.append(next(each for each in made if each.workload.name == "extension"))
    four, five = plans
    forward = plan.forward_flops(discriminator, recipe.model, four.workload.size, 8, 0)
    more = extension.batch * extension.segments * 4 * forward
    assert five.flops - four.flops == pytest.approx(more)
    assert five.memory["activations"] > four.memory["activations"]


@pytest.mark.parametrize("guidance, scores", [(1.0, 2), (4.0, 3)])
def test_passes_of_distribution_matching_are_counted(guidance, scores):
    """In three updates: three rollouts, four passes of the critic and one turn of the generator."""
    stage = matching(critic_updates=3, guidance=guidance)
    calls, networks = [], (stage.model, stage.critic, stage.teacher)
    for network in networks:
        network.transformer.register_forward_hook(
            lambda *_: calls.append(torch.is_grad_enabled()), always_call=True
        )
    for step in range(3):
        stage.accumulate({"clips": clips()}, draws(2, step=step), step)
    assert calls.count(True) == 3 + 1 and calls.count(False) == scores
    passes = 3 + 4 * calls.count(True) + calls.count(False)  # and 4 with checkpointed blocks
    load = plan.Workload("matching", "", SIZE, 3, 2, 3, rolled=True)
    forward = plan.forward_flops(stage.model, stage.model.config, SIZE, 3, 0)
    flops = plan.clip_flops(stage.model.config, stage, load)
    assert flops == pytest.approx(passes / 3 * forward)


def test_distribution_matching_holds_three_networks():
    """The updates of the critic count; the teacher has no gradient."""
    plans = {each.workload.name: each for each in plan.plan(wan_1_3b_matched(), 8)}
    diffusion, matching = plans["diffusion"], plans["matching"]
    assert matching.workload.steps == 5 * 200
    for name, networks in {"parameters": 3, "gradients": 2, "optimizer": 2}.items():
        assert matching.memory[name] == pytest.approx(networks * diffusion.memory[name]), name
    assert matching.memory["averages"] == diffusion.memory["gradients"]
    assert matching.memory["cache"] > 0 and matching.at_once


def test_a_lead_costs_one_pass_per_segment():
    """A lead is planned at its longest. The discriminator sees nothing of it."""
    recipe = tiny_world()
    plans = []
    for lead in (0, 3):
        changed = dataclasses.replace(recipe.stages["extension"], segments=1, lead_segments=lead)
        stages = {**recipe.stages, "extension": changed}
        made = plan.plan(dataclasses.replace(recipe, stages=stages), 1)
        plans.append(next(each for each in made if each.workload.name == "extension"))
    alone, led = plans
    model = WorldModel(recipe.model, recipe.camera)
    size, batch = alone.workload.size, alone.workload.batch

    def forward(start: int) -> float:
        return plan.forward_flops(model, recipe.model, size, 8, start)

    # The last segment has a longer past, in five passes.
    more = sum(map(forward, (0, 8, 16))) + 5 * (forward(24) - forward(0))
    assert led.flops - alone.flops == pytest.approx(batch * more)
    assert led.workload.total_frames == 4 * 8
    assert led.memory["cache"] > alone.memory["cache"]


def test_numbers_that_cannot_be_planned_are_refused():
    with pytest.raises(ValueError, match="context: expected one of 1, 2, 4, 8, which divide the 8"):
        plan.plan(paper_8b(), 8, context=3)
    with pytest.raises(ValueError, match="gpus: expected a number whose groups of 1 share the 256"):
        plan.plan(paper_8b(), 7)
    with pytest.raises(ValueError, match="gpus: expected at least 1, got 0"):
        plan.plan(tiny_world(), 0)
    with pytest.raises(ValueError, match="plan: expected encoded clips in a set .* got foxes"):
        plan.latent_size(paper_8b(), "foxes")


def by_stage(recipe, *switches: str) -> dict[str, plan.Plan]:
    """Plans of the tiny world's stages with one phase, on one GPU."""
    plans = plan.plan(with_switches(recipe, switches), 1)
    return {each.workload.name: each for each in plans}


def test_switches_save_what_they_say():
    """Also arithmetic: a frozen weight has no gradient, and a frozen trunk runs forward alone."""
    recipe = tiny_world()
    plain, extension = by_stage(recipe)["extension"], recipe.stages["extension"]
    coded = by_stage(recipe, "eight-bit")["extension"]
    assert coded.memory["optimizer"] == pytest.approx(plain.memory["optimizer"] / 4, rel=0.1)
    assert coded.flops == plain.flops
    adapted = by_stage(recipe, "lora=4")["extension"]
    learnt = "gradients", "optimizer", "averages"
    world = WorldModel(recipe.model, recipe.camera)
    numbers = sum(p.numel() for p in world.parameters())
    discriminator = Discriminator(world)
    other = sum(p.numel() for p in discriminator.parameters() if p.requires_grad)
    assert plain.memory["gradients"] == 4 * (numbers + other)
    for name, rest in zip(learnt, (4 * other, 4 * other, 0)):
        assert rest < adapted.memory[name] < rest + 0.15 * 4 * numbers
    forward = plan.forward_flops(discriminator, recipe.model, plain.workload.size, 8, 0)
    frozen = by_stage(recipe, "frozen-trunk")["extension"]
    passes = extension.batch * extension.segments * forward
    assert plain.flops - frozen.flops == pytest.approx(3 * extension.copies * passes)
    heads = sum(p.numel() for p in discriminator.parameters()) - numbers
    assert frozen.memory["gradients"] == 4 * (numbers + heads)
    assert frozen.memory["activations"] < 0.75 * plain.memory["activations"]
    half = by_stage(recipe, "discriminator-lora=4")["extension"]
    saved = extension.copies * passes  # one of four passes, less the adaptation's own
    assert 0.5 * saved < plain.flops - half.flops < saved


def test_what_is_offloaded_is_in_the_memory_of_the_cpu():
    recipe = tiny_world()
    offloaded = with_switches(recipe, ["offload"])
    for before, after in zip(plan.plan(recipe, 2), plan.plan(offloaded, 2), strict=True):
        shards = [before.memory[n] for n in ("parameters", "gradients", "optimizer", "averages")]
        assert after.offloaded == sum(shards) > 0 and before.offloaded == 0
        assert after.total == pytest.approx(before.total - sum(shards))
        assert after.flops == before.flops
    assert plan.plan(offloaded, 1) == plan.plan(recipe, 1)


def test_days_are_those_of_all_updates():
    recipe = tiny_world()
    for each in plan.plan(recipe, 2):
        config = recipe.stages[each.workload.stage]
        warmup = getattr(config, "discriminator_warmup", 0)
        curriculum = getattr(config, "curriculum", None)
        steps = curriculum.steps if curriculum else config.steps + warmup
        assert each.days() == pytest.approx(steps * each.seconds() / 86_400)
    phases = [p.workload for p in plan.plan(paper_8b(), 8) if p.workload.stage == "diffusion"]
    assert [load.steps for load in phases] == [20_000, 6_000, 4_000]


@pytest.mark.parametrize(
    "bad, message",
    [
        (["half"], "memory: expected some of offload, eight-bit.*, got half"),
        (["eight-bit=4"], "memory: expected some of offload, eight-bit.*, got eight-bit=4"),
        (["lora=x"], "memory: expected a rank such as lora=64, got lora=x"),
        (["lora=0"], "rank: expected at least 1, got 0"),
        (["frozen-trunk", "frozen-trunk"], "expected a switch that tiny-world lacks, got frozen-t"),
        (
            ["frozen-trunk", "discriminator-lora"],
            "discriminator_lora: expected None",
        ),
    ],
)
def test_bad_switches_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        with_switches(tiny_world(), bad)


def test_switches_reach_the_stages_that_have_them():
    recipe = with_switches(tiny_world(), ["eight-bit", "lora=8", "frozen-trunk"])
    for config in recipe.stages.values():
        assert config.state_bits == 8
        assert config.lora == (None if getattr(config, "muon", False) else LoRA(8))
        assert getattr(config, "frozen_trunk", True)


def test_what_does_not_fit_is_refused_with_what_does(capsys, monkeypatch):
    """A GPU that holds the tiny world with all switches, and not as it is."""
    whole, frozen = (
        max(each.least for each in plan.plan(with_switches(tiny_world(), names), 1))
        for names in ((), ("eight-bit", "lora", "frozen-trunk"))
    )
    small = dataclasses.replace(plan.H100, memory=(whole + frozen) / 2 / plan.H100.usable)
    monkeypatch.setattr(plan.plan, "__defaults__", (None, small, None))
    assert main(["train", "--plan", "tiny-world", "--gpus", "1"]) == 2
    out, error = capsys.readouterr()
    assert "too much" in out and "not even one clip fits" in out
    assert error.startswith("aapt: gpus: expected memory for one clip of ")
    assert "got 1 H100; takes --memory " in error
    assert main(["train", "--plan", "tiny-world", "--gpus", "1", "--memory", "eight-bit"]) in (0, 2)
    assert "-m aapt train tiny-world --memory=eight-bit" in capsys.readouterr().out


def test_command_prints_a_table(capsys):
    assert main(["train", "--plan", "tiny-world", "--gpus", "2", "--gpus", "1"]) == 0
    out = capsys.readouterr().out
    assert "tiny-world on 2 H100" in out and "tiny-world on 1 H100" in out
    rows = {line[:30].strip(): line[30:].split() for line in out.splitlines()}
    batch = math.prod((8, 10, 40))
    assert rows["tokens per update"][:2] == [f"{batch / 1e6:.2f}", "M"]
    assert "torchrun --nproc-per-node 2 -m aapt train tiny-world --checkpoint-blocks\n" in out
    assert float(rows["GiB per GPU: total *"][0]) > 0
    assert rows["updates"][:2] == ["3000", "60"] and float(rows["days *"][0]) > 0
    (days,) = [
        line for line in out.split("tiny-world on 1")[0].splitlines() if "days in all" in line
    ]
    assert len(days.split()) == 3 + 7  # as it is, five switches, three of them together
    assert main(["train", "--plan", "tiny-world", "--gpus", "16"]) == 2
    assert "gpus: expected a number whose groups" in capsys.readouterr().err
