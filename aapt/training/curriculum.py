"""A curriculum as data: sets of clips, lengths, batches and updates (docs/method.md#6)."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..data.clips import ClipBatch, Clips
from ..data.randomness import ClipRandom


@dataclass(frozen=True)
class Source:
    """Windows of one set of clips.

    Attributes:
        clips: Name of the set.
        frames: Frames of a window after its first.
        shortest: Least number of these frames, drawn for each update from this to `frames`; None
            for always `frames`.
        weight: Relative frequency among the sources of a phase.
    """

    clips: str
    frames: int
    shortest: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Phase:
    """Updates on the same sources.

    Attributes:
        steps: Number of updates.
        batch: Clips per update.
        sources: Windows to draw from. The clips of one update come from one source and have the
            same length, so that they form one tensor.
    """

    steps: int
    batch: int
    sources: tuple[Source, ...]

    def sample(self, sets: Mapping[str, Clips], random: ClipRandom) -> ClipBatch:
        """Draw the clips of an update."""
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
    """A sequence of phases."""

    phases: tuple[Phase, ...]

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def needs(self) -> dict[str, int]:
        """Frames after the first that the longest clips of each set must have at least."""
        needs: dict[str, int] = {}
        for phase in self.phases:
            for source in phase.sources:
                needs[source.clips] = max(source.frames, needs.get(source.clips, 0))
        return needs

    @property
    def batches(self) -> set[int]:
        return {phase.batch for phase in self.phases}

    def phase(self, step: int) -> Phase:
        """The phase of update `step`; after the end, the last phase."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]


def constant(clips: str, frames: int, batch: int, steps: int) -> Curriculum:
    """Make a curriculum of a single phase with a single source."""
    return Curriculum((Phase(steps, batch, (Source(clips, frames),)),))
