"""A derivative that nobody wrote is an error by name, on every backend: the second in reverse mode,
and forward mode. The reference, plain PyTorch, is differentiated again."""

import pytest
import torch

from aapt_kernels import cached_attention, kv_append, qk_norm_rope, use_backend
from aapt_kernels.backend import interpreted, no_sim

from .calls import CACHED, DIFFERENTIABLE, make_cache, make_call

# dtype and head_dim that a backend takes
SIZES = {
    "reference": (torch.float32, 8),
    "cpu": (torch.float32, 8),
    "triton": (torch.float32, 32),
    "sim": (torch.bfloat16, 64),
}
NAMES = ["triton"] if interpreted() else ["reference", "cpu"] + ["sim"] * (not no_sim())
# Or takes no float32
MISSING = {("sim", op) for op in ("qk_norm_rope", "causal_conv3d", "modulated_norm", "bias_gelu")}
ALL = [(name, op) for name in NAMES for op in (*DIFFERENTIABLE, *CACHED)]
FORWARD = [pair for pair in ALL if pair not in MISSING]
BACKWARD = [
    (name, op)
    for name, op in FORWARD
    if op in DIFFERENTIABLE and (name, op) != ("triton", "causal_conv3d")
]


@pytest.mark.parametrize(("name", "op"), [pair for pair in BACKWARD if pair[0] != "reference"])
def test_second_derivative_is_an_error_by_name(name, op):
    """A gradient penalty needs it; its gradient would otherwise be zero or chance."""
    function, tensors = make_call(op, *SIZES[name])
    tensors[0].requires_grad_()
    words = f"^{op} is differentiable once on backend '{name}', got a second derivative; compute"
    with use_backend(name):
        out = function(*tensors)[0]
        (gradient,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=words):
            gradient.square().sum().backward()


@pytest.mark.skipif(interpreted(), reason="is the reference's")
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_the_reference_has_a_second_derivative(op):
    function, tensors = make_call(op, torch.float64, head_dim=2)
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def seen(*leaves):
        return tuple(torch.where(y.isfinite(), y, 0) for y in function(*leaves))

    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(seen, leaves, fast_mode=True)


@pytest.mark.parametrize(("name", "op"), FORWARD)
def test_forward_mode_is_an_error_by_name(name, op):
    function, tensors = make_call(op, *SIZES[name])
    words = f"^.+: {op} has no forward-mode derivative; expected a tensor without a tangent, got"
    for i, tensor in enumerate(tensors):

        def of_one(x, i=i):
            return function(*tensors[:i], x, *tensors[i + 1 :])

        with use_backend(name), pytest.raises(NotImplementedError, match=words):
            torch.func.jvp(of_one, (tensor,), (torch.ones_like(tensor),))


@pytest.mark.parametrize(("name", "op"), BACKWARD)
def test_forward_mode_of_a_gradient_is_an_error_by_name(name, op):
    """The outgoing gradient alone carries the tangent."""
    function, tensors = make_call(op, *SIZES[name])
    tensors[0].requires_grad_()
    with use_backend(name):
        out = function(*tensors)[0]

    def pull_back(dout):
        return torch.autograd.grad(out, tensors[0], dout, retain_graph=True)

    words = f"^d.+: {op}_backward has no forward-mode derivative"
    with use_backend(name), pytest.raises(NotImplementedError, match=words):
        torch.func.jvp(pull_back, (torch.ones_like(out),), (torch.ones_like(out),))


@pytest.mark.skipif(interpreted(), reason="is checked before any backend")
@pytest.mark.parametrize("name", ["cos", "sin", "cos_sink", "sin_sink"])
def test_tables_of_angles_have_no_gradient(name):
    """A learnt rotation would otherwise get none, without a word."""
    q = torch.randn(1, 3, 2, 8)
    tables = {key: torch.rand(3, 4) for key in ("cos", "sin", "cos_sink", "sin_sink")}
    tables[name].requires_grad_()
    words = (
        f"^{name}: the rotation of qk_norm_rope has no gradient; expected a tensor that does not"
    )
    with pytest.raises(RuntimeError, match=words):
        qk_norm_rope(q, q, None, None, **tables)
    with pytest.raises(RuntimeError, match=f"^{name}: kv_append has no gradient; expected"):
        kv_append(q, q, q, make_cache(), 0, None, None, **tables)
    with torch.no_grad():
        qk_norm_rope(q, q, None, None, **tables)
        q, q_sink = kv_append(q, q, q, make_cache(), 0, None, None, **tables)
        assert cached_attention(q, make_cache(), 0, q_sink=q_sink).isfinite().all()
