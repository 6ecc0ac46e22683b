"""Equal random numbers in every test, and no more threads than cores."""

import os

# Read when PyTorch loads: threads that spin while they wait take the cores of other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Files that take minutes come first, so that no process is left with one at the end.
LONG = (
    "tests/kernels/test_triton_interpreter.py",
    "tests/aapt/runs/test_run.py",
    "tests/build/test_triton_kernels.py",
    "tests/kernels/test_block_causal_attention_sm90.py",
    "tests/aapt/runs/test_parallel_stages.py",
    "tests/docs/test_post_training_page.py",
    "tests/sim/test_cached_bugs.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


def pytest_configure(config):
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    share = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", share)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
