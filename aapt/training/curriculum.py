"""A curriculum as data: sets of clips, lengths, batches and updates (docs/method.md#6)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..data.clips import ClipBatch, Clips, FirstFrame
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
        first_frame: Share of windows that start with frame 0 of a clip, see `Clips.sample`.
    """

    clips: str
    frames: int
    shortest: int | None = None
    weight: float = 1.0
    first_frame: FirstFrame = "always"

    def __post_init__(self):
        if self.frames < 1:
            raise ValueError(f"frames: expected 1 or more, got {self.frames}")
        if self.shortest is not None and not 1 <= self.shortest <= self.frames:
            raise ValueError(f"shortest: expected 1 to {self.frames} frames, got {self.shortest}")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight: expected a finite number above 0, got {self.weight}")

    def length(self, random: ClipRandom) -> int:
        """Draw the frames of an update's windows after the first, alike on all ranks."""
        if self.shortest is None:
            return self.frames
        return int(random.shared.integers(self.shortest, self.frames + 1))


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
        source = draw_source(self.sources, random)
        return sets[source.clips].sample(random, source.length(random), source.first_frame)


def longest(needs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the most frames that is asked of each set, from names of sets with frames."""
    most: dict[str, int] = {}
    for name, frames in needs:
        most[name] = max(frames, most.get(name, 0))
    return most


def draw_source(sources: Sequence[Source], random: ClipRandom) -> Source:
    """Draw the source of an update's clips, by weight and alike on all ranks."""
    total = sum(source.weight for source in sources)
    chances = [source.weight / total for source in sources]
    return sources[random.shared.choice(len(sources), p=chances)]


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
        sources = (source for phase in self.phases for source in phase.sources)
        return longest((source.clips, source.frames) for source in sources)

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


def constant(
    clips: str, frames: int, batch: int, steps: int, first_frame: FirstFrame = "half"
) -> Curriculum:
    """Make a curriculum of a single phase with a single source. Half of its windows start anywhere
    in their clips, unless `first_frame` says otherwise."""
    return Curriculum((Phase(steps, batch, (Source(clips, frames, first_frame=first_frame),)),))
