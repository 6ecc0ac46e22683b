"""A whole pipeline is right under every schedule without bugs, and planted bugs are reported."""

import numpy as np
import pytest

from .simulator import EAGER, LATE, RANDOM, from_bf16, nan_filled, read_bugs, to_bf16

BUGS = read_bugs("attention.cuh")

# Words of the report, by planted bug; None if only the result shows the bug.
REPORTS = {
    "MAP_SWIZZLE": "swizzle mode 3, but TMA filled",
    "DESCRIPTOR_SWIZZLE": "swizzle mode 2, but TMA filled",
    "DESCRIPTOR_STRIDE": None,
    "FRAGMENT_INDEX": None,
    "ROW_REDUCTION": None,
    "NO_INIT_FENCE": "not followed by fence_barrier_init",
    "PRODUCER_PARITY": "deadlock",
    "NO_EMPTY_WAIT": "more arrivals than its count",
    "TRANSACTION_BYTES": "bytes to come -8192",
    "NO_WGMMA_WAIT": "while a wgmma on it is in flight",
    "NO_FULL_WAIT": "race at smem",
    "CONSUMER_PARITY": "deadlock",
    "NO_WGMMA_FENCE": "without wgmma_fence",
    "EARLY_RELEASE": "is not ordered after the read by wgmma",
    "FRAGMENT_REUSED": "A-fragment registers",
    "ACCUMULATOR_TOUCHED": "while a wgmma on it is in flight",
    "NO_BARRIER_BEFORE_OVERWRITE": "is not ordered after the read by wgmma",
    "STORE_SWIZZLE": None,
    "NO_PROXY_FENCE": "without fence_proxy_async",
    "NO_BARRIER_BEFORE_STORE": "read by bulk store of thread",
    "NO_STORE_WAIT": "may still read shared memory",
    "NO_STORE_COMMIT": "may still read shared memory",
    "TOO_MANY_REGISTERS": "the register file is exhausted",
    "BARRIER_COUNT": "128 of 256 threads have arrived",
    "ALL_LANES_RELEASE": "deadlock",
    "NO_COMMIT": "while a wgmma on it is in flight",
    "WAIT_DEPTH": "while a wgmma on it is in flight",
    "VALUE_STRIDE": None,
    "VALUE_STAGE": "race at smem",
    "VALUE_PARITY": "deadlock",
    "PLAIN_ARRIVE": "race at smem",
    "WRONG_BARRIER": "deadlock",
    "NO_INIT_SYNC": "race at smem",
    "EVERY_LANE_LOADS": "more arrivals than its count",
    "ALWAYS_ACCUMULATE": None,
    "DIVERGENT_SHUFFLE": "warp divergence",
    "ACCUMULATOR_READ": "is read while a wgmma on it is in flight",
    "LSE_OUT_OF_BOUNDS": "race in global memory",
    "LATE_PROXY_FENCE": "before the barrier that orders them",
}
# Found by some schedules only
BY_SEED = ["SHARED_BARRIER"]


def run(simulator, head_dim, queries, keys, bug=0, **options):
    """Returns the report, or the relative error of the output and the largest error of lse."""
    heads = 2
    random = np.random.default_rng(0)
    q, k, v = (
        to_bf16(random.standard_normal((heads, length, head_dim)))
        for length in (queries, keys, keys)
    )
    out, lse = np.full_like(q, 0x7FC1), nan_filled(heads, queries)
    scale = head_dim**-0.5
    report = simulator.launch(
        "run_attention", head_dim, q, k, v, out, lse, heads, queries, keys, scale, bug, **options
    )
    if report:
        return report
    scores = from_bf16(q) @ from_bf16(k).swapaxes(1, 2) * scale
    high = scores.max(-1, keepdims=True)
    weights = np.exp(scores - high)
    total = weights.sum(-1, keepdims=True)
    expected = weights @ from_bf16(v) / total
    error = np.linalg.norm(from_bf16(out) - expected) / np.linalg.norm(expected)
    return error, np.abs(lse - (high + np.log(total))[..., 0]).max()


def is_right(result) -> bool:
    # BF16 probabilities and output: 2^-9 each; lse is float32 throughout.
    return not isinstance(result, str) and result[0] < 2**-8 and result[1] < 5e-6


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("queries, keys", [(1, 1), (128, 128), (129, 127), (200, 333)])
def test_right(machine, head_dim, queries, keys):
    assert is_right(result := run(machine, head_dim, queries, keys)), result


@pytest.mark.parametrize("seed", range(1, 9))
def test_no_false_alarm(simulator, seed):
    options = [(RANDOM, RANDOM), (EAGER, EAGER), (LATE, LATE), (RANDOM, LATE)][seed % 4]
    result = run(simulator, 64, 150, 400, seed=seed, tma=options[0], wgmma=options[1])
    assert is_right(result), result


def test_without_race_checks(simulator):
    assert is_right(result := run(simulator, 64, 150, 400, races=False)), result
    assert simulator.statistics.accesses == 0 and simulator.statistics.wgmmas > 0


def test_every_bug_is_listed():
    assert list(BUGS) == ["NO_BUG", *REPORTS, *BY_SEED]


@pytest.mark.parametrize("bug", REPORTS)
def test_planted_bug(simulator, bug):
    words = REPORTS[bug]
    result = run(simulator, 64 if words else 128, 200, 600, BUGS[bug])
    if words is None:
        assert not isinstance(result, str) and not is_right(result), result
    else:
        assert isinstance(result, str) and words in result, result


@pytest.mark.parametrize("bug", ["NO_FULL_WAIT", "EARLY_RELEASE", "NO_EMPTY_WAIT"])
@pytest.mark.parametrize("completion", [EAGER, RANDOM, LATE])
@pytest.mark.parametrize("seed", [1, 2])
def test_races_do_not_depend_on_the_schedule(simulator, bug, completion, seed):
    result = run(simulator, 64, 64, 600, BUGS[bug], seed=seed, tma=completion, wgmma=completion)
    assert isinstance(result, str), result


@pytest.mark.parametrize("bug", BY_SEED)
def test_planted_bug_under_several_schedules(simulator, bug):
    results = [run(simulator, 64, 128, 128, BUGS[bug], seed=seed) for seed in range(1, 9)]
    assert any(isinstance(result, str) for result in results)


def test_lse_beyond_the_last_block(simulator):
    """Nothing races after the last block of the last head: only the bounds check reports."""
    random = np.random.default_rng(0)
    q = to_bf16(random.standard_normal((1, 100, 64)))
    out, lse = np.full_like(q, 0x7FC1), nan_filled(1, 100)
    report = simulator.launch(
        "run_attention", 64, q, q, q, out, lse, 1, 100, 100, 0.125, BUGS["LSE_OUT_OF_BOUNDS"]
    )
    assert "plain write" in report and "out of bounds" in report, report
    assert "attention.cuh:" in report, report
