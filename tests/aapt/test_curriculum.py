"""Curricula: which update learns from which clips."""

import pytest
import torch

from aapt.curriculum import Curriculum, Phase, Source, constant
from aapt.data.clips import LatentClips
from aapt.recipes import paper_8b

from .helpers import clips, draws


def test_phases_follow_each_other():
    first, second = (Phase(steps, batch, ()) for steps, batch in ((3, 8), (2, 4)))
    curriculum = Curriculum((first, second))
    assert curriculum.steps == 5
    assert [curriculum.phase(step).batch for step in range(6)] == [8, 8, 8, 4, 4, 4]
    assert constant("clips", frames=4, batch=2, steps=9).steps == 9


def test_one_update_draws_from_one_source():
    """Clips of one update are of one size and length, the same on every rank; over many updates
    sources come in proportion to their weights, and all lengths come up."""
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


def test_the_papers_numbers():
    """SPEC 6-8, a second being six latent frames."""
    stages = paper_8b().stages
    phases = stages["diffusion"].curriculum.phases
    assert [(phase.steps, phase.batch) for phase in phases] == [
        (20_000, 256),
        (6_000, 128),
        (4_000, 32),
    ]
    assert stages["consistency"].curriculum.steps == 5_000
    assert stages["consistency"].times == 32 and stages["consistency"].shift == 24
    seconds = {}
    for name in ("adversarial", "extension", "extension-5"):
        config = stages[name]
        further = (config.segments - 1) * (config.segment_frames - config.overlap_frames)
        seconds[name] = (config.segment_frames + further) / 6
        assert (config.steps, config.penalty, config.perturbation) == (500, 1000, 0.1)
    assert seconds == {"adversarial": 10, "extension": 19, "extension-5": 55}
    rates = [stages[name].generator_schedule(0, 500) for name in seconds]
    assert rates == [3e-6, 1e-5, 1e-5] and stages["extension"].batch == 64
