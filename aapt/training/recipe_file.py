"""Recipes of users: a TOML file, or settings of the command line, that change a named recipe.

A file names the recipe it changes, and has a table for every part of it that differs:

    base = "wan-1.3b"

    [stages.adversarial]
    steps = 800
    judgement = "clip"
"""

import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .recipe import LightRecipe, Recipe, StageConfig, VAERecipe, stages_before
from .recipes import LIGHT_RECIPES, RECIPES, VAE_RECIPES
from .stages.adversarial import AdversarialConfig
from .stages.diffusion_adaptation import DiffusionConfig
from .stages.distribution_matching import DistributionMatchingConfig

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

NONE = "none"  # None, which TOML does not have
LIKE = "like"  # in a new stage: the stage that it copies
MAX_SEED = 2**63 - 1
Table = Mapping[str, Any]


def load_recipe(name: str, settings: Iterable[str] = ()) -> Recipe | LightRecipe | VAERecipe:
    """Return a named recipe, or that of a TOML file, with settings.

    name: of a recipe, or the path of a file that ends with ".toml". A file's recipe has the file's
    name, unless the file has a `name`. settings: "KEY=VALUE" each, such as
    "stages.adversarial.steps=800"; the value is TOML, and a word needs no quotes. All change at
    once, so fields may need each other.

    ValueError names the file, and the key that no recipe has or the value that does not fit. Also
    for a recipe that could not be trained: names that are no folders, stages without updates or
    clips, and starts that a stage cannot take.
    """
    recipe = _from_file(Path(name)) if name.endswith(".toml") else _named(name, "recipe")
    recipe = changed(recipe, _together(map(_setting, settings)))
    _check_folders(recipe)
    if not 0 <= recipe.seed <= MAX_SEED:
        raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {recipe.seed}")
    if isinstance(recipe, Recipe):
        for stage, config in recipe.stages.items():
            _check_amounts(f"stages.{stage}", config)
        _check_starts(recipe.stages)
    return recipe


def changed(config: Any, table: Table, place: str = "") -> Any:
    """Return a configuration, a frozen dataclass, with the fields that a table changes.

    place: the configuration's place in the recipe, for errors, such as "stages.adversarial.".
    ValueError for an unknown field, for a value of another type, and what the configuration raises.
    """
    before = {field.name: getattr(config, field.name) for field in fields(config)}
    new = _fields(get_type_hints(type(config)), table, before, place)
    return _made(type(config), before | new, place)


def _from_file(path: Path) -> Recipe | LightRecipe | VAERecipe:
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text, got bytes that are none: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: expected TOML, got an error: {error}") from None
    try:
        base = _named(table.pop("base", None), "base")
        return changed(base, {"name": path.stem, **table})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _named(name: Any, what: str) -> Recipe | LightRecipe | VAERecipe:
    known = RECIPES | LIGHT_RECIPES | VAE_RECIPES
    if not isinstance(name, str) or name not in known:
        mend = "; a recipe of your own is a file that ends with .toml" if what == "recipe" else ""
        raise ValueError(f"{what}: expected one of {', '.join(known)}, got {name!r}{mend}")
    return known[name]()


def _check_folders(recipe: Recipe | LightRecipe) -> None:
    """Raise ValueError unless recipe, stages and sets have names that folders of a run can have,
    each its own."""
    made = {"stages": recipe.stages, "data": recipe.data} if isinstance(recipe, Recipe) else {}
    places = {f"{part}.{name}": name for part, names in made.items() for name in names}
    for place, name in {**places, "name": recipe.name}.items():
        taken = places.values() if place == "name" else ()
        if Path(name).name != name or name in ("", "..", *taken):
            raise ValueError(
                f"{place}: expected the name of a folder beside those of stages and sets, got "
                f"{name!r}; give another name"
            )


def _check_amounts(place: str, stage: StageConfig) -> None:
    """Raise ValueError for a stage without updates, clips or frames."""
    for field, amount in _amounts(stage):
        if amount < 1:
            raise ValueError(
                f"{place}: expected {field} of 1 or more, got {amount}; leave a stage out with "
                f'"{NONE}"'
            )
    if not stage.needs:
        raise ValueError(f"{place}: expected a phase with sources, got none")


def _amounts(stage: StageConfig) -> Iterator[tuple[str, int]]:
    """Yield what a stage must have at least one of, by name."""
    phases = stage.curriculum.phases if hasattr(stage, "curriculum") else (stage,)
    for phase in phases:
        if not getattr(stage, "mixed_with", None):  # which may mix alone and make no update
            yield "steps", phase.steps
        yield "batch", phase.batch
    yield "segments", getattr(stage, "segments", 1)
    for frames in stage.needs.values():
        yield "frames", frames


def _check_starts(stages: Mapping[str, StageConfig]) -> None:
    """Raise ValueError for a stage that starts from a stage not before it, whose discriminator
    starts from a discriminator of other logits, or whose teacher is no diffusion stage."""
    before: list[str] = []
    for name, stage in stages.items():
        for field, start in stages_before(stage).items():
            if start is not None and start not in before:
                raise ValueError(
                    f"stages.{name}.{field}: expected a stage before it "
                    f"({', '.join(before) or 'none is'}), got {start!r}"
                )
        before.append(name)
        if isinstance(stage, DistributionMatchingConfig):
            _check_teacher(name, stage, stages[stage.teacher])
        origin = stages.get(getattr(stage, "discriminator_start", None))
        if isinstance(origin, AdversarialConfig):
            _check_logits(name, stage, origin)


def _check_teacher(name: str, stage: DistributionMatchingConfig, origin: StageConfig) -> None:
    """Raise ValueError unless the teacher denoises each frame beside the frame before it."""
    if not isinstance(origin, DiffusionConfig) or origin.forcing != "teacher":
        raise ValueError(
            f"stages.{name}.teacher: expected a diffusion stage of forcing 'teacher', got "
            f"{stage.teacher!r}"
        )


def _check_logits(name: str, stage: AdversarialConfig, origin: AdversarialConfig) -> None:
    """Raise ValueError unless the discriminator of `origin` gives the logits of a stage."""
    for field in ("judgement", "pooling"):
        ours, theirs = getattr(stage, field), getattr(origin, field)
        if ours != theirs:
            raise ValueError(
                f"stages.{name}.{field}: expected {theirs!r} as in "
                f"{stage.discriminator_start}, whose discriminator it starts from, got {ours!r}; "
                f"change both, or stages.{name}.discriminator_start"
            )


def _setting(setting: str) -> dict[str, Any]:
    """Return "a.b=value" as nested tables."""
    key, equals, text = setting.partition("=")
    if not key or not equals:
        raise ValueError(f"set: expected KEY=VALUE, got {setting!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a word
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _together(tables: Iterable[Table]) -> dict[str, Any]:
    """Return tables as one; of two values of a key the later stays."""
    whole: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            before = whole.get(key)
            both = isinstance(before, dict) and isinstance(value, dict)
            whole[key] = _together([before, value]) if both else value
    return whole


def _read(hint: Any, value: Any, old: Any, place: str) -> Any:
    """Return a value of a table as what `hint` says. `old` is the value that it replaces."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value == NONE and type(None) in choices:
        return None
    if isinstance(value, dict) and isinstance(old, Mapping):
        return _parts(value, old, place)
    if isinstance(value, dict) and is_dataclass(old or choices[0]):
        return _part(choices[0], value, old, place)
    for choice in choices:
        if get_origin(choice) is Literal and value in get_args(choice):
            return value
        if get_origin(choice) is tuple and isinstance(value, list):
            return _tuple(get_args(choice), value, place)
        if choice is float:  # not infinite, and not nan
            if type(value) in (int, float) and abs(value) <= sys.float_info.max:
                return float(value)
        elif type(value) is choice:
            return value
    raise ValueError(f"{place}: expected {_words(choices)}, got {value!r}")


def _part(kind: type, table: Table, old: Any, place: str) -> Any:
    """Return a configuration that changes the old one, or a new one of a kind if there is none."""
    if old is not None:
        return changed(old, table, f"{place}.")
    required = (x.name for x in fields(kind) if x.default is x.default_factory is MISSING)
    if missing := [name for name in required if name not in table]:
        raise ValueError(f"{place}: expected {', '.join(missing)} as well, got {dict(table)}")
    return _made(kind, _fields(get_type_hints(kind), table, {}, f"{place}."), f"{place}.")


def _parts(table: Table, old: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return configurations by name, such as stages: changed ones, new ones, and without those
    that the table calls none."""
    made = dict(old)
    for name, part in table.items():
        like = part.get(LIKE, name) if isinstance(part, dict) else name
        if like not in made:
            raise ValueError(
                f"{place}.{name}: expected one of {', '.join(made)}, or a new one that copies one "
                f"of them, got {like!r}; give {LIKE} = one of them"
            )
        if part == NONE:
            del made[name]
        elif isinstance(part, dict):
            rest = {key: value for key, value in part.items() if key != LIKE}
            made[name] = changed(made[like], rest, f"{place}.{name}.")
        else:
            raise ValueError(f'{place}.{name}: expected a table or "{NONE}", got {part!r}')
    return made


def _tuple(kinds: tuple, values: list, place: str) -> tuple:
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    if len(kinds) != len(values):
        raise ValueError(f"{place}: expected {len(kinds)} values, got {len(values)}")
    return tuple(
        _read(kind, value, None, f"{place}[{index}]")
        for index, (kind, value) in enumerate(zip(kinds, values, strict=True))
    )


def _fields(hints: Table, table: Table, before: Table, place: str) -> dict[str, Any]:
    """Return the fields in a table as what `hints` say. before: the values that they replace."""
    for key in table:
        if key not in hints:
            raise ValueError(f"{place}{key}: expected one of {', '.join(hints)}, got {key!r}")
    return {
        key: _read(hints[key], value, before.get(key), f"{place}{key}")
        for key, value in table.items()
    }


def _made(kind: type, values: Table, place: str) -> Any:
    """Make a configuration; its errors begin with its place in the recipe."""
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{place}{error}") from None


def _words(choices: tuple) -> str:
    """Return the kinds of value that a field takes, in words."""
    named = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    named |= {type(None): f'"{NONE}"'}
    said = []
    for choice in choices:
        if get_origin(choice) is Literal:
            said += map(repr, get_args(choice))
        elif get_origin(choice) is tuple:
            said.append("a list")
        else:
            said.append(named.get(choice, "a table"))
    return " or ".join(said)
