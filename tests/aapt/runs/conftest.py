"""One thread for every test of runs."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Ranks have one thread, and their results are compared byte for byte with those of tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
