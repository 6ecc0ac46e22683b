"""Moments in 8 bits against the values they hold, and steps against torch's optimizers."""

import math

import pytest
import torch
from torch import Tensor, nn

from aapt.training.eight_bit import AdamW8, RMSprop8, decode, encode
from aapt.training.optimization import adamw, rmsprop

LEVEL = 2 ** (1 / 8)  # ratio of neighbouring levels


def held(x: Tensor, dtype: torch.dtype, update: int) -> Tensor:
    """Return the numbers that x (rows, n) has after its codes are written and read."""
    codes = torch.zeros(x.shape, dtype=dtype)
    scales = torch.zeros(len(x), math.ceil(x.shape[1] / 256))
    encode(x, update, codes, scales)
    return decode(codes, scales)


def numbers(columns: int = 600) -> Tensor:
    """Magnitudes over eight octaves, with both signs."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(5, columns, generator=random)
    return x * torch.exp2(-8 * torch.rand(5, columns, generator=random))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_a_code_is_a_level_beside_its_value(dtype):
    x = numbers() if dtype == torch.int8 else numbers().abs()
    for update in range(5):
        ratio = held(x, dtype, update) / x
        within = x.abs() > x.abs().max() * 2**-15
        assert ratio[within].max() < LEVEL * 1.0001 and ratio[within].min() > 0.9999 / LEVEL
        peak = x[:, :256].abs().amax(1)  # of a block, which is exact
        torch.testing.assert_close(held(x, dtype, update)[:, :256].abs().amax(1), peak)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_the_mean_over_updates_is_the_value(dtype):
    x = numbers() if dtype == torch.int8 else numbers().abs()
    mean = sum(held(x, dtype, update) for update in range(400)) / 400
    within = x.abs() > x.abs().max() * 2**-15
    torch.testing.assert_close(mean[within], x[within], rtol=1e-3, atol=0)


def test_zero_is_zero_and_a_square_above_zero_stays_above():
    x = torch.tensor([[0.0, 1.0, 1e-30, 1e-12]])
    for update in range(50):
        square = held(x, torch.uint8, update)
        assert square[0, 0] == 0 and square[0, 1] == 1 and square[0, 2:].min() > 0
        assert held(torch.zeros(2, 3), torch.int8, update).eq(0).all()


def test_rows_are_independent():
    """Codes of some rows do not depend on the other rows: ranks make what one rank makes."""
    x = numbers()
    assert torch.equal(held(x, torch.int8, 7)[2:], held(x[2:], torch.int8, 7))


def test_a_moment_decays_beside_one_that_does_not():
    """Rounded to the nearest level, a second moment would never move by 0.1 % per update.

    Levels that are 9 % apart decay by 4 % too much per factor of e, if nothing else happens: here
    by 16 % over 7 factors.
    """
    p = nn.Parameter(torch.zeros(1, 256))
    optimizer = AdamW8([p], lr=0.0, betas=(0.9, 0.999))
    for update in range(1000):
        p.grad = torch.zeros(1, 256)
        p.grad[0, 0] = 1.0
        if update == 0:
            p.grad.fill_(1.0)
        optimizer.step()
    state = optimizer.state[p]
    square = decode(state["exp_avg_sq"], state["exp_avg_sq_scales"])[0]
    assert square[0].item() == pytest.approx(1 - 0.999**1000, rel=1e-4)
    left = 0.001 * 0.999**999
    assert square[1:].mean().item() == pytest.approx(left, rel=0.2)
    assert left / 2 < square[1:].min() and square[1:].max() < 2 * left


def networks() -> tuple[nn.Module, nn.Module]:
    """A student, and a teacher that it learns from."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(nn.Sequential(nn.Linear(32, 300), nn.Tanh(), nn.Linear(300, 8)))
    return tuple(made)


def learn(kind: str, bits: int) -> tuple[Tensor, float]:
    """Weights after 300 updates of a small regression, and the mean loss of the last 50."""
    net, teacher = networks()
    parameters = list(net.parameters())
    if kind == "adamw":
        optimizer = adamw(parameters, (0.9, 0.999), 0.01, bits)
    else:
        optimizer = rmsprop(parameters, 0.9, bits)
    losses = []
    for update in range(300):
        random = torch.Generator().manual_seed(update)
        x = torch.randn(32, 32, generator=random)
        loss = (net(x) - 2 * teacher(x)).square().mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - update / 300)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return nn.utils.parameters_to_vector(parameters).detach(), sum(losses[-50:]) / 50


@pytest.mark.parametrize("kind", ["adamw", "rmsprop"])
def test_training_is_that_of_32_bits(kind):
    """The way in weights differs by a few percent, and the loss by less than 2 %."""
    (whole, loss), (coded, eight) = learn(kind, 32), learn(kind, 8)
    start = nn.utils.parameters_to_vector(networks()[0].parameters()).detach()
    assert eight == pytest.approx(loss, rel=0.02)
    assert (coded - whole).norm() < 0.05 * (whole - start).norm()
    assert not torch.equal(coded, whole)


@pytest.mark.parametrize("kind, moments", [(AdamW8, 2), (RMSprop8, 1)])
def test_a_moment_takes_a_byte_and_a_sixty_fourth(kind, moments):
    p = nn.Parameter(torch.randn(64, 512))
    p.grad = torch.randn(64, 512)
    optimizer = kind([p])
    optimizer.step()
    taken = sum(x.nbytes for name, x in optimizer.state[p].items() if name != "step")
    assert taken == moments * p.numel() * (1 + 4 / 256)


def test_a_parameter_of_one_dimension_makes_torchs_steps():
    made = []
    for bits in (32, 8):
        p = nn.Parameter(torch.ones(3))
        optimizer = adamw([p], (0.9, 0.95), 0.1, bits)
        for update in range(5):
            p.grad = torch.tensor([1.0, -2.0, 0.5]) * (update + 1)
            optimizer.step()
        made.append(p.detach())
    torch.testing.assert_close(*made)


def test_what_cannot_be_moved_is_refused():
    with pytest.raises(ValueError, match="state_bits: expected 8 or 32, got 4"):
        adamw([nn.Parameter(torch.ones(1))], (0.9, 0.95), 0.1, 4)
    with pytest.raises(ValueError, match="closure: expected none, got"):
        RMSprop8([nn.Parameter(torch.ones(1))]).step(lambda: 0.0)
    p = nn.Parameter(torch.ones(3, 2).T)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"params: expected contiguous ones, got strides \(1, 2\)"):
        RMSprop8([p]).step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [AdamW8, RMSprop8])
def test_a_loaded_state_keeps_its_codes(kind, dtype):
    """torch's own `load_state_dict` would turn codes and scales into the parameter's type."""

    def made():
        random = torch.Generator().manual_seed(0)
        shapes = ((3, 300), (5,))
        parameters = [nn.Parameter(torch.randn(s, generator=random).to(dtype)) for s in shapes]
        return parameters, kind(parameters, lr=1e-2)

    def step(parameters, optimizer, seed):
        random = torch.Generator().manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=random).to(dtype)
        optimizer.step()

    ours, optimizer = made()
    step(ours, optimizer, 1)
    theirs, resumed = made()
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    state = optimizer.state_dict()
    resumed.load_state_dict(state)
    for index, p in enumerate(theirs):
        for name, x in state["state"][index].items():
            loaded = resumed.state[p][name]
            assert loaded.dtype == x.dtype and torch.equal(loaded, x) and loaded is not x
    for parameters, each in ((ours, optimizer), (theirs, resumed)):
        step(parameters, each, 2)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_moments_of_another_kind_are_rejected():
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    plain = torch.optim.AdamW([p])
    plain.step()
    words = "state_dict: expected exp_avg of torch.int8, got torch.float32; load the states"
    with pytest.raises(ValueError, match=words):
        AdamW8([p]).load_state_dict(plain.state_dict())
