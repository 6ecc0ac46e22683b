"""The experiments of the proof: what is asked, and what is trained to answer it.

Those on the bundled world start from stages of `aapt train tiny-world`, the others from stages of
`aapt train small-world`, a third of its weights at 80x48, measured at five seconds only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from aapt.model.config import SamplingConfig
from aapt.training.corruption import Corruption
from aapt.training.curriculum import constant
from aapt.training.forcing import Forcing
from aapt.training.optimization import Schedule
from aapt.training.recipe import Recipe, StageConfig
from aapt.training.recipes import small_world, tiny_world
from aapt.training.stages.adversarial import AdversarialConfig

Variants = Mapping[str, StageConfig]


@dataclass(frozen=True)
class Experiment:
    """Variants to compare.

    Attributes:
        question: question that the comparison answers.
        variants: stages by name; one may start from another.
        recipe: recipe that gives the variants their model and data.
        beside: names of stages of `recipe` to measure too.
        samplings: settings, by name, to sample the recipe's diffusion stage with and measure too.
        starts, seconds: worlds per evaluation, and length of each video.
        windows: windows of the evaluation that the page shows.
        timed: True to measure passes and time per frame; always with `samplings`.
        before: recipe of one stage, trained first, whose weights `recipe` starts from. Experiments
            with equal ones share them.
    """

    question: str
    variants: Variants
    recipe: Recipe
    beside: tuple[str, ...] = ()
    samplings: Mapping[str, SamplingConfig] = field(default_factory=dict)
    starts: int = 16
    seconds: float = 60.0
    windows: tuple[str, ...] = ("4-6 s", "55-60 s")
    timed: bool = False
    before: Recipe | None = None


SHORT = {"seconds": 6.0, "windows": ("4-6 s",)}  # of experiments on the small world


def plain(**changes) -> AdversarialConfig:
    """Stage 3 of the paper, without errors against the real clip, brief enough for a CPU."""
    config = replace(
        tiny_world().stages["adversarial"],
        start="regression",
        steps=100,
        discriminator_warmup=40,
        segments=1,
        whole_clips=False,
        regression=0.0,
        palette=0.0,
        corruption=Corruption(),
    )
    return replace(config, **changes)


def drift() -> Experiment:
    """Extensions of one short training, equal in updates, different in the length of rollouts."""
    further = dict(steps=60, discriminator_warmup=20, overlap_frames=2)
    longer = plain(start="short", discriminator_start="short", **further)
    return Experiment(
        "Does training on longer rollouts stop the drift of a minute? (paper, Table 5)",
        {
            "short": plain(),
            "extension-0": replace(longer, segments=1),
            "extension-1": replace(longer, segments=2),
            "extension-5": replace(longer, segments=6),
        },
        tiny_world(),
        beside=("regression",),
    )


def teacher_forcing(clamp: float | None = tiny_world().model.output_clamp) -> Experiment:
    recipe = tiny_world()
    variants = {
        f"{forcing}{'-corrupted' if corruption else ''}": plain(
            start="consistency", forcing=forcing, corruption=corruption
        )
        for forcing in ("student", "teacher")
        for corruption in (None, Corruption())
    }
    return Experiment(
        "Does a generator fail in a rollout after teacher-forced adversarial training? "
        "(paper, Figure 7) "
        f"Output clamp: {clamp}.",
        variants,
        replace(recipe, model=replace(recipe.model, output_clamp=clamp)),
        beside=("consistency",),
    )


def from_scratch(
    question: str,
    camera: Mapping[str, object] | None = None,
    forcing: Forcing = "teacher",
    timed: bool = False,
    small: bool = False,
    **model: object,
) -> Experiment:
    """All stages in brief, for a model with other inputs than the recipe's; under diffusion forcing
    the first two. camera, model: fields that differ from the recipe's. small: True for the small
    world.
    """
    recipe = small_world() if small else tiny_world()
    changed = replace(recipe.camera, **camera or {}), replace(recipe.model, **model)
    stages = recipe.stages
    brief = (
        stages["diffusion"].curriculum
        if small
        else constant("clips", frames=10, batch=8, steps=1000)
    )
    second = replace(stages["consistency"], start="brief-diffusion", forcing=forcing)
    variants = {
        "brief-diffusion": replace(stages["diffusion"], curriculum=brief, forcing=forcing),
        "brief-consistency": second,
        "student": plain(start="brief-consistency", discriminator_start="brief-diffusion"),
    }
    if forcing == "diffusion":
        del variants["student"]
    made = replace(recipe, camera=changed[0], model=changed[1], stages={})
    return Experiment(question, variants, made, timed=timed, **SHORT if small else {})


def stage_three() -> Experiment:
    """One factor of the adversarial stage at a time."""
    base = plain()
    return Experiment(
        "What matters in the adversarial stage? Every line below `base` changes one thing of it.",
        {
            "base": base,
            "from-consistency": replace(base, start="consistency"),
            "no-corruption": replace(base, corruption=None),
            "no-warm-up": replace(base, discriminator_warmup=0),
            "paper-penalty": replace(base, penalty=1000.0),
            "logit-per-clip": replace(base, judgement="clip"),
            "average-of-tokens": replace(base, pooling="average"),
            "judge-sees-no-past": replace(base, discriminator_recycled=False),
        },
        tiny_world(),
        beside=("regression",),
    )


def stage_three_unclamped() -> Experiment:
    """The base of `stage_three` in a model without the output clamp."""
    recipe = tiny_world()
    return Experiment(
        "What does the output clamp do in an adversarial stage that starts from student-forced "
        "regression?",
        {"base": plain()},
        replace(recipe, model=replace(recipe.model, output_clamp=None)),
        beside=("regression",),
    )


def many_segments() -> Experiment:
    """An extension of `drift` with 15 segments: rollouts of 15 s."""
    given = drift()
    extension = replace(given.variants["extension-5"], segments=15)
    return Experiment(
        "Do rollouts of fifteen segments streak?",
        {"short": given.variants["short"], "extension-14": extension},
        given.recipe,
    )


def against_regression(question: str, names: Sequence[str], updates: int) -> Experiment:
    """Adversarial stages of the recipe against `updates` more updates of regression. Each stage
    starts from the stage before; the first and the regression start from one model."""
    recipe = tiny_world()
    stages = {name: recipe.stages[name] for name in names}
    start = stages[names[0]].start
    regression = replace(recipe.stages[start], start=start, steps=updates)
    return Experiment(
        f"{question} Every line below the first starts from the first line's model.",
        {**stages, "more-regression": regression},
        recipe,
        beside=(start,),
    )


def colours() -> Experiment:
    recipe = tiny_world()
    final = recipe.stages["final"]
    return Experiment(
        "What keeps the colours in the last stage: its lead, up to "
        f"{final.lead_segments} segments rolled out before the judged ones, or its comparison of "
        "the mean colours of rows in place of whole frames? Every line below the first starts from "
        "the first line's model.",
        {
            "final": final,
            "no-lead": replace(final, lead_segments=0),
            "frames-not-rows": replace(final, palette=final.rows, rows=0.0),
        },
        recipe,
        beside=("further-adversarial",),
    )


def baselines() -> Experiment:
    """Trains nothing. Worlds and steps are few: 8 steps with guidance are 16 passes per frame."""
    recipe = tiny_world()
    shift = recipe.stages["diffusion"].shift
    guidances = {"diffusion-guidance-10": 10.0, "diffusion-guidance-3": 3.0, "diffusion": 1.0}
    return Experiment(
        "What does one forward pass per frame lose against many? Compared are the diffusion model "
        "of stage 1 (8 steps), the consistency model of stage 2, and the later stages. "
        "(paper, Figure 3 and Table 1)",
        {},
        recipe,
        beside=("consistency", "regression", "adversarial"),
        samplings={name: SamplingConfig(8, shift, w) for name, w in guidances.items()},
        starts=6,
    )


def camera_of_the_recipe(question: str) -> Experiment:
    """The last variant of `from_scratch`, from the small world's own first stages."""
    return Experiment(
        question,
        {"student": plain(start="consistency")},
        small_world(),
        beside=("diffusion", "consistency"),
        **SHORT,
    )


def new_columns(start: str) -> Experiment:
    """A diffusion model that nothing has controlled gets the camera's channels, and is measured
    early and late in its further training."""
    recipe = small_world()
    diffusion = recipe.stages["diffusion"]
    without = replace(recipe.model, condition_channels=0)
    brief = replace(
        diffusion,
        curriculum=constant("clips", frames=10, batch=8, steps=60),
        schedule=Schedule(diffusion.schedule.learning_rate, warmup=20),
        average=0.95,
    )
    later = replace(
        brief, curriculum=constant("clips", frames=10, batch=8, steps=240), start="60-updates"
    )
    return Experiment(
        f"{CAMERA} Columns of new channels begin {start}.",
        {"60-updates": brief, "300-updates": later},
        replace(recipe, new_channels=start, stages={}),
        before=replace(
            recipe,
            name="small-world-uncontrolled",
            camera=None,
            model=without,
            stages={"diffusion": diffusion},
        ),
        **SHORT,
    )


def with_errors() -> AdversarialConfig:
    """Two segments of whole clips, with every error against the real clip."""
    return plain(segments=2, whole_clips=True, regression=1.0, palette=5.0, rows=40.0)


def without_discriminator() -> Experiment:
    both = with_errors()
    return Experiment(
        "Does the adversarial loss do anything that errors against the real clip, of latents, of "
        "frames' mean colours and of rows', do not do alone?",
        {
            "both": both,
            "errors-alone": replace(both, adversarial=0.0),
            "adversarial-alone": replace(both, regression=0.0, palette=0.0, rows=0.0),
        },
        small_world(),
        beside=("regression",),
        **SHORT,
    )


def as_written() -> Experiment:
    """Trains from random weights: clamps, residual head and corruption are off from the first stage
    on. Rates and updates suit a small model."""
    recipe = small_world()
    model = replace(recipe.model, output_clamp=None, residual_head=False, sink_distance="absolute")
    first = AdversarialConfig(
        clips="clips",
        steps=100,
        batch=4,
        segment_frames=10,
        shortest_segment=5,
        generator_schedule=Schedule(5e-5),
        discriminator_schedule=Schedule(2e-4),
        start="consistency",
        average=0.98,
    )
    extension = replace(
        first,
        steps=60,
        segments=2,
        overlap_frames=1,
        overlap_loss=True,
        start="first",
        discriminator_start="first",
    )
    further = replace(extension, segments=6, start="second", discriminator_start="second")
    stages = {name: recipe.stages[name] for name in ("diffusion", "consistency")}
    return Experiment(
        "What does the paper's stage 3 make of a small model, every switch as the paper has it?",
        {**stages, "first": first, "second": extension, "third": further},
        replace(recipe, model=model, stages={}, raw_starts=True),
        **SHORT,
    )


def one_thing(question: str, **changes: Mapping) -> Experiment:
    """The base of `stage_three` on the small world, and variants that each change some fields."""
    variants = {name.replace("_", "-"): plain(**fields) for name, fields in changes.items()}
    return Experiment(
        f"{question} Every line below `base` changes of it what the line's name says.",
        {"base": plain(), **variants},
        small_world(),
        beside=("regression",),
        **SHORT,
    )


def five_minutes() -> Experiment:
    return Experiment(
        "Do five minutes hold, the controls included?",
        {"base": plain(), "with-errors": with_errors()},
        small_world(),
        beside=("regression",),
        starts=6,
        seconds=300.0,
        windows=("4-6 s", "55-60 s", "175-180 s", "295-300 s"),
    )


# The residual head needs recycled frames, so both sides of the first question are without it.
RECYCLING = "What is lost without recycled frames? (paper, appendix E)"
CAMERA = "How should a model be given the rays of its camera? (paper, supplement G)"
FORCING = "What does one-step diffusion forcing cost beside recycled frames? (paper, Figure 2)"
WAN = {"block": "wan", "residual_head": False}  # the block that has a time per frame
EXPERIMENTS: Mapping[str, Callable[[], Experiment]] = {
    "adversarial": partial(
        against_regression,
        "Is the first adversarial stage better than more updates of regression?",
        ["adversarial"],
        210,
    ),
    "baselines": baselines,
    "drift": drift,
    "final": partial(
        against_regression,
        "Are the last adversarial stages better than more updates of regression?",
        ["further-adversarial", "final"],
        200,
    ),
    "teacher-forcing": teacher_forcing,
    "teacher-forcing-unclamped": partial(teacher_forcing, clamp=None),
    "recycling": partial(from_scratch, f"{RECYCLING} Recycled: yes.", residual_head=False),
    "no-recycling": partial(
        from_scratch, f"{RECYCLING} Recycled: no.", recycle=False, residual_head=False
    ),
    "camera": partial(camera_of_the_recipe, f"{CAMERA} Origin and direction."),
    "camera-moment": partial(
        from_scratch, f"{CAMERA} Moment and direction.", {"rays": "moment"}, small=True
    ),
    "camera-unscaled": partial(
        from_scratch,
        f"{CAMERA} Origin and direction, unscaled.",
        {"origin_deviation": 1.0, "direction_deviation": 1.0},
        small=True,
    ),
    "camera-first-frame": partial(
        from_scratch,
        f"{CAMERA} Origin and direction, relative to the first frame.",
        {"relative_to_first": True, "origin_deviation": 0.45, "direction_deviation": 0.28},
        small=True,
    ),
    "camera-random-start": partial(new_columns, "random"),
    "camera-zero-start": partial(new_columns, "zero"),
    "stage-three": stage_three,
    "stage-three-unclamped": stage_three_unclamped,
    "many-segments": many_segments,
    "colours": colours,
    "without-discriminator": without_discriminator,
    "as-written": as_written,
    "heads": partial(
        one_thing,
        "What do logits per frame, per clip and both keep?",
        per_clip={"judgement": "clip"},
        both={"judgement": "both"},
    ),
    "losses": partial(
        one_thing,
        "What do the relativistic loss and its penalties do, and do noised frames replace these?",
        non_saturating={"loss": "non-saturating"},
        real_alone={"penalized": "real"},
        none={"penalized": "none"},
        noised={"penalized": "none", "noised": True},
        known_too={"perturb_known": True},
    ),
    "discriminator-starts": partial(
        one_thing,
        "Which weights should the discriminator start from: diffusion, consistency or random ones?",
        from_consistency={"discriminator_start": "consistency"},
        from_random={"discriminator_start": None},
    ),
    "readings": partial(
        one_thing,
        "Do two readings of the paper matter: a token-frame for the first frame, windows that "
        "always start with their clip?",
        all_frames={"discriminator_layout": "all"},
        always={"first_frame": "always"},
    ),
    "five-minutes": five_minutes,
    "diffusion-forcing": partial(
        from_scratch,
        f"{FORCING} Forcing: diffusion.",
        forcing="diffusion",
        timed=True,
        small=True,
        **WAN | {"recycle": False},
    ),
    "recycled-frames": partial(
        from_scratch, f"{FORCING} Forcing: teacher.", timed=True, small=True, **WAN
    ),
}
