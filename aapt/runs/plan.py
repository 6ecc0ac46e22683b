"""What a recipe needs on a number of GPUs: memory, tokens, arithmetic; before any is rented.

Parameters, gradients, optimizer states, averages, caches and tokens are counted. Gathered
parameters, activations and seconds are estimates: what a block saves is counted from its
operations, what lives only while one runs is taken as half of that.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..model.config import ModelConfig
from ..model.discriminator import TAP_FRACTIONS, Discriminator
from ..model.transformer import VideoTransformer
from ..model.world_model import WorldModel
from ..training.optimization import MuonAdamW, Trained
from ..training.recipes import Recipe, StageConfig
from ..training.stages.adversarial import Adversarial, AdversarialConfig
from ..training.stages.consistency_distillation import ConsistencyConfig, ConsistencyDistillation
from ..training.stages.diffusion_adaptation import DiffusionAdaptation, DiffusionConfig
from ..training.stages.rollout_regression import RolloutRegression, RolloutRegressionConfig

GIB = 2**30
NODE = 8  # GPUs of a machine
SPACE_FACTOR = 8  # pixels to a latent pixel, in a recipe whose latents come encoded (SPEC 1)
FLOAT, HALF = 4, 2  # bytes: parameters and what belongs to them; gathered blocks, activations
STATES = {torch.optim.AdamW: 2, torch.optim.RMSprop: 1, torch.optim.Muon: 1}  # per parameter
TRANSIENT = 1.5  # a running block with its gradients, relative to what it saves


@dataclass(frozen=True)
class GPU:
    """`usable`: of its memory, what the allocator, NCCL and CUDA leave; `sustained`: of its rate,
    what training reaches. Both are guesses."""

    name: str
    memory: float  # bytes
    flops: float  # dense bfloat16, per second
    usable: float = 0.9
    sustained: float = 0.4


H100 = GPU("H100", memory=80 * GIB, flops=989e12)


@dataclass(frozen=True)
class Workload:
    """One phase of a stage, at its longest: `batch` clips an update, each of `segments` of `frames`
    latent frames of `size` = (height, width), the first `overlap` of a later one known already.
    `rolled`: the generator makes them before it learns."""

    stage: str
    phase: str  # as "1/3" where the stage has several
    size: tuple[int, int]
    frames: int
    batch: int
    segments: int = 1
    overlap: int = 0
    lead: int = 0  # segments that are only rolled out, before the others
    rolled: bool = False

    @property
    def name(self) -> str:
        return f"{self.stage} {self.phase}".rstrip()

    @property
    def total_frames(self) -> int:
        """New latent frames of a clip."""
        return sum(new for _, new in self.places())

    def places(self) -> Iterator[tuple[int, int]]:
        """Where the new frames of each segment start, and how many there are."""
        later = self.frames - self.overlap
        yield 0, self.frames
        for index in range(1, self.lead + self.segments):
            yield self.frames + (index - 1) * later, later


@dataclass(frozen=True)
class Plan:
    """A workload on GPUs, `context` of them to a clip.

    clips: of each update, those of one context group; at_once: how many of them fit together, 0
    where not even one does. memory: bytes on a GPU, by purpose, with so many (or one). saved:
    what activations would be without checkpointing. tokens: video tokens of an update, on all GPUs
    together; flops: likewise.
    """

    workload: Workload
    gpus: int
    context: int
    clips: int
    at_once: int
    memory: dict[str, float]
    saved: float
    tokens: int
    flops: float

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    def seconds(self, gpu: GPU = H100) -> float:
        """One update, estimated."""
        return self.flops / (self.gpus * gpu.flops * gpu.sustained)


def plan(recipe: Recipe, gpus: int, context: int | None = None, gpu: GPU = H100) -> list[Plan]:
    """Every phase of every stage. The phases of one share a command, and so a context group: the
    smallest in which all of them fit, unless one is given.

    ValueError unless `context` divides the GPUs and the model's heads.
    """
    if gpus < 1:
        raise ValueError(f"gpus: expected at least 1, got {gpus}")
    common = math.gcd(gpus, recipe.model.heads)
    contexts = [size for size in range(1, common + 1) if common % size == 0]
    if context is not None and context not in contexts:
        raise ValueError(
            f"context: expected one of {', '.join(map(str, contexts))}, which divide the {gpus} "
            f"GPUs and the model's {recipe.model.heads} heads, got {context}"
        )
    contexts = contexts if context is None else [context]
    plans = []
    for name, config in recipe.stages.items():
        stage, loads = without_memory(recipe, config), list(workloads(recipe, name, config))
        attempts = [
            [_plan(recipe.model, stage, load, gpus, size, gpu) for load in loads]
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


def commands(recipe: Recipe, plans: Sequence[Plan]) -> Iterator[str]:
    """What trains as planned, less the clips: consecutive stages with the same options in one."""
    gpus = plans[0].gpus
    each = max(size for size in range(1, NODE + 1) if gpus % size == 0)
    machines = f"--nnodes {gpus // each} --rdzv-backend c10d --rdzv-endpoint HOST "
    run = f"torchrun {machines * (gpus > each)}--nproc-per-node {each} -m aapt train {recipe.name}"
    for given, same in itertools.groupby(recipe.stages, lambda stage: options(stage, plans)):
        group = list(same)
        stages = "".join(f" --stage {stage}" for stage in group)
        if given is None:
            yield f"{', '.join(group)}: not even one clip fits"
        else:
            yield f"{run}{stages * (len(group) < len(recipe.stages))} {given}"


def options(stage: str, plans: Iterable[Plan]) -> str | None:
    """How the command line says what the plan of a stage takes for granted; None if it fits not."""
    phases = [plan for plan in plans if plan.workload.stage == stage]
    at_once, context = min(plan.at_once for plan in phases), phases[0].context
    given = "--checkpoint-blocks"
    if context > 1:
        given += f" --context {context}"
    if at_once < max(plan.clips for plan in phases):
        given += f" --clips-at-once {at_once}"
    return given if at_once else None


def without_memory(recipe: Recipe, config: StageConfig):
    """The stage itself, on the meta device."""
    with torch.device("meta"):
        model, other = (WorldModel(recipe.model, recipe.camera) for _ in range(2))
        deviation = torch.ones(recipe.model.latent_channels)
        match config:
            case DiffusionConfig():
                return DiffusionAdaptation(config, model)
            case ConsistencyConfig():
                return ConsistencyDistillation(config, model, other)
            case RolloutRegressionConfig():
                return RolloutRegression(config, model, deviation)
            case AdversarialConfig():
                judge = Discriminator(other, config.judgement, config.pooling)
                return Adversarial(config, model, judge, deviation)


def workloads(recipe: Recipe, name: str, config: StageConfig) -> Iterator[Workload]:
    """The phases of a stage; of a phase's sources, the one with the most tokens."""
    if isinstance(config, (DiffusionConfig, ConsistencyConfig)):
        phases = config.curriculum.phases
        for index, phase in enumerate(phases, 1):
            sources = [(latent_size(recipe, s.clips), s.frames) for s in phase.sources]
            size, frames = max(sources, key=lambda source: math.prod(source[0]) * source[1])
            label = f"{index}/{len(phases)}" if len(phases) > 1 else ""
            yield Workload(name, label, size, frames, phase.batch)
    else:
        yield Workload(
            name,
            "",
            latent_size(recipe, config.clips),
            config.segment_frames,
            config.batch,
            config.segments,
            getattr(config, "overlap_frames", 0),
            getattr(config, "lead_segments", 0),
            rolled=getattr(config, "forcing", "student") == "student",
        )


def latent_size(recipe: Recipe, clips: str) -> tuple[int, int]:
    """Height and width of a set's latents; a set that comes encoded is named WIDTHxHEIGHT."""
    if clips in recipe.data:
        data, factor = recipe.data[clips], recipe.vae.space_factor
        return data.height // factor, data.width // factor
    width, height = map(int, clips.split("x"))
    return height // SPACE_FACTOR, width // SPACE_FACTOR


def _plan(
    config: ModelConfig, stage, load: Workload, gpus: int, context: int, gpu: GPU
) -> Plan | None:
    """None if the groups cannot share the batch evenly."""
    groups = gpus // context
    if load.batch % groups:
        return None
    networks = [part.module for part in stage.trained.values()]
    frozen = [stage.teacher] if hasattr(stage, "teacher") else []
    judged = any(isinstance(network, Discriminator) for network in networks)
    fixed = {
        "parameters": FLOAT * sum(sharded(p, gpus) for n in networks + frozen for p in shapes(n)),
        **trained_bytes(stage.trained.values(), gpus),
        "gathered": gathered_bytes(networks + frozen, gpus, kept=load.rolled or judged),
    }
    rows, columns = config.token_grid(*load.size)
    local = math.ceil(load.frames * rows * columns / context)

    def activations(checkpointed: bool) -> float:
        """Of one clip: the generator's stay while its frames are judged."""
        bytes_ = activation_bytes(config, local, checkpointed)
        running = TRANSIENT * block_bytes(config, local) * checkpointed
        if judged:
            copies = stage.config.copies
            bytes_ += copies * activation_bytes(config, local, checkpointed)
            bytes_ += copies * tapped_bytes(config, local)
            running *= copies
        return bytes_ + running

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
        max(1, at_once) * activations(checkpointed=False),
        load.batch * load.total_frames * rows * columns,
        load.batch * clip_flops(config, stage, load),
    )


def shapes(module: nn.Module, trained: bool = False) -> list[torch.Size]:
    """Of the parameters, or of those that learn."""
    return [p.shape for p in module.parameters() if p.requires_grad or not trained]


def sharded(shape: torch.Size, gpus: int) -> int:
    """Numbers of a parameter on the GPU that has most: its rows are dealt out."""
    return math.ceil(shape[0] / gpus) * math.prod(shape[1:])


def trained_bytes(trained: Iterable[Trained], gpus: int) -> dict[str, int]:
    """Gradients, optimizer states and averages on one GPU."""
    total = {"gradients": 0, "optimizer": 0, "averages": 0}
    for part in trained:
        learning = [sharded(shape, gpus) for shape in shapes(part.module, trained=True)]
        total["gradients"] += FLOAT * sum(learning)
        muon = isinstance(part.optimizer, MuonAdamW)
        for optimizer in part.optimizer.optimizers if muon else [part.optimizer]:
            kept = FLOAT * STATES[type(optimizer)]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            total["optimizer"] += sum(kept * sharded(p.shape, gpus) for p in parameters)
        if part.average:
            total["averages"] += FLOAT * sum(sharded(s, gpus) for s in shapes(part.module))
    return total


def gathered_bytes(networks: list[nn.Module], gpus: int, kept: bool) -> float:
    """Whole parameters while they are used: two blocks of each network (one runs, one comes) and
    the gradients of one before they are reduced; all blocks of the generator if they are kept."""
    if gpus == 1:
        return HALF * max(sum(math.prod(s) for s in shapes(network)) for network in networks)
    total = 0.0
    for index, network in enumerate(networks):
        (transformer,) = (m for m in network.modules() if isinstance(m, VideoTransformer))
        blocks = [sum(math.prod(s) for s in shapes(block)) for block in transformer.blocks]
        around = sum(math.prod(s) for s in shapes(network)) - sum(blocks)
        total += HALF * (sum(blocks) if kept and index == 0 else 2 * max(blocks)) + FLOAT * around
    return total + (HALF + FLOAT) * max(blocks)


def block_bytes(config: ModelConfig, tokens: int, norm: int = FLOAT) -> float:
    """What a block saves for its backward pass, of `tokens` video tokens and the text.

    In bfloat16 numbers per token and unit of width: both norms' results (2), q k v before rotation
    (3) and after, and what attention returns (4), that once more in rows (1), what both residual
    branches add (2), the MLP before and after its activation (2 mlp_ratio). `norm`: bytes of what
    a norm takes and makes, float32 under CUDA's autocast.
    """
    numbers = 2 + 3 + 4 + 1 + 2 + 2 * config.mlp_ratio
    return (HALF * numbers + norm * 4) * config.width * (tokens + config.text_tokens)


def activation_bytes(config: ModelConfig, tokens: int, checkpointed: bool) -> float:
    """What a clip's forward pass leaves: the input of every block, or all that its blocks save."""
    if checkpointed:
        return HALF * config.depth * config.width * (tokens + config.text_tokens)
    return config.depth * block_bytes(config, tokens)


def tapped_bytes(config: ModelConfig, tokens: int) -> float:
    """What the logit heads save: a norm's input in float32, its result, keys and values."""
    return len(TAP_FRACTIONS) * (FLOAT + HALF + 2 * HALF) * config.width * tokens


def cache_bytes(config: ModelConfig, grid: tuple[int, int], context: int, continued: bool) -> float:
    """A clip's KV cache (SPEC 5); a segment that continues another has a copy of its frames."""
    window = config.window(grid)
    frames = window + 2 + (window + 1 if continued else 0)
    tokens = config.text_tokens + frames * math.prod(grid)
    return 2 * HALF * config.depth * config.width / context * tokens


def clip_flops(config: ModelConfig, stage, load: Workload) -> float:
    """An update's arithmetic per clip: backward is twice forward, and a checkpointed block runs
    once more; a discriminator that does not learn passes gradients on at half the backward cost."""
    generator, *others = (part.module for part in stage.trained.values())
    total = 0.0
    for index, (start, new) in enumerate(load.places()):
        forward = forward_flops(generator, config, load.size, new, start)
        if index < load.lead:
            total += forward
            continue
        passes = 4 + load.rolled
        if hasattr(stage, "teacher"):
            passes += 2  # the teacher, and the student without gradient
        total += passes * forward
        for judge in others:
            passes = 4 * stage.config.copies + 3
            total += passes * forward_flops(judge, config, load.size, load.frames, 0)
    return total


def forward_flops(
    network: nn.Module, config: ModelConfig, size: tuple[int, int], frames: int, start: int
) -> float:
    """One clip's forward pass of frames `start` ... `start + frames`."""
    rows, columns = config.token_grid(*size)
    attention = attention_flops(config, (rows, columns), frames, start)
    return product_flops(network, frames * rows * columns, config.text_tokens) + attention


def product_flops(network: nn.Module, tokens: int, text: int) -> float:
    """Products with weights, for so many video and text tokens."""
    total = 0
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            if ".text." in name or name.endswith("text_in"):
                length = text
            elif "modulation" in name or ".time." in name or name == "logit":
                length = 1
            else:
                length = tokens
            total += 2 * length * layer.weight.numel()
    return total


def attention_flops(config: ModelConfig, grid: tuple[int, int], frames: int, start: int) -> float:
    """Attention of frames of `grid` tokens over exactly what the mask shows (SPEC 3)."""
    text, tokens, window = config.text_tokens, math.prod(grid), config.window(grid)
    shown = sum(1 + min(i, window + 1) for i in range(start, start + frames))
    pairs = text * text + tokens * (frames * text + tokens * shown)
    return 4 * config.depth * config.width * pairs


def print_plans(recipe: Recipe, gpus: Iterable[int], context: int | None = None) -> None:
    """For each number of GPUs a table on standard output, a column for each phase of a stage, and
    the commands that train so."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for count in gpus:
        plans = plan(recipe, count, context)
        table = Table(title=f"{recipe.name} on {count} {H100.name}", box=None)
        for header in ("", *(each.workload.name for each in plans)):
            table.add_column(header, justify="right" if header else "left", no_wrap=not header)
        for name, tell in (
            ("latent rows x columns", lambda p: "{} x {}".format(*p.workload.size)),
            ("latent frames", lambda p: f"{p.workload.total_frames}"),
            ("clips per step", lambda p: f"{p.workload.batch}"),
            ("GPUs to a clip", lambda p: f"{p.context}"),
            ("clips at once, per group", lambda p: f"{p.at_once or 'none'} of {p.clips}"),
            ("tokens per step", lambda p: f"{p.tokens / 1e6:.2f} M"),
            ("EFLOP per step *", lambda p: f"{p.flops / 1e18:.2f}"),
            ("seconds per step *", lambda p: f"{p.seconds():.1f}"),
        ):
            table.add_row(name, *map(tell, plans))
        table.add_row()
        for name in plans[0].memory:
            guess = " *" if name in ("gathered", "activations") else ""
            cells = (f"{each.memory[name] / GIB:.1f}" for each in plans)
            table.add_row(f"GiB per GPU: {name}{guess}", *cells)
        table.add_row("GiB per GPU: total *", *(f"{each.total / GIB:.1f}" for each in plans))
        console.print(table)
        console.print("\n".join(commands(recipe, plans)), soft_wrap=True, highlight=False)
        console.print()
    console.print(
        f"* estimates: with checkpointed blocks; seconds at {H100.sustained:.0%} of "
        f"{H100.flops / 1e12:.0f} TFLOP/s. What of a group's clips does not fit "
        f"{H100.usable:.0%} of {H100.memory / GIB:.0f} GiB at once accumulates.",
        soft_wrap=True,
    )
