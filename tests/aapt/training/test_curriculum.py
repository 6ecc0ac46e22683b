"""Curricula: the clips of every update."""

import pytest
import torch

from aapt.data.clips import LatentClips
from aapt.training.curriculum import Curriculum, Phase, Source, constant

from ..helpers import clips, draws


def test_phases_follow_each_other():
    first, second = (Phase(steps, batch, ()) for steps, batch in ((3, 8), (2, 4)))
    curriculum = Curriculum((first, second))
    assert curriculum.steps == 5
    assert [curriculum.phase(step).batch for step in range(6)] == [8, 8, 8, 4, 4, 4]
    assert constant("clips", frames=4, batch=2, steps=9).steps == 9


def test_one_update_draws_from_one_source():
    """The clips of an update have one size and length, on all ranks alike.

    Over many updates, sources come in proportion to their weights, and all lengths occur.
    """
    large = LatentClips(torch.zeros(2, 4, 9, 8, 8), torch.zeros(2, 8, 2), [("a",)] * 2)
    phase = Phase(1, 2, (Source("small", 5, shortest=3, weight=3.0), Source("large", 2)))
    sets, seen = {"small": clips(), "large": large}, []
    for step in range(200):
        batch = phase.sample(sets, draws(2, step=step))
        alone = phase.sample(sets, draws(1, step=step))
        torch.testing.assert_close(alone.latents, batch.latents[:1])
        seen.append(tuple(batch.targets.shape[2:4]))
    assert set(seen) == {(3, 4), (4, 4), (5, 4), (2, 8)}
    assert seen.count((2, 8)) / len(seen) == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize(
    ("sources", "starts"),
    [
        ((Source("clips", 4),), {0}),
        ((Source("clips", 4, first_frame="never"),), {1, 2}),
        (constant("clips", frames=4, batch=1, steps=1).phases[0].sources, {0, 1, 2}),
        (constant("clips", 4, 1, 1, first_frame="always").phases[0].sources, {0}),
    ],
    ids=["always", "never", "constant", "constant-always"],
)
def test_the_start_of_a_window_is_the_sources_choice(sources, starts):
    batch = Phase(1, 100, sources).sample({"clips": clips(length=7)}, draws(100))
    assert {start for _, start in batch.windows} == starts


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 0}, "frames: expected 1 or more, got 0"),
        ({"shortest": 5}, "shortest: expected 1 to 4 frames, got 5"),
        ({"shortest": 0}, "shortest: expected 1 to 4 frames, got 0"),
        ({"weight": 0.0}, "weight: expected a finite number above 0, got 0.0"),
        ({"weight": float("inf")}, "weight: expected a finite number above 0, got inf"),
    ],
)
def test_windows_that_cannot_be_drawn(change, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        Source(**{"clips": "clips", "frames": 4} | change)
