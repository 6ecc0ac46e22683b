"""Equal random numbers in every test, and no more threads than cores."""

import os

# Read when PyTorch loads: threads that spin while they wait take the cores of other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


def pytest_configure(config):
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    share = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", share)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
