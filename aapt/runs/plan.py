"""Memory, tokens and arithmetic that a recipe needs on a number of GPUs, before any is rented.

Parameters, gradients, optimizer states, averages, caches and tokens are counted. Gathered
parameters, activations and seconds are estimates. The tensors that a block saves are counted from
its operations; tensors that exist only while it runs are taken as half of them.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.config import ModelConfig
from ..model.discriminator import TAP_FRACTIONS, Discriminator
from ..model.low_rank import LoRA, adapt
from ..model.transformer import VideoTransformer
from ..model.world_model import WorldModel
from ..training.eight_bit import BLOCK, EightBitOptimizer
from ..training.optimization import MuonAdamW, Trained
from ..training.recipe import Recipe, StageConfig
from ..training.stages import Stage
from ..training.stages.adversarial import Adversarial, AdversarialConfig
from ..training.stages.consistency_distillation import ConsistencyConfig
from ..training.stages.diffusion_adaptation import DiffusionConfig
from ..training.stages.distribution_matching import (
    DistributionMatching,
    DistributionMatchingConfig,
)
from .build_stage import build_stage, restrict

GIB = 2**30
PER_CLIP = ("cache", "activations")  # memory that grows with the clips of a pass
NODE = 8  # GPUs of a machine
FLOAT, HALF = 4, 2  # bytes: parameters, gradients and states; gathered blocks, activations
STATES = {torch.optim.AdamW: 2, torch.optim.RMSprop: 1, torch.optim.Muon: 1}  # per parameter
TRANSIENT = 1.5  # memory of a running block with its gradients, relative to its saved tensors


@dataclass(frozen=True)
class GPU:
    """A kind of GPU.

    Attributes:
        memory: In bytes.
        flops: Dense bfloat16 operations per second.
        usable: Fraction of the memory that the allocator, NCCL and CUDA leave; a guess.
        sustained: Fraction of `flops` that training reaches; a guess.
    """

    name: str
    memory: float
    flops: float
    usable: float = 0.9
    sustained: float = 0.4


H100 = GPU("H100", memory=80 * GIB, flops=989e12)


@dataclass(frozen=True)
class Workload:
    """The longest update of one phase of a stage.

    Attributes:
        phase: Such as "1/3"; empty if the stage has one phase.
        size: Latent height and width.
        frames: Frames per segment.
        batch: Clips per update.
        steps: Updates of the phase; warm-up of the discriminator included.
        segments: Segments per clip that the networks learn from.
        overlap: Frames at the start of a later segment that are known from the segment before.
        lead: Segments that are only rolled out, before the others.
        rolled: True if the generator rolls the frames out before it learns from them.
    """

    stage: str
    phase: str
    size: tuple[int, int]
    frames: int
    batch: int
    steps: int
    segments: int = 1
    overlap: int = 0
    lead: int = 0
    rolled: bool = False

    @property
    def name(self) -> str:
        return f"{self.stage} {self.phase}".rstrip()

    @property
    def total_frames(self) -> int:
        """New frames per clip."""
        return sum(new for _, new in self.places())

    def places(self) -> Iterator[tuple[int, int]]:
        """The place of the first new frame of each segment, and the number of new frames."""
        later = self.frames - self.overlap
        yield 0, self.frames
        for index in range(1, self.lead + self.segments):
            yield self.frames + (index - 1) * later, later


@dataclass(frozen=True)
class Plan:
    """A workload on GPUs.

    Attributes:
        gpus: Number of GPUs.
        context: GPUs per clip, which form a context group.
        clips: Clips of a context group per update.
        at_once: Clips of a context group per forward pass; 0 if not even one fits.
        memory: Bytes per GPU, by purpose, with `at_once` clips, or with one if none fits.
        offloaded: Bytes per GPU in the memory of the CPU.
        saved: Bytes of activations per GPU without checkpointing.
        tokens: Video tokens per update, on all GPUs.
        flops: Operations per update, on all GPUs.
    """

    workload: Workload
    gpus: int
    context: int
    clips: int
    at_once: int
    memory: dict[str, float]
    offloaded: float
    saved: float
    tokens: int
    flops: float

    @property
    def total(self) -> float:
        """Bytes per GPU."""
        return sum(self.memory.values())

    def seconds(self, gpu: GPU = H100) -> float:
        """Estimated seconds per update."""
        return self.flops / (self.gpus * gpu.flops * gpu.sustained)

    def days(self, gpu: GPU = H100) -> float:
        """Estimated days of the phase's updates, sheets of samples and states on disk aside."""
        return self.workload.steps * self.seconds(gpu) / 86_400

    @property
    def least(self) -> float:
        """Bytes per GPU with one clip at once."""
        clips = sum(self.memory[name] for name in PER_CLIP)
        return self.total - clips + clips / max(1, self.at_once)


def plan(
    recipe: Recipe,
    gpus: int,
    context: int | Mapping[str, int] | None = None,
    gpu: GPU = H100,
    stages: Mapping[str, Stage] | None = None,
) -> list[Plan]:
    """Plan every phase of every stage.

    The phases of a stage share a command, and therefore the size of their context groups. It is the
    smallest in which all of them fit, unless `context` is given. ValueError unless `context`
    divides the GPUs and the model's heads, and the groups share every batch evenly.

    Args:
        context: Of all stages, or by stage.
        stages: Those of `meta_stages`; made here unless they are given.
    """
    if gpus < 1:
        raise ValueError(f"gpus: expected at least 1, got {gpus}")
    common = math.gcd(gpus, recipe.model.heads)
    possible = [size for size in range(1, common + 1) if common % size == 0]
    plans, stages = [], stages or meta_stages(recipe)
    for name, config in recipe.stages.items():
        given = context[name] if isinstance(context, Mapping) else context
        if given is not None and given not in possible:
            raise ValueError(
                f"context: expected one of {', '.join(map(str, possible))}, which divide the "
                f"{gpus} GPUs and the model's {recipe.model.heads} heads, got {given}"
            )
        contexts = possible if given is None else [given]
        stage, loads = stages[name], list(workloads(recipe, name, config))
        fixed, offloaded = fixed_bytes(stage, gpus, rolled=loads[0].rolled)
        flops = [load.batch * clip_flops(recipe.model, stage, load) for load in loads]
        work = list(zip(loads, flops, strict=True))
        attempts = [
            [_plan(recipe.model, stage, *each, fixed, offloaded, gpus, size, gpu) for each in work]
            for size in contexts
        ]
        shared = [attempt for attempt in attempts if all(attempt)]
        if not shared:
            batches = " and ".join(str(load.batch) for load in loads)
            raise ValueError(
                f"gpus: expected a number whose groups of {' or '.join(map(str, contexts))} "
                f"share the {batches} clips of {name} evenly, got {gpus}"
            )
        plans += next((each for each in shared if all(p.at_once for p in each)), shared[-1])
    return plans


def commands(recipe: Recipe, plans: Sequence[Plan], words: str | None = None) -> Iterator[str]:
    """Command lines that train as planned, without the options for inputs.

    Consecutive stages with the same options share a command. words: what names the recipe in them;
    its name unless given.
    """
    gpus = plans[0].gpus
    each = max(size for size in range(1, NODE + 1) if gpus % size == 0)
    machines = f"--nnodes {gpus // each} --rdzv-backend c10d --rdzv-endpoint HOST "
    machines = machines * (gpus > each) + f"--nproc-per-node {each}"
    run = f"torchrun {machines} -m aapt train {words or recipe.name}"
    for given, same in itertools.groupby(recipe.stages, lambda stage: options(stage, plans)):
        group = list(same)
        stages = "".join(f" --stage {stage}" for stage in group)
        if given is None:
            yield f"{', '.join(group)}: not even one clip fits"
        else:
            yield f"{run}{stages * (len(group) < len(recipe.stages))} {given}"


def options(stage: str, plans: Iterable[Plan]) -> str | None:
    """Options of the command line that the plan of a stage assumes; None if it cannot fit."""
    phases = [plan for plan in plans if plan.workload.stage == stage]
    at_once, context = min(plan.at_once for plan in phases), phases[0].context
    given = "--checkpoint-blocks"
    if context > 1:
        given += f" --context {context}"
    if at_once < max(plan.clips for plan in phases):
        given += f" --clips-at-once {at_once}"
    return given if at_once else None


def meta_stages(recipe: Recipe) -> dict[str, Stage]:
    """Build every stage on the meta device, where tensors take no memory."""
    return {name: meta_stage(recipe, name) for name in recipe.stages}


def meta_stage(recipe: Recipe, name: str) -> Stage:
    """Build a stage on the meta device. ValueError names the stage whose numbers do not fit."""
    try:
        with torch.device("meta"):
            return build_stage(recipe.stages[name], MetaNetworks(recipe))
    except ValueError as error:
        raise ValueError(f"stages.{name}.{error}") from None


@dataclass(frozen=True)
class MetaNetworks:
    """Makes networks of the recipe's shape, without their weights."""

    recipe: Recipe

    def network(
        self,
        config: StageConfig,
        start: str | None,
        lora: LoRA | None = None,
        rolls_out: bool = False,
    ) -> WorldModel:
        model = WorldModel(self.recipe.model, self.recipe.camera)
        if lora:
            adapt(model, lora)
        return model

    def discriminator(self, config: AdversarialConfig) -> Discriminator:
        world = self.network(config, config.discriminator_start)
        discriminator = Discriminator(world, config.judgement, config.pooling)
        restrict(discriminator, config)
        return discriminator

    def pixel_deviation(self) -> Tensor:
        return torch.ones(self.recipe.model.latent_channels)


def workloads(recipe: Recipe, name: str, config: StageConfig) -> Iterator[Workload]:
    """The phases of a stage, each with the source that has the most tokens."""
    if isinstance(config, (DiffusionConfig, ConsistencyConfig)):
        phases = config.curriculum.phases
        for index, phase in enumerate(phases, 1):
            sources = [(latent_size(recipe, s.clips), s.frames) for s in phase.sources]
            size, frames = max(sources, key=lambda source: math.prod(source[0]) * source[1])
            label = f"{index}/{len(phases)}" if len(phases) > 1 else ""
            yield Workload(name, label, size, frames, phase.batch, phase.steps)
    elif isinstance(config, DistributionMatchingConfig):
        place = latent_size(recipe, config.clips), config.segment_frames
        updates = config.steps * config.critic_updates
        yield Workload(name, "", *place, config.batch, updates, rolled=True)
    else:
        if isinstance(config, AdversarialConfig):
            sources = [(latent_size(recipe, s.clips), s.frames) for s in config.sources]
        else:
            sources = [(latent_size(recipe, config.clips), config.segment_frames)]
        yield Workload(
            name,
            "",
            *max(sources, key=lambda source: math.prod(source[0]) * source[1]),
            config.batch,
            config.steps + getattr(config, "discriminator_warmup", 0),
            config.segments,
            getattr(config, "overlap_frames", 0),
            getattr(config, "lead_segments", 0),
            rolled=getattr(config, "forcing", "student") == "student",
        )


def latent_size(recipe: Recipe, clips: str) -> tuple[int, int]:
    """Height and width of a set's latents. A set of encoded clips is named WIDTHxHEIGHT."""
    if clips in recipe.data:
        data, factor = recipe.data[clips], recipe.vae.space_factor
        return data.height // factor, data.width // factor
    named = re.fullmatch(r"(\d+)x(\d+)", clips)
    if not named:
        raise ValueError(
            f"plan: expected encoded clips in a set named by its size, such as 640x352, got {clips}"
        )
    width, height = int(named[1]), int(named[2])
    return height // recipe.space_factor, width // recipe.space_factor


def fixed_bytes(stage: Stage, gpus: int, rolled: bool) -> tuple[dict[str, float], float]:
    """Bytes per GPU, by purpose, that do not depend on the clips, and those on the CPU.

    Only shards are offloaded: one GPU alone holds all (`Parallel.shard`).
    """
    networks = [part.module for part in stage.trained.values()]
    frozen = [stage.teacher] if hasattr(stage, "teacher") else []
    kept = rolled or any(isinstance(network, Discriminator) for network in networks)
    shards = {
        "parameters": FLOAT * sum(sharded(p, gpus) for n in networks + frozen for p in shapes(n)),
        **trained_bytes(stage.trained.values(), gpus),
    }
    gathered = {"gathered": gathered_bytes(networks + frozen, gpus, kept)}
    if stage.config.offload and gpus > 1:
        return dict.fromkeys(shards, 0.0) | gathered, sum(shards.values())
    return shards | gathered, 0.0


def _plan(
    config: ModelConfig,
    stage: Stage,
    load: Workload,
    flops: float,
    fixed: dict[str, float],
    offloaded: float,
    gpus: int,
    context: int,
    gpu: GPU,
) -> Plan | None:
    """Plan one workload; None if the groups cannot share its batch evenly."""
    groups = gpus // context
    if load.batch % groups:
        return None
    adversarial = isinstance(stage, Adversarial)
    rows, columns = config.token_grid(*load.size)
    local = math.ceil(load.frames * rows * columns / context)

    def activations(checkpointed: bool) -> float:
        """Bytes per clip. The generator's activations stay while the discriminator runs."""
        bytes_ = activation_bytes(config, local, checkpointed)
        running = TRANSIENT * block_bytes(config, local) * checkpointed
        if not adversarial:
            return bytes_ + running
        copies = stage.config.copies
        tapped = tapped_bytes(config, local)
        tapped *= 2 if stage.config.judgement == "both" else 1  # heads of frames, of the clip
        if not stage.config.frozen_trunk:
            return bytes_ + copies * (bytes_ + tapped + running)
        # The trunk saves tensors for the generator's gradient alone, in a pass over one copy.
        heads = copies * (tapped + block_bytes(config, local))
        return bytes_ + max(heads, bytes_ + tapped + running)

    each = {"cache": 0.0, "activations": activations(checkpointed=True)}
    if load.rolled:
        each["cache"] = cache_bytes(config, (rows, columns), context, load.lead + load.segments > 1)
    clips = load.batch // groups
    room = gpu.usable * gpu.memory - sum(fixed.values())
    at_once = max(0, min(clips, math.floor(room / sum(each.values()))))
    memory = fixed | {name: max(1, at_once) * bytes_ for name, bytes_ in each.items()}
    return Plan(
        load,
        gpus,
        context,
        clips,
        at_once,
        memory,
        offloaded,
        max(1, at_once) * activations(checkpointed=False),
        load.batch * load.total_frames * rows * columns,
        flops,
    )


def shapes(module: nn.Module, trained: bool = False) -> list[torch.Size]:
    """Shapes of all parameters, or of the trained ones."""
    return [p.shape for p in module.parameters() if p.requires_grad or not trained]


def sharded(shape: torch.Size, gpus: int) -> int:
    """Numbers of a parameter on the GPU with the largest shard. Its rows are split over GPUs."""
    return math.ceil(shape[0] / gpus) * math.prod(shape[1:])


def trained_bytes(trained: Iterable[Trained], gpus: int) -> dict[str, int]:
    """Gradients, optimizer states and averages on one GPU."""
    total = {"gradients": 0, "optimizer": 0, "averages": 0}
    for part in trained:
        learning = [sharded(shape, gpus) for shape in shapes(part.module, trained=True)]
        total["gradients"] += FLOAT * sum(learning)
        muon = isinstance(part.optimizer, MuonAdamW)
        for optimizer in part.optimizer.optimizers if muon else [part.optimizer]:
            parameters = [p.shape for group in optimizer.param_groups for p in group["params"]]
            total["optimizer"] += sum(state_bytes(optimizer, s, gpus) for s in parameters)
        if part.average:
            total["averages"] += FLOAT * sum(learning)
    return total


def state_bytes(optimizer: torch.optim.Optimizer, shape: torch.Size, gpus: int) -> int:
    """Bytes of the moments of a parameter on one GPU."""
    if not isinstance(optimizer, EightBitOptimizer):
        return STATES[type(optimizer)] * FLOAT * sharded(shape, gpus)
    moments, numbers = len(optimizer.MOMENTS), sharded(shape, gpus)
    if len(shape) < 2:
        return moments * FLOAT * numbers
    scales = math.ceil(shape[0] / gpus) * math.ceil(math.prod(shape[1:]) / BLOCK)
    return moments * (numbers + FLOAT * scales)


def gathered_bytes(networks: list[nn.Module], gpus: int, kept: bool) -> float:
    """Bytes of whole parameters while they are used, and of gradients before they are reduced.

    Two blocks of each network are gathered, the running one and the next, or all blocks of the
    generator if they are `kept`. Gradients are whole for one block at a time.
    """
    if gpus == 1:
        return HALF * max(sum(math.prod(s) for s in shapes(network)) for network in networks)
    total = reduced = 0.0
    for index, network in enumerate(networks):
        (transformer,) = (m for m in network.modules() if isinstance(m, VideoTransformer))
        blocks = [sum(math.prod(s) for s in shapes(block)) for block in transformer.blocks]
        around = sum(math.prod(s) for s in shapes(network)) - sum(blocks)
        total += HALF * (sum(blocks) if kept and index == 0 else 2 * max(blocks)) + FLOAT * around
        learning = (shapes(block, trained=True) for block in transformer.blocks)
        reduced = max(reduced, *(sum(map(math.prod, block)) for block in learning))
    return total + (HALF + FLOAT) * reduced


def block_bytes(config: ModelConfig, tokens: int, norm: int = FLOAT) -> float:
    """Bytes that a block saves for its backward pass, for `tokens` video tokens and the text.

    Per token and unit of width, in bfloat16: results of both norms (2), q, k, v before rotation (3)
    and after it, with the result of attention (4), the result of attention in rows (1), additions
    of both residual branches (2), the MLP before and after its activation (2 hidden / width).

    Wan's block joins no text to the frames, so v and the rows are views (minus 2). Its
    cross-attention adds per video token a norm, q in float32 before and after its own norm, the
    normed q (1) and the result of attention (1); per text token k and v (2), k in float32 before
    and after its norm, and the normed k (1).

    Args:
        norm: Bytes per number in the input of a norm: float32 if modulation is.
    """
    numbers = 2 + 3 + 4 + 1 + 2 + 2 * config.mlp_hidden / config.width
    if config.block == "wan":
        per_video = HALF * (numbers + 1) + norm * 3 + FLOAT * 2
        per_text = HALF * 3 + FLOAT * 2
        return config.width * (per_video * tokens + per_text * config.text_tokens)
    return (HALF * numbers + norm * 2) * config.width * (tokens + config.text_tokens)


def activation_bytes(config: ModelConfig, tokens: int, checkpointed: bool) -> float:
    """Bytes that a clip's forward pass saves: all that blocks save, or their inputs alone, of which
    the text of Wan's blocks is one tensor for all."""
    if checkpointed:
        text = config.text_tokens if config.block == "mmdit" else 0
        return HALF * config.depth * config.width * (tokens + text)
    return config.depth * block_bytes(config, tokens)


def tapped_bytes(config: ModelConfig, tokens: int) -> float:
    """Bytes that logit heads save: the input of a norm in float32, its result, keys and values."""
    return len(TAP_FRACTIONS) * (FLOAT + HALF + 2 * HALF) * config.width * tokens


def cache_bytes(config: ModelConfig, grid: tuple[int, int], context: int, continued: bool) -> float:
    """Bytes of a clip's KV cache (docs/method.md#5).

    A segment that continues another one also holds a copy of the cached frames.
    """
    window, sink = config.window(grid), config.sink_frames
    frames = sink + window + 1 + (sink + window if continued else 0)
    text = config.text_tokens * (context if config.block == "wan" else 1)  # whole on every GPU
    tokens = text + frames * math.prod(grid)
    return 2 * HALF * config.depth * config.width / context * tokens


def clip_flops(config: ModelConfig, stage, load: Workload) -> float:
    """Operations of an update per clip.

    A backward pass costs twice the forward pass, and checkpointed blocks run forward once more. A
    network whose weights are frozen costs half of a backward pass: all of an adapted network, and a
    discriminator that only passes gradients on. A frozen trunk runs forward alone for its heads.
    Updates of distribution matching are a mean over those with the generator and those without.
    """
    generator, *others = (part.module for part in stage.trained.values())
    forward_and_back = 2 + (1 if stage.config.lora else 2)
    if isinstance(stage, DistributionMatching):
        forward = forward_flops(generator, config, load.size, load.frames, 0)
        scores = 2 if stage.config.guidance == 1 else 3  # critic's, teacher's, without the prompt
        rest = (forward_and_back + scores) / stage.config.critic_updates
        return (load.rolled + forward_and_back + rest) * forward
    total = 0.0
    for index, (start, new) in enumerate(load.places()):
        forward = forward_flops(generator, config, load.size, new, start)
        if index < load.lead:
            total += forward
            continue
        passes = forward_and_back + load.rolled
        if hasattr(stage, "teacher"):
            passes += 2  # the teacher, and the student without gradient
        total += passes * forward
        for discriminator in others:
            each = 3 if stage.config.discriminator_lora else 4
            passes = (1 if stage.config.frozen_trunk else each) * stage.config.copies + 3
            total += passes * forward_flops(discriminator, config, load.size, load.frames, 0)
    return total


def forward_flops(
    network: nn.Module, config: ModelConfig, size: tuple[int, int], frames: int, start: int
) -> float:
    """Operations of a clip's forward pass of the frames from `start` to `start + frames` - 1."""
    rows, columns = config.token_grid(*size)
    attention = attention_flops(config, (rows, columns), frames, start)
    return product_flops(network, frames * rows * columns, config.text_tokens) + attention


def product_flops(network: nn.Module, tokens: int, text: int) -> float:
    """Operations of products with weights, for `tokens` video tokens and `text` text tokens."""
    once, of_text, of_video = products(network)
    return 2 * (once + text * of_text + tokens * of_video)


@functools.lru_cache(maxsize=8)
def products(network: nn.Module) -> tuple[int, int, int]:
    """Numbers of the matrices that run once per clip, for each text token, for each video token.

    A layer for text has "text" in its name, one that runs once per clip "modulation" or "time".
    """
    once = of_text = of_video = 0
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        numbers = sum(p.numel() for p in layer.parameters(recurse=False) if p.dim() > 1)
        if "modulation" in name or ".time." in name or name == "logit":
            once += numbers
        elif "text" in name:
            of_text += numbers
        else:
            of_video += numbers
    return once, of_text, of_video


def attention_flops(config: ModelConfig, grid: tuple[int, int], frames: int, start: int) -> float:
    """Operations of attention over exactly the tokens that the mask shows (docs/method.md#3), in
    chunks of one frame; in Wan's block the text attends to nothing."""
    text, tokens, window = config.text_tokens, math.prod(grid), config.window(grid)
    sink = config.sink_frames
    shown = sum(min(sink, i - window) if i > window else 0 for i in range(start, start + frames))
    shown += sum(min(i, window) + 1 for i in range(start, start + frames))
    pairs = tokens * (frames * text + tokens * shown)
    pairs += text * text if config.block == "mmdit" else 0
    return 4 * config.depth * config.width * pairs
