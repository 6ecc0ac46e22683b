"""Plants bugs into the source of block_causal_attention's backward: the simulator reports every
barrier, fence and reduction that is missing or wrong, and says what is wrong with it."""

import numpy as np
import pytest
import torch

from aapt_kernels import FrameLayout
from aapt_kernels.block_causal_attention import ref

from .simulator import CSRC, EAGER, LATE, RANDOM, Simulator, build, from_bf16, nan_filled, to_bf16

FOLDER = CSRC / "block_causal_attention"
KERNEL = FOLDER / "backward_keys_sm90.cu"
OTHERS = [FOLDER / "backward_rows_sm90.cu", FOLDER / "backward_queries_sm90.cu"]
DRIVER = CSRC.parent / "tests" / "sim" / "drivers" / "backward.cpp"
HEADERS = [
    path
    for folder in ("block_causal_attention", "attention")
    for path in sorted((CSRC / folder).glob("*.*h"))
] + sorted(FOLDER.glob("*.h"))
LAYOUT = FrameLayout(20, 150, 3, 1)
HEADS = 2

# By name: a text of the source, its replacement, and words of the report; None if only the
# gradients show the bug.
BUGS = {
    "scores are not fenced": (
        "ds[i][3]);\n    }\n    fence_proxy_async();",
        "ds[i][3]);\n    }",
        "without fence_proxy_async",
    ),
    "no barrier between scores and dq": (
        "bar_sync(kScores, 128 * C::kConsumers);",
        "",
        "is not ordered after the write by",
    ),
    "scores are stored in one place": (
        "share(ds_factor, shared_.ds[n_ % 2])",
        "share(ds_factor, shared_.ds[0])",
        None,
    ),
    "one place for scores, read and written": (
        "shared_.ds[n_ % 2]",
        "shared_.ds[0]",
        "is not ordered after the read by",
    ),
    "sums are not fenced": (
        "dq[4 * i + 3]};\n    }\n    fence_proxy_async();",
        "dq[4 * i + 3]};\n    }",
        "without fence_proxy_async",
    ),
    "cleared keys are not fenced": (
        "fence_proxy_async();\n    sync_group(group_);",
        "sync_group(group_);",
        "without fence_proxy_async",
    ),
    "repaired rows are not fenced": (
        "fence_proxy_async();\n      warp_sync();\n      release(&shared.q_full[stage]);",
        "warp_sync();\n      release(&shared.q_full[stage]);",
        "without fence_proxy_async",
    ),
    "edges are not repaired": (
        "mbar_arrive_expect_tx(dout_full,",
        "dout_full = &shared.dout_full[stage];\n      mbar_arrive_expect_tx(dout_full,",
        "deadlock",
    ),
    "no wait before the reduction": ("mbar_wait(&shared.dq_full, n % 2);", "", "deadlock"),
    "the reduction waits for one consumer": (
        "mbar_init(&shared.dq_full, 4 * C::kConsumers);",
        "mbar_init(&shared.dq_full, 4);",
        None,
    ),
    "sums overwritten while they leave": (
        "mbar_wait(&shared_.dq_empty, n_ % 2 ^ 1);",
        "",
        "is not ordered after the read by bulk store",
    ),
    "sums given back before they are read": (
        "tma_store_wait_read<0>();\n      mbar_arrive(&shared.dq_empty);",
        "mbar_arrive(&shared.dq_empty);\n      tma_store_wait_read<0>();",
        "is not ordered after the read by bulk store",
    ),
    "reductions are not committed": (
        "tma_store_commit();",
        "",
        "is not ordered after the read by bulk store",
    ),
    "nobody waits for the reductions": (
        "tma_store_wait_read<0>();",
        "",
        "is not ordered after the read by bulk store",
    ),
    "sums overwrite sums of other keys": (
        "bulk_reduce_add_f32(sums,",
        "bulk_store(sums,",
        "race in global memory",
    ),
    "all tiles into the first": ("++n, sums += C::Sums::kTile", "++n", None),
    "both halves into one": (
        "reinterpret_cast<float4*>(shared_.dq[group_])",
        "reinterpret_cast<float4*>(shared_.dq[0])",
        "is not ordered after the write by",
    ),
    "sums of the tile before": (
        "work.rows.begin, 0)",
        "work.rows.begin > 0 ? work.rows.begin - 1 : 0, 0)",
        None,
    ),
    "dout is not released": (
        "      release(&shared_.dout_empty[stage]);\n",
        "",
        "deadlock",
    ),
    "q released before dk is done": (
        "wgmma_wait<0>();\n        reg_fence(dk_);",
        "reg_fence(dk_);",
        "is not ordered after the read by wgmma",
    ),
    "dq read while it is multiplied": (
        "wgmma_wait<kTakesGradient ? 1 : 0>();\n        reg_fence(dq);",
        "reg_fence(dq);",
        "while a wgmma on it is in flight",
    ),
    "keys are not released": (
        "      release(&shared_.keys_empty);\n      store(work);",
        "      store(work);",
        "deadlock",
    ),
    "work overwritten while it is stored": (
        "Work& work = shared.work[key_tiles % 2];",
        "Work& work = shared.work[0];",
        "is not ordered after the read by thread",
    ),
    "lse not counted": (
        "mbar_arrive_expect_tx(q_full, sizeof(typename C::RowBlock) + kStats);",
        "mbar_arrive_expect_tx(q_full, sizeof(typename C::RowBlock));",
        "bytes to come",
    ),
    "edges are not hidden": (
        "if (edge_row >= 0) hide(",
        "if (false) hide(",
        None,
    ),
    "keys of the other warpgroup": (
        "smem_u32(shared_.k[group_])",
        "smem_u32(shared_.k[1 - group_])",
        None,
    ),
}


class Problem:
    def __init__(self):
        random = np.random.default_rng(0)
        shape = (LAYOUT.query_length, HEADS, 64)
        self.q, self.k, self.v, self.dout = (
            to_bf16(random.standard_normal(shape)) for _ in range(4)
        )
        exact = [torch.from_numpy(from_bf16(x))[None] for x in (self.q, self.k, self.v, self.dout)]
        arguments = (*LAYOUT.integers, 0.125, True)
        out, lse = ref.forward(*exact[:3], None, None, *arguments)
        self.lse = lse[0].float().numpy()
        self.out = to_bf16(out[0].numpy())
        gradients = ref.backward(
            exact[3], None, *exact[:3], out, lse, None, None, *arguments, False
        )
        self.gradients = [x[0].numpy() for x in gradients[:3]]

    def run(self, simulator, ctas=3, **options):
        """Returns the report, if any, else whether the gradients are right."""
        rows = LAYOUT.query_length
        tiles = -(-rows // 128)
        stats = nan_filled(2, HEADS, tiles * 128)
        sums = np.zeros((HEADS, tiles, 128 * 64), np.float32)
        results = [np.full_like(self.q, 0x7FC1) for _ in range(3)]
        inputs = (self.q, self.k, self.v, self.out, self.dout, self.lse)
        integers = (LAYOUT.text_tokens, LAYOUT.tokens_per_frame, LAYOUT.frames)
        report = simulator.launch(
            "run_backward",
            *(*inputs, stats, sums, *results),
            *(*integers, LAYOUT.window_frames, HEADS, ctas),
            **options,
        )
        if report:
            return report
        errors = [
            np.linalg.norm(from_bf16(ours) - exact) / np.linalg.norm(exact)
            for ours, exact in zip(results, self.gradients, strict=True)
        ]
        return bool(max(errors) < 2**-7)  # BF16 weights, their gradients and the results: 2^-9 each


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.fixture(scope="module")
def planted(request):
    """Returns planted(name): the simulator of the source with this bug, by default with none."""
    folder = request.config.cache.mkdir("simulator")

    def make(name=None):
        source = KERNEL.read_text()
        if name is not None:
            old, new, _ = BUGS[name]
            assert old in source, f"{name}: the source has changed"
            source = source.replace(old, new)
        # Keeps one head_dim and the kernel that adds: each other kernel takes as long to compile
        source = source.replace("run(launch<Config<128, true>>)", "nullptr")
        source = source.replace("run(launch<Config<128, false>>)", "nullptr")
        source = source.replace("run(launch<Config<64, false>>)", "nullptr")
        stem = "right" if name is None else f"bug{list(BUGS).index(name)}"
        path = folder / f"{stem}_sm90.cu"
        path.write_text(source)
        return Simulator(build(folder, [path, *OTHERS, DRIVER], HEADERS, stem))

    return make


def test_right_without_a_bug(planted, problem):
    simulator = planted()
    for seed, completion in enumerate((LATE, RANDOM, EAGER)):
        result = problem.run(simulator, seed=seed, tma=completion, wgmma=completion)
        assert result is True, result


# Each bug costs a compilation. Every run has these, of the barriers and the reduction.
QUICK = {
    "scores are not fenced",
    "no barrier between scores and dq",
    "one place for scores, read and written",
    "the reduction waits for one consumer",
    "sums overwritten while they leave",
    "cleared keys are not fenced",
    "sums overwrite sums of other keys",
    "q released before dk is done",
    "edges are not hidden",
}
NAMED = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in BUGS]


@pytest.mark.parametrize("name", NAMED)
def test_planted_bug(planted, problem, name):
    words = BUGS[name][2]
    results = [problem.run(planted(name), seed=seed) for seed in (1, 2)]
    for result in results:
        if words is None:
            assert result is not True
        else:
            assert isinstance(result, str) and words in result, result
