"""Every misuse of the GPU ends in a report, and does not affect the next launch."""

import faulthandler
import signal
import threading

import numpy as np
import pytest
import torch

from .simulator import nan_filled, read_bugs

BUGS = read_bugs("misuse.cuh")
REPORTS = {
    "TRANSPOSE_RACE": "race at smem",
    "NULL_POINTER": "out of bounds",
    "DIVISION_BY_ZERO": "division by zero",
    "STACK_OVERFLOW": "stack overflow",
    "ENDLESS_LOOP": "does not end",
    "ENDLESS_POLLING": "deadlock",
    "SHARED_OUT_OF_BOUNDS": "outside shared memory",
    "GLOBAL_OUT_OF_BOUNDS": "plain write of 4 bytes",
    "MISALIGNED_VECTOR": "misaligned",
    "BARRIER_ID": "expected a barrier id",
    "BARRIER_THREADS": "multiple of 32",
    "DIVERGENT_BARRIER": "warp divergence",
    "UNINITIALISED_MBARRIER": "is not initialised",
    "OVERWRITTEN_MBARRIER": "overwrites an mbarrier",
    "LOAD_AT_EXIT": "still under way",
    "HALF_WARPGROUP": "all four warps",
    "DIFFERENT_WGMMA": "different wgmma sequences",
    "DESCRIPTOR_OUTSIDE": "reads outside shared memory",
    "WGMMA_AT_EXIT": "with a wgmma in flight",
    "REGISTERS_DOWN": "80 registers asked for",
    "LOST_BARRIER": "32 of 64 threads have arrived",
    "GLOBAL_RACE": "race in global memory",
}


def transpose(simulator, bug="NO_BUG", **options):
    n = 64
    source = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    out = nan_filled(n, n)
    report = simulator.launch("run_transpose", source, out, n, BUGS[bug], **options)
    return report or np.testing.assert_array_equal(out, source.T)


def test_every_bug_is_listed():
    assert list(BUGS) == ["NO_BUG", *REPORTS]


@pytest.mark.parametrize("bug", REPORTS)
def test_planted_bug(simulator, bug):
    report = transpose(simulator, bug)
    assert report is not None and REPORTS[bug] in report, report
    assert transpose(simulator) is None


def test_reports_name_thread_and_line(simulator):
    report = transpose(simulator, "SHARED_OUT_OF_BOUNDS")
    assert report.startswith("block (0,0,0) thread 0 (warp 0 lane 0), misuse.cuh:"), report


def test_nothing_is_allowed_by_itself(simulator):
    simulator.launch("run_transpose", 0, 0, 0, 0)  # empty grid
    source = nan_filled(32, 32)
    report = simulator.launch("run_transpose", source, 0, 32, 0)
    assert "out of bounds" in report


def test_empty_grid(simulator):
    source = nan_filled(32, 32)
    assert "expected a grid" in simulator.launch("run_transpose", source, source, 0, 0)


def test_leaves_the_process_as_it_was(simulator):
    """Signal handlers, PyTorch and other threads are not affected."""
    enabled = faulthandler.is_enabled()
    handler = signal.getsignal(signal.SIGFPE)
    assert "division by zero" in transpose(simulator, "DIVISION_BY_ZERO")
    assert (faulthandler.is_enabled(), signal.getsignal(signal.SIGFPE)) == (enabled, handler)

    x = torch.randn(32, 32, requires_grad=True)
    (x @ x).sum().backward()
    assert x.grad.isfinite().all()
    with pytest.raises(RuntimeError):
        torch.zeros(3) @ torch.zeros(4)


def test_from_another_thread(simulator):
    reports = []
    thread = threading.Thread(
        target=lambda: reports.extend(
            [transpose(simulator, "STACK_OVERFLOW"), transpose(simulator)]
        )
    )
    thread.start()
    thread.join()
    assert "stack overflow" in reports[0] and reports[1] is None
