import platform
import shutil

import pytest
import torch

from . import gpu, simulator


@pytest.fixture(scope="session", name="simulator")
def simulated(request):
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("the simulator needs g++ on x86-64")
    return simulator.Simulator(simulator.build(request.config.cache.mkdir("simulator")))


@pytest.fixture(scope="session")
def sm90(tmp_path_factory):
    return gpu.Gpu(gpu.build(tmp_path_factory.mktemp("sm90")))


def has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture(params=["simulator", "sm90"] if has_hopper() else ["simulator"])
def machine(request):
    """Machines that must agree without bugs: the simulator and a Hopper GPU, if any."""
    return request.getfixturevalue(request.param)
