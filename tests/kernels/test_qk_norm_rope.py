"""qk_norm_rope against F.rms_norm and complex rotation in float64, with gradients."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from aapt_kernels import qk_norm_rope
from aapt_kernels.qk_norm_rope import ref
from aapt_kernels.testing import assert_error_ratio

EPS = 1e-3


def make_inputs(dtype=torch.float64, batch=2, length=5, heads=3, head_dim=6, across=False):
    """q, k as strided views of one projection, float32 weights and angles unless float64.
    across: weights of one norm over all heads."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    qkv = torch.randn(batch, length, 3, heads, head_dim).to(dtype)
    weights = 1 + 0.3 * torch.randn(2, *[heads] * across, head_dim).to(precise)
    angles = 6.3 * torch.rand(2, length, head_dim // 2, dtype=torch.float64)
    return *qkv.unbind(2)[:2], *weights, *angles


def oracle(x, weight, angle):
    """F.rms_norm, then (x1 + i x2) e^(i angle)."""
    if weight is not None:
        x = F.rms_norm(x, weight.shape, weight, EPS)
    if angle is None:
        return x
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("norm", [None, "per head", "across heads"])
def test_value_and_gradients(backend, norm, rotated, sink):
    if sink and not rotated:
        pytest.skip("q_sink is a rotation")
    inputs = make_inputs(across=norm == "across heads")
    q, k, q_weight, k_weight, angle, angle_sink = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    if norm:
        leaves += [q_weight.requires_grad_(), k_weight.requires_grad_()]
    q, k, q_weight, k_weight = leaves + [None] * (4 - len(leaves))
    angle = angle if rotated else None
    expected = [oracle(q, q_weight, angle), oracle(k, k_weight, angle)]
    tables = {}
    if sink:
        expected.append(oracle(q, q_weight, angle_sink))
        tables = {"cos_sink": angle_sink.cos(), "sin_sink": angle_sink.sin()}
    cos, sin = (angle.cos(), angle.sin()) if rotated else (None, None)
    actual = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=EPS, **tables)

    gradients = [torch.randn_like(x) for x in expected]
    torch.testing.assert_close(list(actual), expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, gradients),
        torch.autograd.grad(expected, leaves, gradients),
    )


@pytest.mark.parametrize("across", [False, True])
def test_gradcheck(backend, across):
    inputs = make_inputs(batch=1, heads=2, across=across)
    q, k, q_weight, k_weight, angle, angle_sink = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, q_weight, k_weight)]

    def function(*leaves):
        sink = {"cos_sink": angle_sink.cos(), "sin_sink": angle_sink.sin()}
        return qk_norm_rope(*leaves, angle.cos(), angle.sin(), eps=EPS, **sink)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_gradient_of_one_output_alone(backend, output):
    q, k, q_weight, k_weight, angle, angle_sink = make_inputs()
    leaves = [x.detach().requires_grad_() for x in (q, k, q_weight, k_weight)]
    sink = {"cos_sink": angle_sink.cos(), "sin_sink": angle_sink.sin()}
    actual = qk_norm_rope(*leaves, angle.cos(), angle.sin(), eps=EPS, **sink)[output]
    source, weight = (leaves[1], leaves[3]) if output == 1 else (leaves[0], leaves[2])
    expected = oracle(source, weight, angle_sink if output == 2 else angle)
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), [source, weight]),
        torch.autograd.grad(expected.square().sum(), [source, weight]),
    )


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_pytorch(backend, dtype, across):
    inputs = make_inputs(dtype, length=40, head_dim=32, across=across)
    q, k, q_weight, k_weight, *angles = inputs
    cos, sin, cos_sink, sin_sink = (
        f(angle).float() for angle in angles for f in (torch.cos, torch.sin)
    )
    tables = (cos, sin, cos_sink, sin_sink)
    outgoing = [torch.randn_like(q) for _ in range(3)]

    def plain(*tensors):
        q, k, *rest = tensors[:8]
        forward = ref.forward(q, k, *rest, EPS)
        return *forward, *ref.backward(*tensors[8:], q, k, *rest, EPS)

    inputs = (q, k, q_weight, k_weight, *tables, *outgoing)
    leaves = [x.detach().requires_grad_() for x in (q, k, q_weight, k_weight)]
    outputs = qk_norm_rope(*leaves, cos, sin, eps=EPS, cos_sink=cos_sink, sin_sink=sin_sink)
    actual = (*outputs, *torch.autograd.grad(outputs, leaves, outgoing))
    assert [x.dtype for x in actual] == [dtype] * 5 + [torch.float32] * 2
    exact = plain(*(x.double() for x in inputs))
    baseline = plain(*(x.to(dtype) for x in inputs))
    names = ("q", "k", "q_sink", "dq", "dk", "dq_weight", "dk_weight")
    for name, ours, oracle_, plain_ in zip(names, actual, exact, baseline, strict=True):
        assert_error_ratio(ours, oracle_, plain_, name)


def test_a_norm_across_heads_is_a_torch_op(backend):
    q, k, *rest = make_inputs(torch.float32, across=True)
    tables = [x.float() for x in rest[2:]] * 2
    arguments = (q.requires_grad_(), k, *(w.requires_grad_() for w in rest[:2]), *tables, EPS)
    opcheck(torch.ops.aapt.qk_norm_rope.default, arguments)
    detached = [x.detach() if torch.is_tensor(x) else x for x in arguments]
    incoming = torch.randn(3, *q.shape).unbind()
    opcheck(torch.ops.aapt.qk_norm_rope_backward.default, (*incoming, *detached))


def test_outputs_are_contiguous_and_inputs_untouched(backend):
    q, k, q_weight, k_weight, *_ = make_inputs()
    before = q.clone()
    for weights in ((q_weight, k_weight), (None, None)):
        outputs = qk_norm_rope(q, k, *weights, None, None)
        assert all(x.is_contiguous() for x in outputs)
        outputs[0].zero_()
        assert torch.equal(q, before)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"q": torch.zeros(5, 3, 6)},
            ValueError,
            "q: expected (batch, length, heads, head_dim), got (5, 3, 6)",
        ),
        (
            {"k": torch.zeros(2, 4, 3, 6)},
            ValueError,
            "k: expected (2, 5, 3, 6), got (2, 4, 3, 6)",
        ),
        (
            {"k": torch.zeros(2, 5, 3, 6).bfloat16()},
            TypeError,
            "k: expected torch.float32 like q, got torch.bfloat16",
        ),
        (
            {"q_weight": torch.zeros(5)},
            ValueError,
            "q_weight: expected (6,) to norm each head or (3, 6) to norm across heads, got (5,)",
        ),
        (
            {"k_weight": torch.zeros(3, 6)},
            ValueError,
            "k_weight: expected (6,) for a norm like that of q_weight, got (3, 6)",
        ),
        ({"cos": torch.zeros(5, 6)}, ValueError, "cos: expected (5, 3), got (5, 6)"),
        (
            {"sin": torch.zeros(5, 3).bfloat16()},
            TypeError,
            "sin: expected torch.float32 or torch.float64, got torch.bfloat16",
        ),
        ({"sin": None}, ValueError, "cos, sin: expected both or neither, got cos only"),
        (
            {"sin_sink": torch.zeros(5, 3)},
            ValueError,
            "cos_sink, sin_sink: expected both or neither, got sin_sink only",
        ),
        (
            {
                "cos": None,
                "sin": None,
                "cos_sink": torch.zeros(5, 3),
                "sin_sink": torch.zeros(5, 3),
            },
            ValueError,
            "cos_sink: expected cos and sin with it, got cos=None",
        ),
        (
            {"k_weight": torch.zeros(6, device="meta")},
            ValueError,
            "k_weight: expected a tensor on cpu like q, got meta",
        ),
        (
            {"q": torch.zeros(2, 5, 6, 3).transpose(2, 3)},
            ValueError,
            "q: expected a contiguous last dimension (stride 1), got strides (90, 18, 1, 3)",
        ),
    ],
)
def test_errors(change, error, words):
    arguments = {
        "q": torch.zeros(2, 5, 3, 6),
        "k": torch.zeros(2, 5, 3, 6),
        "q_weight": torch.ones(6),
        "k_weight": torch.ones(6),
        "cos": torch.ones(5, 3),
        "sin": torch.zeros(5, 3),
    } | change
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        qk_norm_rope(**arguments)


def test_odd_head_dim_cannot_rotate():
    x = torch.zeros(1, 2, 1, 3)
    with pytest.raises(ValueError, match="^q: expected an even head_dim to rotate, got 3$"):
        qk_norm_rope(x, x, None, None, torch.zeros(2, 1), torch.zeros(2, 1))
