"""Every op is tested with each backend that runs here, and with NaN in fresh memory."""

import pytest
import torch
from torch.utils import deterministic

from aapt_kernels import use_backend


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """torch.empty gives NaN, so an output that nobody writes cannot look right."""
    before = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    deterministic.fill_uninitialized_memory = before
