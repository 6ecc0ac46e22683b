"""Signs that a stage goes wrong, each with what to try first (evidence in `benchmarks/LOG.md`)."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean

WINDOW = 20  # updates of a mean
CHANCE = 0.55  # accuracy of a discriminator that tells nothing; 0.75 to 0.95 in runs that went well
UNDECIDED = math.log(2), 2 * math.log(2)  # its loss then, relativistic or non-saturating
NEAR = 0.02  # to this loss
NO_PENALTY = 1e-3  # 2e-4 beside a discriminator that had died
COLLAPSED = 0.1  # share of the first gradients that is left; 0.5 was left of 5 to 20
STILL = 0.3  # share of the real motion
FADED, WILD = 0.3, 2.0  # deviation of late frames, relative to real ones
MOVED = 0.4  # shift of late mean colours: 0.07 in the bundled model, 0.6 to another theme


@dataclass(frozen=True)
class Alarm:
    """A sign and its mend.

    Attributes:
        sign: Name of the sign, of which a stage says each at most once until it has passed.
        text: What was seen, and what to try first.
    """

    sign: str
    text: str


class Alarms:
    """Watches the metrics of a stage's updates and of its sheets.

    >>> alarms = Alarms()
    >>> for step in range(steps):
    ...     for text in alarms.update(metrics[step]):
    ...         print(text)
    """

    def __init__(self):
        self.recent: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self.first_gradient: float | None = None
        self.ringing: set[str] = set()

    def update(self, metrics: Mapping[str, float]) -> list[str]:
        """Return texts of signs that are new with an update.

        Updates of a discriminator alone do not count, because it has learnt nothing yet.
        """
        if "accuracy" not in metrics or "generator_gradient" not in metrics:
            return []
        self.recent.append(metrics)
        if len(self.recent) < WINDOW:
            return []
        # Errors against the real clip are missing where an update was rolled out beyond its clip
        common = set(metrics).intersection(*self.recent)
        mean = {name: fmean(each[name] for each in self.recent) for name in common}
        if self.first_gradient is None:
            self.first_gradient = mean["generator_gradient"]
        return self._new(dead_discriminator(mean, self.first_gradient), DISCRIMINATOR)

    def sheet(self, measures: Mapping[str, float]) -> list[str]:
        """Return texts of signs that are new with a sheet, see `measures` in `samples.py`."""
        return self._new(bad_samples(measures), SAMPLES)

    def _new(self, found: Iterable[Alarm], signs: frozenset[str]) -> list[str]:
        found = list(found)
        new = [alarm.text for alarm in found if alarm.sign not in self.ringing]
        self.ringing = (self.ringing - signs) | {alarm.sign for alarm in found}
        return new


DISCRIMINATOR = frozenset({"chance", "penalty", "gradient"})
SAMPLES = frozenset({"motion", "faded", "wild", "moved"})


def dead_discriminator(mean: Mapping[str, float], first_gradient: float) -> Iterator[Alarm]:
    """Yield signs that a discriminator tells nothing any more, from means over WINDOW updates."""
    accuracy, loss = mean["accuracy"], mean["discriminator"]
    if accuracy < CHANCE and min(abs(loss - flat) for flat in UNDECIDED) < NEAR:
        yield Alarm(
            "chance",
            f"the discriminator is at chance: accuracy {accuracy:.2f} and loss {loss:.3f} over "
            f"{WINDOW} updates; try a fifth of the penalty, twice the discriminator's rate and "
            "discriminator_warmup = 60",
        )
    penalties = [mean[name] for name in ("r1", "r2") if name in mean]
    penalty = sum(penalties)
    if penalties and penalty < NO_PENALTY and accuracy < CHANCE:
        yield Alarm(
            "penalty",
            f"the discriminator's logits are flat: penalty {penalty:.1e} at accuracy "
            f"{accuracy:.2f} over {WINDOW} updates; try discriminator_start = an adversarial stage "
            "before this one",
        )
    gradient = mean["generator_gradient"]
    if gradient < COLLAPSED * first_gradient:
        yield Alarm(
            "gradient",
            f"the generator's gradient has collapsed: {gradient:.2g} over {WINDOW} updates, "
            f"{first_gradient:.2g} at first; try discriminator_start = an adversarial stage before "
            "this one, or a discriminator_warmup",
        )


def bad_samples(measures: Mapping[str, float]) -> Iterator[Alarm]:
    """Yield signs of lost motion and of drift."""
    motion = min(measures["motion"], measures["late_motion"])
    if motion < STILL:
        yield Alarm(
            "motion",
            f"the samples hardly move: {motion:.2f} of the real motion; try regression with fewer "
            "offsets (corruption.clip_chance = 0.4), and the discriminator of the stage before",
        )
    deviation = measures["late_deviation"]
    if deviation < FADED:
        yield Alarm(
            "faded",
            f"the samples fade: late latents have {deviation:.2f} of the real deviation; try the "
            "adversarial stage sooner, with fewer updates of regression before it",
        )
    if deviation > WILD:
        yield Alarm(
            "wild",
            f"the samples blow up: late latents have {deviation:.1f} times the real deviation; try "
            "output_clamp = 8 in the model, and a start from rollout regression",
        )
    shift = measures["colour_shift"]
    if shift > MOVED:
        yield Alarm(
            "moved",
            f"the samples drift: late mean colours are off by {shift:.2f} latent units; try more "
            "segments per rollout, then palette or rows",
        )
