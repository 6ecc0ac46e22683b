"""The stages of a recipe in order, and the stages whose results each of them needs."""

from collections.abc import Iterable

from ..training.recipe import Recipe, stages_before
from . import growth, light_decoder


def stage_names(recipe: Recipe) -> list[str]:
    """All stages of a recipe in order; those of the autoencoder and the data come first."""
    made = ["encoder", *recipe.data, "decoder"] if recipe.decoder else [*recipe.data]
    light = [light_decoder.STAGE] if recipe.light_decoder else []
    grown = [growth.STAGE] if recipe.grown else []
    return [*made, *light, *grown, *recipe.stages]


def check_stages(recipe: Recipe, stages: Iterable[str]) -> None:
    """Raise ValueError for a name of no stage of a recipe."""
    names = stage_names(recipe)
    for stage in stages:
        if stage not in names:
            raise ValueError(f"stage: expected one of {', '.join(names)}, got {stage!r}")


def stages_needed(recipe: Recipe, stage: str, given_weights: bool) -> list[str]:
    """The stages whose results a stage needs, in order.

    given_weights: The run starts from weights of the user's, not from grown ones.
    """
    needed = set()
    if stage != "encoder":
        needed.add("encoder")
    if stage == light_decoder.STAGE:
        needed.add("decoder")
    if config := recipe.stages.get(stage):
        before = set(stages_before(config).values())
        needed |= before | set(config.needs)
        if None in before and not given_weights:
            needed.add(growth.STAGE)
    return [name for name in stage_names(recipe) if name in needed]
