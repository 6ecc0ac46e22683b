"""Every op is tested with each backend that runs here, and with NaN in fresh memory."""

import pytest
import torch
from torch.utils import deterministic

from aapt_kernels import use_backend
from aapt_kernels.backend import no_sim, no_sm90

# Both run the sm_90a sources through the same host code.
KERNELS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=str(reason)))
    for name, reason in (("sim", no_sim()), ("cuda", no_sm90()))
]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    """The device of a backend that runs the hand-written kernels."""
    with use_backend(request.param):
        yield "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture
def schedule(monkeypatch):
    """schedule(seed=1, ...): how the simulator behaves, see its options; a device does as it
    likes."""

    def choose(**values):
        if no_sim():
            return
        options = pytest.importorskip("aapt_kernels._sim").options()
        for name, value in values.items():
            monkeypatch.setattr(options, name, value)

    return choose


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """torch.empty gives NaN, so an output that nobody writes cannot look right."""
    before = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    deterministic.fill_uninitialized_memory = before
