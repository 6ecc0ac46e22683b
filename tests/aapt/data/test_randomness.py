"""Random numbers belong to a clip of an update, whichever rank draws them."""

import pytest
import torch

from aapt.data.randomness import ClipRandom


def test_a_rank_draws_the_numbers_that_one_rank_would_draw():
    whole, share = ClipRandom(3, 7, range(6)), ClipRandom(3, 7, range(2, 4))
    assert len(whole) == 6 and len(share) == 2
    for draw in (
        lambda random: random.normal(2, 3),
        lambda random: random.uniform(),
        lambda random: torch.tensor(random.integers(1000)),
        lambda random: torch.tensor(random.integers([5, 6] * (len(random) // 2))),
        lambda random: random.normal(4),
    ):
        torch.testing.assert_close(draw(share), draw(whole)[2:4], rtol=0, atol=0)
    assert whole.shared.random() == share.shared.random()


@pytest.mark.parametrize("other", [(4, 7), (3, 8)])
def test_seeds_and_updates_differ(other):
    assert not torch.equal(
        ClipRandom(3, 7, range(2)).normal(4), ClipRandom(*other, range(2)).normal(4)
    )


def test_distributions():
    random = ClipRandom(0, 0, range(2000))
    normal, uniform = random.normal(8), random.uniform(8)
    assert normal.dtype == uniform.dtype == torch.float32
    assert normal.mean().abs() < 0.03 and (normal.std() - 1).abs() < 0.03
    assert normal.T.corrcoef().fill_diagonal_(0).abs().max() < 0.1
    assert 0 <= uniform.min() and uniform.max() < 1 and (uniform.mean() - 0.5).abs() < 0.02
    assert set(random.integers(3)) == {0, 1, 2}
    assert random.integers([1] * 2000) == [0] * 2000


def test_no_clip_draws_what_all_share():
    random = ClipRandom(0, 0, range(3))
    shared = random.shared.random(dtype="float32")
    assert shared not in random.uniform().tolist()
