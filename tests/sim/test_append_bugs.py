"""Plants bugs into the source of kv_append for a cache of E4M3: bytes of the cache, queries or a
report of the simulator show each."""

import numpy as np
import pytest
import torch

from aapt_kernels import KVCache, kv_append, use_backend

from .simulator import CSRC, EAGER, LATE, RANDOM, Simulator, build, from_bf16, to_bf16

FOLDER = CSRC / "kv_append"
HEADERS = sorted(FOLDER.glob("*.*h")) + sorted(FOLDER.glob("*.h"))
DRIVER = CSRC.parent / "tests" / "sim" / "drivers" / "append.cpp"
TEXT, TOKENS, RING, HEADS, HEAD_DIM = 5, 135, 3, 2, 64

# By name: a text of the source, its replacement, and words of the report, None if only the results
# show the bug.
BUGS = {
    "values by the first head's scale": ("params.v_scale + head)", "params.v_scale)", None),
    "keys times their scale": (
        "1.0f / load_readonly(params.k_scale + at.head)",
        "load_readonly(params.k_scale + at.head)",
        None,
    ),
    "a step of the Hadamard matrix is missing": (
        "step < kLanes<kHeadDim>; step *= 2",
        "step < kLanes<kHeadDim> / 2; step *= 2",
        None,
    ),
    "lanes exchange their signs": ("step ? -1.0f : 1.0f", "step ? 1.0f : -1.0f", None),
    "queries keep their channels": ("spread<C>(params, rotated, 1.0f);", ";", None),
    "columns are exchanged": (
        "tile.at(octet * kVector + j, word)",
        "tile.at(octet + j * Tile::kOctets, word)",
        None,
    ),
    "words over the neighbours' keys": (
        "if (key >= begin && key + kWordKeys <= end)",
        "if (key < end)",
        None,
    ),
    "tiles begin where the slot begins": (
        "(begin / Tile::kKeys + index) * Tile::kKeys",
        "begin + index * Tile::kKeys",
        "misaligned",
    ),
    "columns read before they are whole": (
        "    cta_sync();\n    for (int i = threadIdx.x; i < kHeadDim",
        "    for (int i = threadIdx.x; i < kHeadDim",
        "is not ordered after the write by",
    ),
    "the next tile over one that is read": (
        "begin, end);\n    }\n    cta_sync();",
        "begin, end);\n    }",
        "is not ordered after the",
    ),
    "the slot of the frame before": ("frame * keys), end =", "0), end =", "race in global memory"),
}


def memory(x):
    """All bytes behind a cache, the padding of its rows included."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).numpy()


class Problem:
    """Two frames of a step that goes round the ring, on a device of one multiprocessor."""

    def __init__(self):
        random = np.random.default_rng(0)
        shape = (2 * TOKENS, HEADS, HEAD_DIM)
        self.inputs = [to_bf16(random.standard_normal(shape)) for _ in range(3)]
        cache = KVCache(
            *(1, 1, HEADS, HEAD_DIM),
            **dict(text_tokens=TEXT, tokens_per_frame=TOKENS, window_frames=RING - 1),
            **dict(dtype=torch.float8_e4m3fn, use_hadamard=True),
        )
        cache.step.fill_(3)
        cache.k_scale[0] = torch.tensor([0.03, 0.05])
        cache.v_scale[0] = torch.tensor([0.07, 0.02])
        self.scales = [x[0].numpy() for x in cache.scales(slice(0, 1))]
        for x in (cache.k, cache.v):
            memory(x)[:] = 0x35  # not what is written
        self.before = [memory(x).copy() for x in (cache.k, cache.v)]
        q, k, v = (torch.from_numpy(from_bf16(x))[None].bfloat16() for x in self.inputs)
        with use_backend("reference"):
            self.q = kv_append(q, k, v, cache, 0, None, None, None, None)[0].double().numpy()
        self.after = [memory(x).copy() for x in (cache.k, cache.v)]

    def run(self, simulator, **options):
        """Return the report, if any, else whether cache and queries are right."""
        cache = [x.copy() for x in self.before]
        q = np.full_like(self.inputs[0], 0x7FC1)
        step = np.array([3], np.int64)
        report = simulator.launch(
            "run_append",
            *(*self.inputs, *cache, step, *self.scales, q),
            *(TEXT, TOKENS, RING, 2, HEADS, 1),
            **options,
        )
        if report:
            return report
        keys = [
            torch.from_numpy(x).view(torch.float8_e4m3fn).double()
            for x in (cache[0], self.after[0])
        ]
        # The reference rounds a key to BF16 before it rounds to E4M3
        close = float((keys[0] - keys[1]).norm() / keys[1].norm()) < 0.02
        q_error = np.linalg.norm(from_bf16(q) - self.q) / np.linalg.norm(self.q)
        return bool(close and q_error < 2**-7 and np.array_equal(cache[1], self.after[1]))


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.fixture(scope="module")
def planted(request):
    """Returns planted(name): the simulator of the source with this bug, by default with none."""
    folder = request.config.cache.mkdir("simulator")

    def make(name=None):
        source = (FOLDER / "kv_append_sm90.cu").read_text()
        for header in ("values.cuh", "rows.cuh"):
            text = (FOLDER / header).read_text().replace("#pragma once", "")
            line = f'#include "kv_append/{header}"'
            source = source.replace(line, text, 1).replace(line, "")
        if name is not None:
            old, new, _ = BUGS[name]
            assert source.count(old) == 1, f"{name}: the source has changed"
            source = source.replace(old, new)
        # Keeps one kernel: each other takes as long to compile
        every = "(e4m3 ? launch<true> : launch<false>)"
        assert every in source
        source = source.replace(every, "launch_kernel<Config<64, false, true, float>>")
        stem = "append" if name is None else f"append{list(BUGS).index(name)}"
        path = folder / f"{stem}_sm90.cu"
        path.write_text(source)
        return Simulator(build(folder, [path, DRIVER], HEADERS, stem))

    return make


def test_right_without_a_bug(planted, problem):
    simulator = planted()
    for seed, completion in enumerate((LATE, RANDOM, EAGER)):
        result = problem.run(simulator, seed=seed, tma=completion, wgmma=completion)
        assert result is True, result


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_shows(planted, problem, name):
    words, simulator = BUGS[name][2], planted(name)
    results = [problem.run(simulator, seed=seed) for seed in (1, 2)]
    for result in results:
        if words is None:
            assert result is False, result
        else:
            assert isinstance(result, str) and words in result, result
