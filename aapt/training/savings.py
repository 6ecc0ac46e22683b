"""Switches that save memory in every stage of a recipe, as the command line names them."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from ..model.low_rank import LoRA
from .recipe import Recipe

RANK = 64  # of an adaptation, unless it is given


@dataclass(frozen=True)
class Switch:
    """A field that stages may have, with the value that saves memory.

    Attributes:
        saves, costs: What the switch saves and costs, in words.
    """

    field: str
    saves: str
    costs: str
    value: Any


SWITCHES = {
    "offload": Switch(
        "offload",
        "on several GPUs, the shards of parameters, gradients, states and averages: they are in "
        "the CPU's memory, and the optimizer steps there",
        "transfers and steps on the CPU, which the estimates of seconds leave out",
        True,
    ),
    "eight-bit": Switch(
        "state_bits",
        "three quarters of the optimizer's states (Muon's stay)",
        "moments that are rounded to 9 %, without bias; losses within 2 % in small trials",
        8,
    ),
    "lora": Switch(
        "lora",
        "the generator's gradients, states and average; arithmetic of frozen weights",
        "a generator that changes by matrices of low rank in every stage",
        LoRA(RANK),
    ),
    "discriminator-lora": Switch(
        "discriminator_lora",
        "the discriminator's gradients and states; arithmetic of frozen weights",
        "a discriminator that changes by matrices of low rank",
        LoRA(RANK),
    ),
    "frozen-trunk": Switch(
        "frozen_trunk",
        "the discriminator's gradients and states; activations of all its passes but one",
        "a weaker discriminator, whose heads alone learn",
        True,
    ),
}


def with_switches(recipe: Recipe, switches: Iterable[str]) -> Recipe:
    """Turn switches on in every stage that has their field.

    A switch is a name of SWITCHES; `lora=32` and `discriminator-lora=32` also give the rank, which
    is 64 otherwise. ValueError for any other name or rank, for switches that exclude each other,
    and for one that no stage has.
    """
    for given in switches:
        name, equals, rank = given.partition("=")
        if name not in SWITCHES or (equals and not isinstance(SWITCHES[name].value, LoRA)):
            known = "offload, eight-bit, lora[=RANK], discriminator-lora[=RANK], frozen-trunk"
            raise ValueError(f"memory: expected some of {known}, got {given}")
        switch = SWITCHES[name]
        value = switch.value
        if equals:
            if not rank.isdecimal():
                raise ValueError(f"memory: expected a rank such as {name}=64, got {given}")
            value = LoRA(int(rank))
        stages = {
            stage: replace(config, **{switch.field: value} if has(config, switch) else {})
            for stage, config in recipe.stages.items()
        }
        if stages == recipe.stages:
            raise ValueError(f"memory: expected a switch that {recipe.name} lacks, got {given}")
        recipe = replace(recipe, stages=stages)
    return recipe


def has(config: Any, switch: Switch) -> bool:
    """True if a stage has the field of a switch, and LoRA does not meet Muon there."""
    named = {field.name for field in fields(config)}
    return switch.field in named and not (switch.field == "lora" and getattr(config, "muon", False))
