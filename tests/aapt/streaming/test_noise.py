"""Counter-based noise: the published vectors, and what a normal distribution must be."""

import pytest
import torch

from aapt.streaming.noise import MULTIPLIERS, ROUNDS, WORD, Noise, philox, round_keys

# Known answers of philox4x32-10 from Random123: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_published_vectors(counter, key, words):
    keys = round_keys(key[0] | key[1] << 32)
    assert keys.shape == (ROUNDS, 2, 1)
    multipliers = torch.tensor(MULTIPLIERS)[:, None]
    made = philox(torch.tensor(counter)[:, None], keys, multipliers)
    assert made.flatten().tolist() == list(words)


def test_noise_is_a_function_of_seed_and_step():
    shape = (1, 3, 1, 5, 7)  # 105 numbers: no multiple of four
    noise = Noise(2**63 - 1, shape)
    assert noise(7).shape == shape and noise(7).dtype == torch.float32
    later = [noise(step) for step in (7, 8, 2**32 + 7, torch.tensor(7))]
    assert torch.equal(later[0], later[3]) and torch.equal(later[0], noise(7))
    different = [*later[:3], Noise(2**62, shape)(7), Noise(2**31 - 1, shape)(7)]
    values = torch.stack(different).flatten(1)
    assert len({tuple(row.tolist()) for row in values}) == len(different)


def test_noise_is_standard_normal_and_independent():
    noise = Noise(3, (64, 63))
    x = torch.stack([noise(step) for step in range(200)]).double()
    count = x.numel()
    moments = [x.mean(), x.var() - 1, (x**3).mean(), (x**4).mean() - 3]
    deviations = [1, 2**0.5, 15**0.5, 96**0.5]
    for moment, deviation in zip(moments, deviations):
        assert abs(moment) < 5 * deviation / count**0.5
    assert torch.isfinite(x).all() and x.abs().max() > 4.5
    flat = x.flatten(1)
    for a, b in (
        (flat[1:], flat[:-1]),
        (flat[:, 1:], flat[:, :-1]),
        (flat[:, 2000:4000], flat[:, :2000]),
    ):
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5
