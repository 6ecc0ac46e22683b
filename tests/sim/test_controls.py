"""aapt_kernels._sim, the simulator's controls in Python."""

import pytest
import torch

from aapt_kernels import FrameLayout, backend, block_causal_attention, use_backend


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
    names |= {"loaded_bytes", "stored_bytes"}
    assert set(sim.statistics()) == names
    assert isinstance(sim.last_report(), str)


def attend(sim, layout, head_dim=128, **options):
    """Forward and backward of block-causal attention in the simulator."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, layout.query_length, 1, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(3))
    q.requires_grad_()
    with sim.configured(multiprocessors=2, **options), use_backend("sim"):
        block_causal_attention(q, k, v, layout).sum().backward()


def test_a_kernel_without_its_registers_hangs(sim):
    """168 registers per thread are what setmaxnreg of three warpgroups needs."""
    layout = FrameLayout(0, 64, 1, 0)
    attend(sim, layout, registers=168)
    with pytest.raises(RuntimeError, match="the register file is exhausted"):
        attend(sim, layout, registers=160)
    with pytest.raises(RuntimeError, match="the register file is exhausted"):
        attend(sim, layout, head_dim=64, registers=120)  # the forward has four, and needs 128


def test_attention_has_no_bank_conflicts(sim):
    """Zeroing of hidden rows aside: two of a warp's eight rows at a time share banks."""
    sim.banks()
    attend(sim, FrameLayout(0, 128, 2, 1), banks=True)
    places = sim.banks()
    assert len(places) >= 5
    slow = {place for place, (_, least, cycles) in places.items() if cycles != least}
    assert {place.partition(":")[0] for place in slow} <= {"finite.cuh"}


def test_bytes_that_copies_move(sim):
    """One tile of queries against one of keys: each is loaded once, the result stored once."""
    with sim.configured(multiprocessors=1), use_backend("sim"), torch.no_grad():
        q = torch.randn(1, 128, 1, 128).bfloat16()
        block_causal_attention(q, q, q, FrameLayout(0, 128, 1, 0))
    tile = 128 * 128 * 2
    assert sim.statistics()["loaded_bytes"] == 3 * tile
    assert sim.statistics()["stored_bytes"] == tile
