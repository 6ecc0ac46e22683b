"""Plants bugs into the source of cached_attention for a cache of E4M3: results or a report of the
simulator show each."""

import numpy as np
import pytest
import torch

from ..kernels.oracles import attend
from .simulator import (
    CSRC,
    EAGER,
    LATE,
    RANDOM,
    Simulator,
    build,
    from_bf16,
    from_e4m3,
    nan_filled,
    to_bf16,
)

FOLDER = CSRC / "cached_attention"
HEADERS = sorted([*FOLDER.glob("*.*h"), *FOLDER.glob("*.h"), *(CSRC / "attention").iterdir()])
DRIVER = CSRC.parent / "tests" / "sim" / "drivers" / "cached.cpp"
# Slots, and so tiles, begin and end inside a group of 16 keys
TEXT, TOKENS, RING, HEADS, HEAD_DIM = 151, 151, 9, 2, 128
TEXT_LENGTH, STEP, MULTIPROCESSORS = 21, 8, 1
PARTS = MULTIPROCESSORS * 4

PRODUCT = "reg_fence(sums);\n      wgmma_fence();\n      multiply_pv(sums, p, ring_.values("
ADDITION = PRODUCT.replace("reg_fence(sums)", "scale_rows(out_, rescale)").replace("sums", "out_")
WAIT = "      wgmma_wait<{}>();\n      reg_fence(scores);\n"
KEYS = "      ring_.release_keys({});\n"
# By name: texts of the source with their replacements, and words of the report, None if only the
# results show the bug.
BUGS = {
    "keys by the first head's scale": ([("params_.k_scale + piece.head", "params_.k_scale")], None),
    "values by the first head's scale": (
        [("params_.v_scale + piece.head", "params_.v_scale")],
        None,
    ),
    "queries without their own scale": (
        [
            ("scales_[i].of_row[0] *= factor", "scales_[i].of_row[0] = factor"),
            ("scales_[i].of_row[1] *= factor", "scales_[i].of_row[1] = factor"),
        ],
        None,
    ),
    "a row takes the scale of another": ([("lane / 4 + 8", "lane / 4")], None),
    "the sink meets q": ([("[C::kSinkQuery && tile.in_sink]", "[0]")], None),
    "keys in plain order": (
        [("token, 4 * token, 2 * token,", "token, 2 * token, 8 * token,")],
        None,
    ),
    "weights of exchanged rows": ([("+ i % 2 * 2;", "+ (1 - i % 2) * 2;")], None),
    "weights without an offset": ([("kWeightLog2 = 8.0f", "kWeightLog2 = 0.0f")], None),
    "weights that are cut": ([("kWeightLog2 = 8.0f", "kWeightLog2 = 9.0f")], None),
    "sums that stay in the tensor core": (
        [
            (f"{PRODUCT}before))", f"{ADDITION}before))"),
            (f"{PRODUCT}last))", f"{ADDITION}last))"),
            ("advance(v_desc, i * kE4m3Depth), i != 0)", "advance(v_desc, i * kE4m3Depth), 1)"),
            ("out_[i] = out_[i] * rescale[i / 2 % 2] + sums[i];", "(void)sums, (void)rescale;"),
        ],
        None,
    ),
    "sums of the next maximum": (
        [("promote(sums, rescale);\n      rescale[0]", "promote(sums, next);\n      rescale[0]")],
        None,
    ),
    "keys before the interval are seen": ([("key < hidden || ", "")], None),
    "keys after the interval are seen": ([(" || key >= visible", "")], None),
    "values of nobody stay": ([("begin <= 0 && end >= 16", "begin <= 0")], None),
    "a word of values is taken for another": ([("begin - 4, end - 4", "begin, end")], None),
    "queries seen before they are rounded": (
        [("    fence_proxy_async();\n    sync_group(group_);", "    sync_group(group_);")],
        "without fence_proxy_async",
    ),
    "queries given back before they are read": (
        [
            ("    sync_group(group_);\n    release(&shared_.q_empty);", "    sync_group(group_);"),
            (
                "    const float factor = params_",
                "    release(&shared_.q_empty);\n    const float factor = params_",
            ),
        ],
        "is not ordered after the",
    ),
    "the first keys given back before the scores are there": (
        [(WAIT.format(0) + KEYS.format("first"), KEYS.format("first") + WAIT.format(0))],
        "is not ordered after the read by wgmma",
    ),
    "values given back before the sums are there": (
        [
            ("      float next[2];", "      ring_.release_values(before);\n      float next[2];"),
            ("      ring_.release_values(before);\n      promote", "      promote"),
        ],
        "is not ordered after the read by wgmma",
    ),
    "scores seen before they are there": (
        [("      wgmma_wait<1>();\n", "")],
        "while a wgmma on it is in flight",
    ),
    "sums promoted before they are there": (
        [
            (
                "wgmma_wait<0>();\n      reg_fence(sums);\n      ring_.release_values(before);",
                "reg_fence(sums);",
            )
        ],
        "while a wgmma on it is in flight",
    ),
}

# In the loop this is not a fault. The next keys of a stage are fetched after the values of an
# earlier tile, and a consumer gives the stage of these back in a turn that has waited for the
# scores too.
ORDERED = {
    "keys given back before the scores are there": [
        (WAIT.format(1) + KEYS.format("i"), KEYS.format("i") + WAIT.format(1))
    ]
}

CHANGES = {name: changes for name, (changes, _) in BUGS.items()} | ORDERED


def e4m3(x):
    return torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


class Problem:
    """A step before the ring is full: one slot, padding of the text and of the memory are NaN.

    One key weighs as much as thousands, values are 1 or 2: small weights and sums matter."""

    def __init__(self):
        random = np.random.default_rng(0)
        capacity = TEXT + (1 + RING) * TOKENS
        self.keys = keys = -(-capacity // 16) * 16
        q = random.standard_normal((2, TOKENS, HEADS, HEAD_DIM))
        q[..., 0] = 8
        self.q, self.q_sink = map(to_bf16, q)
        k = random.standard_normal((HEADS, keys, HEAD_DIM))
        v = np.where(random.random((HEADS, HEAD_DIM, keys)) < 0.5, 1.0, 2.0)
        seen = np.zeros(keys, bool)
        seen[TEXT - TEXT_LENGTH : TEXT + (STEP + 1) * TOKENS] = True
        k[:, TEXT + TOKENS + 100, 0] = 12
        self.k_scale = np.array([0.02, 0.03], np.float32)
        self.v_scale = np.array([0.01, 0.05], np.float32)
        self.k = e4m3(k / self.k_scale[:, None, None])
        self.v = e4m3(v / self.v_scale[:, None, None])
        self.k[:, ~seen], self.v[..., ~seen] = 0x7F, 0x7F
        tensors = [torch.from_numpy(from_bf16(x))[None] for x in (self.q, self.q_sink)]
        k, v = from_e4m3(self.k), from_e4m3(self.v.swapaxes(1, 2))
        k, v = (
            torch.from_numpy((x * scale[:, None, None]).swapaxes(0, 1).copy())[None]
            for x, scale in ((k, self.k_scale), (v, self.v_scale))
        )
        self.out, self.lse = attend(
            tensors[0],
            k,
            v,
            torch.from_numpy(seen)[None],
            HEAD_DIM**-0.5,
            q_sink=tensors[1],
            sink=slice(TEXT, TEXT + TOKENS),
            e4m3=True,
        )

    def run(self, simulator, **options):
        """Return the report, if any, else the errors of the results."""
        out, lse = np.full_like(self.q, 0x7FC1), nan_filled(HEADS, TOKENS)
        report = simulator.launch(
            "run_cached",
            *(self.q, self.q_sink, self.k, self.v),
            *(np.array([STEP], np.int64), np.array([TEXT_LENGTH], np.int64)),
            *(self.k_scale, self.v_scale, out, lse),
            *(np.zeros(64, np.uint32), nan_filled(PARTS * 64 * HEAD_DIM)),
            nan_filled(PARTS * 128),
            *(TEXT, TOKENS, RING, HEADS, MULTIPROCESSORS),
            **options,
        )
        if report:
            return report
        error = np.linalg.norm(from_bf16(out) - self.out[0].numpy()) / self.out.norm()
        return float(error), float(np.abs(lse - self.lse[0].numpy()).max())


def is_right(result) -> bool:
    return not isinstance(result, str) and result[0] < MOST_ERROR and result[1] < MOST_LSE


MOST_ERROR = 4e-3  # BF16 results, and weights rounded at another maximum
MOST_LSE = 0.015  # the tensor core adds 127 small products to a large one, with 13 bits


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.fixture(scope="module")
def planted(request):
    """Returns planted(name): the simulator of the source with these CHANGES, by default none."""
    folder = request.config.cache.mkdir("simulator")

    def make(name=None):
        source = (FOLDER / "cached_attention_e4m3_sm90.cu").read_text()
        text = (FOLDER / "e4m3.cuh").read_text().replace("#pragma once", "")
        source = source.replace('#include "cached_attention/e4m3.cuh"', text)
        for old, new in CHANGES.get(name, ()):
            assert source.count(old) == 1, f"{name}: the source has changed"
            source = source.replace(old, new)
        # Keeps one kernel: the other takes as long to compile
        every = "launch<Config<4, false>>(params"
        assert every in source
        source = source.replace(every, "launch<Config<3, true>>(params")
        stem = "cached" if name is None else f"cached{list(CHANGES).index(name)}"
        path = folder / f"{stem}_sm90.cu"
        path.write_text(source)
        return Simulator(build(folder, [path, DRIVER], HEADERS, stem))

    return make


def test_right_without_a_bug(planted, problem):
    simulator = planted()
    for seed, completion in enumerate((LATE, RANDOM, EAGER)):
        result = problem.run(simulator, seed=seed, tma=completion, wgmma=completion)
        assert is_right(result), result


@pytest.mark.parametrize("name", ORDERED)
def test_what_another_wait_orders_is_no_fault(planted, problem, name):
    simulator = planted(name)
    for seed, completion in enumerate((LATE, RANDOM, EAGER)):
        result = problem.run(simulator, seed=seed, tma=completion, wgmma=completion)
        assert is_right(result), result


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_shows(planted, problem, name):
    words, simulator = BUGS[name][1], planted(name)
    results = [problem.run(simulator, seed=seed) for seed in (1, 2)]
    for result in results:
        if words is None:
            assert not isinstance(result, str) and not is_right(result), result
        else:
            assert isinstance(result, str) and words in result, result
