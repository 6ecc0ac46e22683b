"""aapt_kernels._sim, the simulator's controls in Python."""

import pytest

from aapt_kernels import backend


@pytest.fixture
def sim():
    if backend.no_sim() is not None:
        pytest.skip(backend.no_sim())
    module = pytest.importorskip("aapt_kernels._sim")
    module.reset_options()
    yield module
    module.reset_options()


def test_options_last_as_long_as_their_block(sim):
    assert (sim.options().seed, sim.options().tma, sim.options().races) == (0, sim.LATE, True)
    with sim.configured(seed=3, tma=sim.RANDOM, races=False) as options:
        assert (options.seed, options.tma, options.races) == (3, sim.RANDOM, False)
        options.seed = 4
        assert sim.options().seed == 4
    assert (sim.options().seed, sim.options().tma, sim.options().races) == (0, sim.LATE, True)


def test_unknown_option_changes_nothing(sim):
    with pytest.raises(AttributeError), sim.configured(seed=3, speed=9):
        pass
    assert sim.options().seed == 0


def test_statistics(sim):
    names = {"blocks", "switches", "bulk_loads", "bulk_stores", "wgmmas", "accesses"}
    assert set(sim.statistics()) == names
    assert isinstance(sim.last_report(), str)
