"""modulated_norm against F.layer_norm and autograd in float64."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from aapt_kernels import modulated_norm
from aapt_kernels.testing import assert_error_ratio

EPS = 1e-3
NAMES = ("x", "update", "gate", "shift", "scale", "weight", "bias")
# What a block passes, by the block that does
CALLS = {
    "first norm": ("shift", "scale"),
    "gated update": ("update", "gate", "shift", "scale"),
    "plain update": ("update", "shift", "scale"),
    "affine norm after a gated update": ("update", "gate", "weight", "bias"),
    "plain norm": (),
    "everything": NAMES[1:],
}


def make_inputs(names, dtype=torch.float64, batch=2, length=6, width=5, groups=1):
    """Return the tensors by name, rows as strided views, modulation as views of one table."""
    rows = torch.randn(batch, length, 2, width).to(dtype)
    table = torch.randn(batch, 6, groups, width).to(dtype)
    affine = torch.randn(2, width).to(dtype)
    tensors = {"x": rows[:, :, 0], "update": rows[:, :, 1], "gate": table[:, 0]}
    tensors |= {"shift": table[:, 3], "scale": table[:, 4], "weight": affine[0], "bias": affine[1]}
    return {name: tensors[name] for name in ("x", *names)}


def oracle(x, update=None, gate=None, shift=None, scale=None, weight=None, bias=None):
    """Return the results, each token with the modulation of its own group."""

    def of_tokens(y):
        return y.repeat_interleave(x.shape[1] // y.shape[1], dim=1)

    residual = x
    if update is not None:
        residual = x + (update if gate is None else of_tokens(gate) * update)
    normed = F.layer_norm(residual, x.shape[-1:], weight, bias, EPS)
    if scale is not None:
        normed = normed * (1 + of_tokens(scale)) + of_tokens(shift)
    return (normed,) if update is None else (residual, normed)


def run(x, shift=None, scale=None, **others):
    results = modulated_norm(x, shift, scale, **others, eps=EPS)
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("call", CALLS)
def test_value_and_gradients(backend, call, groups):
    inputs = make_inputs(CALLS[call], groups=groups)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    actual, expected = run(**leaves), oracle(**leaves)
    incoming = [torch.randn_like(x) for x in expected]
    torch.testing.assert_close(actual, expected)
    assert all(x.is_contiguous() for x in actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves.values(), incoming),
        torch.autograd.grad(expected, leaves.values(), incoming),
    )


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(backend, output):
    inputs = make_inputs(NAMES[1:], groups=2)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    found = [
        torch.autograd.grad(results[output].square().sum(), leaves.values(), materialize_grads=True)
        for results in (run(**leaves), oracle(**leaves))
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("call", CALLS)
def test_gradcheck(backend, call):
    inputs = make_inputs(CALLS[call], batch=1, length=4, groups=2)
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: run(**dict(zip(inputs, x))), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_pytorch(backend, dtype):
    """Modulation in float32 beside rows of any dtype; the residual keeps the dtype of x."""
    inputs = make_inputs(NAMES[1:], dtype, length=40, width=48, groups=4)
    inputs |= {name: inputs[name].float() for name in NAMES[2:]}
    incoming = [torch.randn(2, 40, 48).to(dtype) for _ in range(2)]

    def differentiate(function, dtype=None):
        leaves = {
            name: (x if dtype is None else x.to(dtype)).detach().requires_grad_()
            for name, x in inputs.items()
        }
        results = function(**leaves)
        outgoing = [x.to(y.dtype) for x, y in zip(incoming, results, strict=True)]
        return *results, *torch.autograd.grad(results, leaves.values(), outgoing)

    actual = differentiate(run)
    assert [x.dtype for x in actual] == [dtype] * 4 + [torch.float32] * 5
    exact, plain = differentiate(oracle, torch.float64), differentiate(oracle, dtype)
    names = ("residual", "normed", *(f"d{name}" for name in NAMES))
    for name, ours, oracle_, plain_ in zip(names, actual, exact, plain, strict=True):
        assert_error_ratio(ours, oracle_, plain_, name)


def test_norm_reads_the_rounded_residual(backend):
    """The backward pass has only what was returned; the norm of the exact sum would differ."""
    x, update = torch.randn(2, 1, 7, 16, dtype=torch.bfloat16)
    residual, normed = modulated_norm(x, None, None, update=update, eps=EPS)
    assert torch.equal(normed, modulated_norm(residual, None, None, eps=EPS))


def test_autocast(backend):
    """The residual is as wide as its widest term, the gate; what a product reads next has
    autocast's dtype."""
    inputs = make_inputs(CALLS["gated update"], torch.float32, width=16)
    exact = run(**inputs)
    inputs |= {name: inputs[name].bfloat16() for name in ("x", "update")}
    with torch.autocast("cpu", torch.bfloat16):
        residual, normed = run(**inputs)
        (alone,) = run(inputs["x"], inputs["shift"], inputs["scale"])
        (double,) = run(inputs["x"].double())
    assert (residual.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    assert (alone.dtype, double.dtype) == (torch.bfloat16, torch.float64)
    expected = oracle(**{name: x.float() for name, x in inputs.items()})
    torch.testing.assert_close(residual, expected[0])
    torch.testing.assert_close(normed, expected[1].bfloat16(), rtol=8e-3, atol=1e-2)
    torch.testing.assert_close(residual, exact[0], rtol=0.02, atol=0.05)


def test_nan_stays_in_its_row(backend):
    inputs = make_inputs(CALLS["gated update"], torch.float32)
    inputs["x"][0, 2, 1], inputs["update"][1, 4, 3] = float("nan"), float("inf")
    clean = torch.ones(2, 6, dtype=torch.bool)
    clean[0, 2] = clean[1, 4] = False
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    residual, normed = run(**leaves)
    assert torch.equal(normed.isfinite().all(-1), clean)
    assert torch.equal(residual.isfinite().all(-1), clean)
    seen = torch.where(clean[..., None], normed, 0).sum()
    dx, dupdate = torch.autograd.grad(seen, (leaves["x"], leaves["update"]))
    assert dx[clean].isfinite().all() and dupdate[clean].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 6, 5), (2, 0, 5), (1, 1, 1)])
def test_no_rows_and_one_number(backend, shape):
    leaves = make_inputs(NAMES[1:], torch.float32, *shape)
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    residual, normed = run(**leaves)
    assert residual.shape == normed.shape == shape
    (residual.sum() + normed.sum()).backward()
    assert all(x.grad.shape == x.shape and x.grad.isfinite().all() for x in leaves.values())


@pytest.mark.parametrize("call", CALLS)
def test_it_is_a_torch_op(backend, call):
    inputs = make_inputs(CALLS[call], torch.float32, groups=2)
    tensors = [inputs.get(name) for name in NAMES]
    leaves = [x if x is None else x.detach().requires_grad_() for x in tensors]
    opcheck(torch.ops.aapt.modulated_norm.default, (*leaves, EPS, torch.float32))
    incoming = torch.randn(2, 2, 6, 5).unbind()
    dresidual = None if tensors[1] is None else incoming[1]
    if tensors[2] is None:  # without a gate the update's gradient is that of x
        tensors[1] = None
    opcheck(torch.ops.aapt.modulated_norm_backward.default, (incoming[0], dresidual, *tensors, EPS))


@pytest.mark.parametrize("dynamic", [None, True])
def test_two_graphs_serve_every_length(dynamic):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=graphs, dynamic=dynamic)
    for frames in range(3, 9):  # no size is by chance that of another dimension
        sizes = dict(length=7 * frames, width=11, groups=frames)
        inputs = make_inputs(NAMES[1:], torch.float32, **sizes)
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        found = []
        for function in (compiled, run):
            results = function(**leaves)
            loss = sum(x.square().sum() for x in results)
            found.append((*results, *torch.autograd.grad(loss, leaves.values())))
        torch.testing.assert_close(*found)
    assert graphs.frame_count <= 2


ROWS, GROUP = torch.zeros(2, 6, 5), torch.zeros(2, 1, 5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": ROWS[0]}, ValueError, "x: expected (batch, length, width), got (6, 5)"),
        ({"x": ROWS.int()}, TypeError, "x: expected torch.float32 or torch.float64 or"),
        ({"scale": None}, ValueError, "shift, scale: expected both or neither, got shift only"),
        ({"update": None}, ValueError, "gate: expected an update with it, got update=None"),
        (
            {"update": ROWS[:, 1:]},
            ValueError,
            "update: expected (2, 6, 5) for this x, got (2, 5, 5)",
        ),
        (
            {"gate": torch.zeros(2, 4, 5)},
            ValueError,
            "gate: expected a number of groups that divides the 6 tokens of x, got 4",
        ),
        (
            {"shift": torch.zeros(2, 3, 5)},
            ValueError,
            "shift: expected (2, 1, 5) for this x, got (2, 3, 5)",
        ),
        ({"weight": GROUP}, ValueError, "weight: expected (5,) for this x, got (2, 1, 5)"),
        (
            {"scale": GROUP.double()},
            TypeError,
            "scale: expected torch.float32 or torch.bfloat16 or torch.float16, got torch.float64",
        ),
        (
            {"update": ROWS.transpose(1, 2).contiguous().transpose(1, 2)},
            ValueError,
            "update: expected a contiguous last dimension (stride 1), got strides (30, 1, 6)",
        ),
        (
            {"gate": GROUP.to("meta")},
            ValueError,
            "gate: expected a tensor on cpu like x, got meta",
        ),
    ],
)
def test_errors(change, error, words):
    arguments = {"x": ROWS, "shift": GROUP, "scale": GROUP, "update": ROWS, "gate": GROUP}
    with pytest.raises(error, match=f"^{re.escape(words)}"):
        modulated_norm(**arguments | change)
