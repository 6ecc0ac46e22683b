"""Schedules, updates and averages against closed forms."""

import math

import pytest
import torch
from torch import nn

from aapt.training import optimization
from aapt.training.optimization import MovingAverage, MuonAdamW, Schedule, update


def test_warmup_is_linear():
    rate = Schedule(8.0, warmup=3)
    assert [rate(step, 100) for step in range(6)] == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    assert [Schedule(8.0)(step, 100) for step in (0, 99, 500)] == [8.0, 8.0, 8.0]


def test_cosine_falls_to_a_hundredth():
    rate = Schedule(2.0, decay="cosine")
    assert rate(0, 100) == 2.0
    assert rate(25, 100) == pytest.approx(1 + math.sqrt(0.5))
    assert rate(50, 100) == pytest.approx(1.0)
    assert rate(100, 100) == rate(1000, 100) == pytest.approx(0.02)
    assert rate(97, 100) == pytest.approx(
        0.02
    )  # 0.5 - 0.5 cos(0.03 pi) = 0.0022 is below the floor
    warmed = Schedule(2.0, warmup=49, decay="cosine")
    assert warmed(24, 100) == pytest.approx(0.5 * rate(24, 100))


@pytest.mark.parametrize(
    "bad",
    [
        {"warmup": -1},
        {"decay": "linear"},
        {"learning_rate": -1e-4},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
    ],
)
def test_bad_schedules_are_named(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}.*: expected"):
        Schedule(**{"learning_rate": 1e-3, **bad})


def descent(gradient: list[float], rate: float = 0.0) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    parameter.grad = torch.tensor(gradient)
    return parameter, torch.optim.SGD([parameter], lr=rate)


@pytest.mark.parametrize(
    ("max_norm", "moved"), [(None, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])]
)
def test_update_clips_steps_and_clears(max_norm, moved):
    parameter, optimizer = descent([3.0, 4.0], rate=99.0)
    assert update(optimizer, 0.5, [parameter], max_norm) == pytest.approx(5.0)
    expected = torch.tensor([1.0, 2.0]) - 0.5 * torch.tensor(moved)
    torch.testing.assert_close(parameter.detach(), expected)
    assert parameter.grad is None
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]


def test_update_sets_every_groups_rate():
    optimizer = torch.optim.SGD(
        [{"params": [descent([1.0, 0.0])[0]]}, {"params": [descent([0.0, 1.0])[0]]}], lr=99.0
    )
    update(optimizer, 0.25, [p for g in optimizer.param_groups for p in g["params"]], None)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_group_with_a_scale_moves_by_its_share():
    first, second = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "scale": 0.25}])
    for rate, moved in ((0.8, 0.8), (0.4, 1.2)):
        (first + second).backward()
        update(optimizer, rate, [first, second], None)
        assert first.item() == pytest.approx(-moved)
        assert second.item() == pytest.approx(-moved / 4)


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_update_refuses_gradients_that_are_not_finite(bad, max_norm):
    parameter, _ = descent([bad, 1.0])
    other, _ = descent([1.0, 1.0])
    optimizer = torch.optim.AdamW([parameter, other])
    with pytest.raises(RuntimeError, match="non-finite"):
        update(optimizer, 0.1, [parameter, other], max_norm)
    assert parameter.tolist() == other.tolist() == [1.0, 2.0]
    assert not optimizer.state


def averaged(values: list[float], decay: float, **options) -> float:
    """The average of a parameter that takes these values, the first of them at the start."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, values[0])
    average = MovingAverage(net, decay, **options)
    for value in values[1:]:
        nn.init.constant_(net.weight, value)
        average.update(net)
    assert net.weight.item() == pytest.approx(values[-1])
    average.copy_to(net)
    return net.weight.item()


VALUES = [5.0, 1.0, -2.0, 0.5, 3.0, 3.0, -1.0]


def orthogonalised(x, steps=5):
    """Newton and Schulz's iteration as Muon has it, in float64."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = x.double() / x.double().norm()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("able, bound", [(True, 5e-2), (False, 1e-5)])
def test_muon_leaves_bfloat16_where_a_cpu_lacks_it(monkeypatch, able, bound):
    monkeypatch.setattr(optimization, "multiplies_bfloat16", lambda _: able)
    model = nn.Module()
    model.transformer = nn.Module()
    model.transformer.blocks = nn.ModuleList([nn.Linear(24, 16, bias=False)])
    model.head = nn.Linear(2, 2)  # for AdamW
    weight = model.transformer.blocks[0].weight
    before, gradient = weight.detach().clone(), torch.randn(16, 24)
    optimizer = MuonAdamW(model, (0.9, 0.95), weight_decay=0.0)
    weight.grad = gradient.clone()
    update(optimizer, 0.5, [weight], None)
    # Of AdamW's size: 0.2 times the root of the larger side
    expected = orthogonalised(gradient) * 0.5 * 0.2 * math.sqrt(24)
    moved = (before - weight.detach()).double()
    error = float((moved - expected).norm() / expected.norm())
    assert error < bound
    assert (error > 1e-5) is able  # bfloat16 is told from float32


def test_moving_average_is_exponential():
    """Value i of n weighs (1 - d) d^(n - i); the start keeps d^n."""
    n, decay = len(VALUES) - 1, 0.9
    weights = [decay**n] + [(1 - decay) * decay ** (n - i) for i in range(1, n + 1)]
    expected = sum(w * value for w, value in zip(weights, VALUES))
    assert averaged(VALUES, decay) == pytest.approx(expected, rel=1e-5)


def test_moving_average_from_scratch_forgets_the_start():
    """Decays 1/11, 2/12, ... n / (n + 10): the start keeps n! 10! / (n + 10)!."""
    n = len(VALUES) - 1
    start = 1 / math.comb(n + 10, n)
    assert averaged([1.0] + [0.0] * n, 0.999, from_scratch=True) == pytest.approx(start, rel=1e-4)
    weights = [start]
    for i in range(1, n + 1):
        kept = math.prod(j / (j + 10) for j in range(i + 1, n + 1))
        weights.append(10 / (i + 10) * kept)
    assert sum(weights) == pytest.approx(1)
    expected = sum(w * value for w, value in zip(weights, VALUES))
    assert averaged(VALUES, 0.999, from_scratch=True) == pytest.approx(expected, rel=1e-5)


def test_moving_average_from_scratch_ends_at_its_decay():
    """1/11, 2/12, 3/13 = 0.23, 4/14 = 0.29, then 0.3 twice more."""
    kept = 1 / 11 * 2 / 12 * 3 / 13 * 4 / 14 * 0.3 * 0.3
    assert averaged([1.0] + [0.0] * 6, 0.3, from_scratch=True) == pytest.approx(kept, rel=1e-4)


def test_moving_average_keeps_its_own_copy():
    net = nn.Linear(2, 2)
    average = MovingAverage(net, 0.9)
    before = net.weight.detach().clone()
    nn.init.zeros_(net.weight)
    assert torch.equal(average.shadow["weight"], before)
    average.copy_to(net)
    assert torch.equal(net.weight, before) and net.weight.requires_grad
