"""Plans as tables: what each phase of a recipe needs, and what switches that save memory change."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from ..training.recipe import Recipe
from ..training.savings import SWITCHES, with_switches
from ..training.stages import Stage
from .plan import GIB, H100, Plan, commands, meta_stages, plan

TOGETHER = ("eight-bit", "lora", "frozen-trunk")  # the switches that save the most
MOST_GPUS = 4096
AS_IT_IS, AND = "as it is", " + "  # in headings of alternatives

Plans = Mapping[int, Sequence[Plan]]  # by number of GPUs


def print_plans(
    recipe: Recipe, gpus: Iterable[int], context: int | None = None, words: str | None = None
) -> list[str]:
    """Print for each number of GPUs a table with a column per phase, the commands to train, and a
    table of alternatives.

    words: what names the recipe in the commands; its name unless given. Returns an error for each
    number of GPUs on which a stage does not fit.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    stages = meta_stages(recipe)
    planned = {count: plan(recipe, count, context, stages=stages) for count in gpus}
    others, refused = dict(alternatives(recipe, planned)), []
    for count, plans in planned.items():
        console.print(phase_table(recipe, count, plans))
        console.print("\n".join(commands(recipe, plans, words)), soft_wrap=True, highlight=False)
        console.print()
        columns = {AS_IT_IS: plans} | {name: made[count] for name, made in others.items()}
        console.print(alternative_table(recipe, count, columns))
        if stages_left := lacking(plans):
            fits = next((name for name, each in columns.items() if not lacking(each)), None)
            more = fewest_gpus(recipe, count, context, stages)
            refused.append(refusal(stages_left, count, fits, more))
        console.print()
    for name, switch in SWITCHES.items():
        line = f"--memory {name} saves {switch.saves}; it costs {switch.costs}."
        console.print(line, soft_wrap=True, highlight=False)
    console.print(
        f"* estimates: with checkpointed blocks; seconds at {H100.sustained:.0%} of "
        f"{H100.flops / 1e12:.0f} TFLOP/s. Clips of a group that do not fit at once into "
        f"{H100.usable:.0%} of {H100.memory / GIB:.0f} GiB follow in further passes, whose "
        "gradients accumulate. Days leave out samples and states on disk.",
        soft_wrap=True,
    )
    return refused


def phase_table(recipe: Recipe, gpus: int, plans: Sequence[Plan]) -> Table:
    """A table of what each phase needs."""
    table = Table(title=f"{recipe.name} on {gpus} {H100.name}", box=None)
    for header in ("", *(each.workload.name for each in plans)):
        table.add_column(header, justify="right" if header else "left", no_wrap=not header)
    for name, tell in (
        ("latent rows x columns", lambda p: "{} x {}".format(*p.workload.size)),
        ("latent frames", lambda p: f"{p.workload.total_frames}"),
        ("clips per update", lambda p: f"{p.workload.batch}"),
        ("GPUs per clip", lambda p: f"{p.context}"),
        ("clips at once, per group", lambda p: f"{p.at_once or 'none'} of {p.clips}"),
        ("tokens per update", lambda p: f"{p.tokens / 1e6:.2f} M"),
        ("EFLOP per update *", lambda p: f"{p.flops / 1e18:.2f}"),
        ("seconds per update *", lambda p: f"{p.seconds():.1f}"),
        ("updates", lambda p: f"{p.workload.steps}"),
        ("days *", lambda p: short(p.days())),
    ):
        table.add_row(name, *map(tell, plans))
    table.add_row()
    for name in plans[0].memory:
        guess = " *" if name in ("gathered", "activations") else ""
        cells = (f"{each.memory[name] / GIB:.1f}" for each in plans)
        table.add_row(f"GiB per GPU: {name}{guess}", *cells)
    table.add_row("GiB per GPU: total *", *(f"{each.total / GIB:.1f}" for each in plans))
    if any(each.offloaded for each in plans):
        cells = (f"{each.offloaded / GIB:.1f}" for each in plans)
        table.add_row("GiB per GPU: in the CPU's memory", *cells)
    return table


def alternatives(recipe: Recipe, planned: Plans) -> Iterator[tuple[str, Plans]]:
    """Yield switches that the recipe lacks, alone and together, with the plans under them.

    Clips are shared by as many GPUs as in the plans of the recipe.
    """
    contexts = {gpus: {p.workload.stage: p.context for p in planned[gpus]} for gpus in planned}
    lacked = [name for name in SWITCHES if lacks(recipe, name)]
    together = [name for name in TOGETHER if name in lacked]
    for names in [(name,) for name in lacked] + [tuple(together)] * (len(together) > 1):
        other = with_switches(recipe, names)
        stages = meta_stages(other)
        yield (
            AND.join(names),
            {gpus: plan(other, gpus, each, stages=stages) for gpus, each in contexts.items()},
        )


def lacks(recipe: Recipe, switch: str) -> bool:
    """True if a switch would change the recipe, and excludes none that is on."""
    try:
        with_switches(recipe, [switch])
    except ValueError:
        return False
    return not any(
        getattr(config, SWITCHES[switch].field, False) not in (None, False, 32)
        for config in recipe.stages.values()
    )


def alternative_table(recipe: Recipe, gpus: int, columns: Mapping[str, Sequence[Plan]]) -> Table:
    """A table of memory and days per stage, with a column for each choice of switches."""
    title = f"{recipe.name} on {gpus} {H100.name}: GiB per GPU with one clip / days *, by --memory"
    table = Table(title=title, box=None)
    for header in ("", *columns):
        table.add_column(header, justify="right" if header else "left")
    for stage in recipe.stages:
        table.add_row(stage, *(stage_cell(stage, plans) for plans in columns.values()))
    days = (sum(each.days() for each in plans) for plans in columns.values())
    fit = (not lacking(plans) for plans in columns.values())
    table.add_row("days in all", *(short(d) if all_fit else "" for d, all_fit in zip(days, fit)))
    return table


def stage_cell(stage: str, plans: Sequence[Plan]) -> str:
    """Memory and days of a stage, whose phases share a command."""
    phases = [each for each in plans if each.workload.stage == stage]
    memory = f"{max(each.least for each in phases) / GIB:.1f}"
    if not all(each.at_once for each in phases):
        return f"{memory}, too much"
    return f"{memory} / {short(sum(each.days() for each in phases))}"


def short(days: float) -> str:
    """Days with two digits, more before the point."""
    return f"{days:.0f}" if days >= 10 else f"{days:.2g}"


def lacking(plans: Iterable[Plan]) -> list[str]:
    """Stages of which not even one clip fits."""
    return list(dict.fromkeys(each.workload.stage for each in plans if not each.at_once))


def refusal(stages: Sequence[str], gpus: int, switches: str | None, more: int | None) -> str:
    """Say that stages do not fit, and with which switches or on how many GPUs all of them do."""
    ways = []
    if switches:
        ways.append(" ".join(f"--memory {name}" for name in switches.split(AND)))
    if more:
        ways.append(f"{more} GPUs")
    mend = f"takes {' or '.join(ways)}" if ways else "take a smaller model or smaller clips"
    return (
        f"gpus: expected memory for one clip of {', '.join(stages)}, got {gpus} {H100.name}; {mend}"
    )


def fewest_gpus(
    recipe: Recipe, gpus: int, context: int | None, stages: Mapping[str, Stage]
) -> int | None:
    """The least number of GPUs, doubled from `gpus`, on which every stage fits; None if none is."""
    while (gpus := 2 * gpus) <= MOST_GPUS:
        try:
            if not lacking(plan(recipe, gpus, context, stages=stages)):
                return gpus
        except ValueError:  # the groups cannot share a batch
            return None
    return None
