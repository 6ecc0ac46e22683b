"""A curriculum as data: which clips, how long, how many, for how many updates (SPEC 6)."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..data.clips import ClipBatch, Clips
from ..data.randomness import ClipRandom


@dataclass(frozen=True)
class Source:
    """Windows of one set of clips: `frames` latent frames after the first, or any number from
    `shortest` up to that. `weight`: how often it is drawn, relative to the phase's others."""

    clips: str
    frames: int
    shortest: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Phase:
    """`steps` updates of `batch` clips. The clips of one update come from one source and are
    equally long, so that they make one tensor."""

    steps: int
    batch: int
    sources: tuple[Source, ...]

    def sample(self, sets: Mapping[str, Clips], random: ClipRandom) -> ClipBatch:
        weights = [source.weight for source in self.sources]
        total = sum(weights)
        chosen = random.shared.choice(len(weights), p=[weight / total for weight in weights])
        source = self.sources[chosen]
        frames = source.frames
        if source.shortest is not None:
            frames = int(random.shared.integers(source.shortest, source.frames + 1))
        return sets[source.clips].sample(random, frames)


@dataclass(frozen=True)
class Curriculum:
    """Phases, one after the other."""

    phases: tuple[Phase, ...]

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def needs(self) -> dict[str, int]:
        """Latent frames after the first that the longest clips of each set must have."""
        needs: dict[str, int] = {}
        for phase in self.phases:
            for source in phase.sources:
                needs[source.clips] = max(source.frames, needs.get(source.clips, 0))
        return needs

    @property
    def batches(self) -> set[int]:
        return {phase.batch for phase in self.phases}

    def phase(self, step: int) -> Phase:
        """The phase of update `step`; past the end, the last."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]


def constant(clips: str, frames: int, batch: int, steps: int) -> Curriculum:
    """A curriculum that never changes."""
    return Curriculum((Phase(steps, batch, (Source(clips, frames),)),))
