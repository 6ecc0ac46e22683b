"""`causal_conv3d` against an independent float64 loop, its gradients and its streaming contract."""

import pytest
import torch
import torch.nn.functional as F

from aapt_kernels import causal_conv3d, use_backend
from aapt_kernels.causal_conv3d import ref
from aapt_kernels.causal_conv3d.cases import ABSENT, ACTIVE, CASES, Case, make_inputs

BACKENDS = ("cpu", "reference")


def oracle(
    x,
    weight,
    bias,
    *,
    state=None,
    norm_weight=None,
    silu=False,
    residual=None,
    stride=(1, 1, 1),
    upsample=(1, 1),
    padding="zeros",
    next_norm_weight=None,
    eps=1e-6,
):
    """Frame by frame, tap by tap: every tap is a 2D convolution of one earlier frame. With copies,
    output frame t is at t - (copies - 1) of an endless stream that starts with frame 0's."""

    def normed(x, weight):
        return F.rms_norm(x.movedim(1, -1), weight.shape, weight, eps).movedim(-1, 1)

    if norm_weight is not None:
        x = normed(x, norm_weight)
    if silu:
        x = x * torch.sigmoid(x)
    kt, kh, kw = weight.shape[2:]
    mode = "replicate" if padding == "replicate" else "constant"
    repeats, copies = upsample

    def frame(t):
        if t >= 0:
            return x[:, :, t]
        if state is not None:
            return state[:, :, t]
        return x[:, :, 0] if padding == "replicate" else torch.zeros_like(x[:, :, 0])

    outs = []
    first = repeats - 1 if state is None else 0
    for t in range(first, x.shape[2] * repeats, stride[0]):
        out = 0
        for tap in range(kt):
            image = frame((t - (kt - 1) + tap) // repeats)
            image = F.interpolate(image, scale_factor=copies, mode="nearest")
            image = F.pad(image, (kw // 2, kw // 2, kh // 2, kh // 2), mode=mode)
            out = out + F.conv2d(image, weight[:, :, tap], stride=stride[1:])
        outs.append(out)
    out = torch.stack(outs, dim=2)
    if bias is not None:
        out = out + bias.view(1, -1, 1, 1, 1)
    past = (kt - 1 + repeats - 1) // repeats
    last = [frame(t) for t in range(x.shape[2] - past, x.shape[2])]
    new_state = torch.stack(last, dim=2) if last else x[:, :, :0]
    out = out if residual is None else out + residual
    if next_norm_weight is None:
        return out, new_state
    y = normed(out, next_norm_weight)
    return out, new_state, y * torch.sigmoid(y)


def specification(x, weight, bias, **options):
    """The reference under autograd: what plain PyTorch makes of it at the same precision."""
    options = ABSENT | options
    options["replicate"] = options.pop("padding") == "replicate"
    out, state, active = ref.causal_conv3d(x, weight, bias, **options)
    return (out, state, active) if options["next_norm_weight"] is not None else (out, state)


def differentiable(inputs, options):
    """The tensors that get a gradient, as fresh leaves in the two argument containers."""
    leaf = lambda t: None if t is None else t.detach().clone().requires_grad_()  # noqa: E731
    inputs = [leaf(t) for t in inputs]
    options = {k: leaf(v) if k in ("norm_weight", "residual") else v for k, v in options.items()}
    leaves = [*inputs, options.get("norm_weight"), options.get("residual")]
    return inputs, options, [t for t in leaves if t is not None]


def cast(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def outputs_and_gradients(function, inputs, options):
    if "next_norm_weight" in options:
        return [out.detach() for out in function(*inputs, **options)]
    inputs, options, leaves = differentiable(inputs, options)
    out, state = function(*inputs, **options)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), state.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_equals_float64_oracle(name, backend):
    inputs, options = make_inputs(CASES[name], torch.float64)
    expected = outputs_and_gradients(oracle, inputs, options)
    with use_backend(backend):
        actual = outputs_and_gradients(causal_conv3d, inputs, options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_error_is_at_most_twice_plain_pytorch(name, dtype):
    """Against float64 of the same rounded inputs; outputs and every gradient."""
    inputs, options = make_inputs(CASES[name], dtype)
    exact = outputs_and_gradients(
        oracle,
        [cast(t, torch.float64) for t in inputs],
        {k: cast(v, torch.float64) for k, v in options.items()},
    )
    plain = outputs_and_gradients(specification, inputs, options)
    actual = outputs_and_gradients(causal_conv3d, inputs, options)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == dtype and a.shape == e.shape
        if e.numel():
            rounding = torch.finfo(dtype).eps * e.abs().max()
            assert (a - e).abs().max() <= 2 * (p - e).abs().max() + rounding


@pytest.mark.parametrize("name", ["norm-silu", "chunk", "down-both", "replicate", "up-both"])
def test_gradcheck(name):
    inputs, options = make_inputs(CASES[name], torch.float64)
    inputs, options, leaves = differentiable(inputs, options)
    assert torch.autograd.gradcheck(
        lambda *_: causal_conv3d(*inputs, **options)[0], leaves, fast_mode=True
    )


OPCHECKS = ("plain", "norm", "one-frame", "replicate-down", "up-both-start")


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name, grad):
    inputs, options = make_inputs(CASES[name], torch.float32)
    if grad:
        inputs, options, _ = differentiable(inputs, options)
    opcheck(inputs, options, True, True)


@pytest.mark.parametrize("keep_out, keep_state", [(True, True), (False, False)])
def test_opcheck_next_norm(keep_out, keep_state):
    inputs, options = make_inputs(Case((2, 3, 4), (3, 4), next_norm=True), torch.float32)
    opcheck(inputs, options, keep_out, keep_state)


def opcheck(inputs, options, *keep):
    args = (
        *inputs,
        options.get("state"),
        options.get("norm_weight"),
        1e-6,
        options["silu"],
        options.get("residual"),
        list(options["stride"]),
        list(options["upsample"]),
        options["padding"] == "replicate",
        False,
        options.get("next_norm_weight"),
        *keep,
    )
    torch.library.opcheck(torch.ops.aapt.causal_conv3d.default, args)


def test_opcheck_backward():
    (x, weight, bias), options = make_inputs(CASES["chunk"], torch.float32)
    dout = torch.randn_like(options["residual"])
    state, norm_weight = options["state"], options["norm_weight"]
    args = (dout, x, weight, state, norm_weight, 1e-6, True, [1, 1, 1], [1, 1], False)
    torch.library.opcheck(torch.ops.aapt.causal_conv3d_backward.default, args)


@pytest.mark.parametrize("name", ["norm-silu", "one-frame"])
def test_compiles_without_graph_breaks(name):
    inputs, options = make_inputs(CASES[name], torch.float32)
    compiled = torch.compile(causal_conv3d, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(causal_conv3d, inputs, options)
    actual = outputs_and_gradients(compiled, inputs, options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("plan", [(1, 1, 1, 1), (1, 3), (1, 2, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (2, 3, 3), (5, 1, 1), (1, 3, 3)], ids=str)
@pytest.mark.parametrize("upsample", [(1, 1), (2, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_chunks_equal_whole_clip(plan, kernel, padding, upsample):
    case = Case((4, 5, 6), (4, 3), kernel=kernel, upsample=upsample, padding=padding, **ACTIVE)
    (x, weight, bias), options = make_inputs(case, torch.float64)
    whole, last = causal_conv3d(x, weight, bias, **options)
    outs, state = [], None
    for chunk in x.split(plan, dim=2):
        out, state = causal_conv3d(chunk, weight, bias, state=state, **options)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=2), whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["norm-silu", "one-frame", "flat-kernel", "up-both"])
def test_channels_last_stay_last(name, backend):
    (x, weight, bias), options = make_inputs(CASES[name], torch.float32)
    with use_backend(backend):
        plain = causal_conv3d(x, weight, bias, **options)
        x = x.to(memory_format=torch.channels_last_3d)
        for a, b in zip(causal_conv3d(x, weight, bias, **options), plain, strict=True):
            assert b.is_contiguous() and a.is_contiguous(memory_format=torch.channels_last_3d)
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_are_rounded_and_clamped(backend):
    x = torch.tensor([-9.0, -1.0, 0.0, 0.1, 1.0, 9.0]).view(1, 1, 1, 1, 6).requires_grad_()
    with use_backend(backend):
        out, _ = causal_conv3d(x, torch.ones(1, 1, 1, 1, 1), pixels=True)
    assert out.dtype == torch.uint8 and not out.requires_grad
    assert out.flatten().tolist() == [0, 0, 128, 140, 255, 255]


def test_future_does_not_leak():
    (x, weight, bias), options = make_inputs(CASES["norm-silu"], torch.float32)
    before, _ = causal_conv3d(x, weight, bias, **options)
    x[:, :, 2:] = torch.nan
    after, _ = causal_conv3d(x, weight, bias, **options)
    torch.testing.assert_close(after[:, :, :2], before[:, :, :2])
    assert after[:, :, 2:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_nobody_needs_is_not_returned(backend):
    inputs, options = make_inputs(CASES["next-norm"], torch.float32)
    with use_backend(backend):
        out, state, active = causal_conv3d(*inputs, **options)
        nothing, _, alone = causal_conv3d(*inputs, **options, keep_out=False)
    assert nothing is None and out.shape == active.shape
    torch.testing.assert_close(alone, active)


@pytest.mark.parametrize("frames, shares", [(1, False), (2, True), (4, True), (5, False)])
def test_a_shared_state_is_a_view_of_x(frames, shares):
    case = Case((frames, 4, 5), (3, 4), state=True, residual=True)
    (x, weight, bias), options = make_inputs(case, torch.float32)
    out, state = causal_conv3d(x, weight, bias, **options)
    same, view = causal_conv3d(x, weight, bias, share_state=True, **options)
    assert torch.equal(same, out) and torch.equal(view, state)
    assert (view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == shares
    active = make_inputs(Case((frames, 4, 5), (3, 4), **ACTIVE), torch.float32)
    _, state = causal_conv3d(*active[0], share_state=True, **active[1])
    assert state.untyped_storage().data_ptr() != active[0][0].untyped_storage().data_ptr()


def test_given_and_returned_state_are_left_alone():
    (x, weight, bias), options = make_inputs(CASES["chunk"], torch.float32)
    given = options["state"].clone()
    x.requires_grad_()
    _, state = causal_conv3d(x, weight, bias, **options)
    torch.testing.assert_close(options["state"], given, rtol=0, atol=0)
    assert not state.requires_grad


def test_autocast_computes_in_bfloat16_and_returns_float32_gradients():
    inputs, options = make_inputs(CASES["norm-silu"], torch.float32)
    inputs, options, leaves = differentiable(inputs, options)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = causal_conv3d(*inputs, **options)
    assert out.dtype == state.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))


BAD = [
    (dict(x=(2, 3, 6, 7)), "x: expected (batch, in_channels, time, height, width), got"),
    (dict(x=(2, 3, 0, 6, 7)), "x: expected at least one frame, got (2, 3, 0, 6, 7)"),
    (dict(weight=(5, 4, 3, 3, 3)), "weight: expected (out_channels, 3, kt, kh, kw)"),
    (dict(weight=(5, 3, 3, 2, 3)), "weight: expected odd kh and kw, got (5, 3, 3, 2, 3)"),
    (dict(bias=(4,)), "bias: expected (5,) for x (2, 3, 4, 6, 7), weight (5, 3, 3, 3, 3)"),
    (dict(state=(2, 3, 3, 6, 7)), "state: expected (2, 3, 2, 6, 7)"),
    (dict(norm_weight=(5,)), "norm_weight: expected (3,)"),
    (dict(residual=(2, 3, 4, 6, 7)), "residual: expected (2, 5, 4, 6, 7)"),
    (dict(residual=(2, 5, 4, 6, 7), stride=(2, 2, 2)), "residual: expected (2, 5, 2, 3, 4)"),
    (dict(state=(2, 3, 2, 6, 7), stride=(2, 1, 1)), "state: expected None with a stride in time"),
    (dict(stride=(1, 0, 1)), "stride: expected three integers >= 1, got (1, 0, 1)"),
    (dict(upsample=(2,)), "upsample: expected two integers >= 1, got (2,)"),
    (dict(upsample=(2, 2), stride=(1, 2, 2)), "upsample: expected (1, 1) with stride (1, 2, 2)"),
    (dict(upsample=(2, 2), state=(2, 3, 2, 6, 7)), "state: expected (2, 3, 1, 6, 7) for x"),
    (dict(next_norm_weight=(3,)), "next_norm_weight: expected (5,) for x (2, 3, 4, 6, 7), weight"),
    (dict(next_norm_weight=(5,), pixels=True), "pixels: expected False with next_norm_weight"),
    (dict(keep_out=False), "keep_out: expected True without next_norm_weight, got False"),
    (dict(padding="reflect"), "padding: expected one of zeros, replicate, got 'reflect'"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    arguments = dict(x=(2, 3, 4, 6, 7), weight=(5, 3, 3, 3, 3), bias=(5,)) | change
    tensors = {"x", "weight", "bias", "state", "norm_weight", "residual", "next_norm_weight"}
    arguments = {k: torch.zeros(v) if k in tensors else v for k, v in arguments.items()}
    with pytest.raises(ValueError) as error:
        causal_conv3d(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["weight", "residual", "next_norm_weight"])
def test_next_norm_has_no_gradient(name):
    (x, weight, bias), options = make_inputs(CASES["next-norm"], torch.float32)
    (options | {"weight": weight})[name].requires_grad_()
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor without gradient with next"):
        causal_conv3d(x, weight, bias, **options)
    with torch.no_grad():
        causal_conv3d(x, weight, bias, **options)


@pytest.mark.parametrize("upsample", [(1, 1), (2, 2)])
@pytest.mark.parametrize("weight_memory", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
def test_gradients_are_stored_like_their_tensors(memory, weight_memory, upsample):
    """Compiled code takes the strides from the fake kernel, and refuses a gradient with others."""
    x = torch.randn(1, 3, 2, 4, 5).to(memory_format=memory)
    weight = torch.randn(4, 3, 2, 3, 3).to(memory_format=weight_memory)
    leaves = [tensor.requires_grad_() for tensor in (x, weight)]
    with use_backend("reference"):
        out, _ = causal_conv3d(x, weight, None, upsample=upsample)
        for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert gradient.stride() == torch.empty_like(leaf).stride()


def test_mixed_dtypes_and_gradient_in_state_are_refused():
    (x, weight, bias), options = make_inputs(CASES["chunk"], torch.float32)
    with pytest.raises(TypeError, match="weight: expected torch.float32 like x, got torch.bfl"):
        causal_conv3d(x, weight.bfloat16(), bias, **options)
    options["state"].requires_grad_()
    with pytest.raises(ValueError, match="state: expected a tensor without gradient"):
        causal_conv3d(x, weight, bias, **options)


def test_triton_rejects_frames_whose_offsets_would_wrap():
    """Offsets within a frame have 32 bits; 96 channels first at 1280x720 reach 24 frames."""
    pytest.importorskip("triton")
    from aapt_kernels.causal_conv3d.triton_kernels import limit

    def why(frames, channels=(96, 96), state=0, memory=torch.contiguous_format, **options):
        options = dict(stride=(1, 1, 1), upsample=(1, 1)) | options
        size = (1, channels[0], frames, 720, 1280)
        x = torch.empty(size, device="meta", dtype=torch.float16).to(memory_format=memory)
        past = x.new_empty(1, channels[0], state, 720, 1280) if state else None
        weight = x.new_empty(channels[1], channels[0], 3, 3, 3)
        rest = (None, past, None, 1e-6, False, None, options["stride"], options["upsample"])
        return limit(x, weight, *rest, False)

    assert why(24) is None
    words = why(25)
    assert words.startswith("it takes frames whose first and last element are less than 2^31")
    assert words.endswith(
        "got 2189721600; convert x to torch.channels_last_3d or take fewer frames"
    )
    assert why(25, memory=torch.channels_last_3d) is None
    assert why(2, channels=(8, 2048)) is not None  # the output's
    assert why(7, channels=(96, 96), upsample=(1, 2)) is not None
    assert why(1, channels=(1024, 8), state=3) is not None  # the state's
    assert why(1, channels=(1024, 8), state=2) is None


def test_triton_rejects_more_pixels_than_it_counts():
    pytest.importorskip("triton")
    from aapt_kernels.causal_conv3d.triton_kernels import limit

    def why(batch):
        x = torch.empty(batch, 8, 1, 720, 1280, device="meta")
        rest = (None, None, None, 1e-6, False, None, (1, 1, 1), (1, 1))
        return limit(x, x.new_empty(8, 8, 1, 3, 3), *rest)

    assert why(2330) is None
    assert why(2331).startswith("it takes fewer than 2^31 pixels in all frames, got 2148249600")
