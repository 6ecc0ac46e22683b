"""The sm_90a kernel of causal_conv3d: simulated everywhere, and on a device if there is one.

Both run the same source through the same host code. The oracle is the reference in float64.
"""

import gc

import pytest
import torch

from aapt_kernels import causal_conv3d, use_backend
from aapt_kernels.backend import BackendError
from aapt_kernels.causal_conv3d import fuses_next_norm, ref, sm90
from aapt_kernels.causal_conv3d.cases import ABSENT, ACTIVE, Case, make_inputs
from aapt_kernels.testing import assert_error_ratio

LAST = torch.channels_last_3d


def make(case, device, seed=0):
    """Inputs in bfloat16, with channels last."""
    inputs, options = make_inputs(case, torch.bfloat16, seed)

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.to(device)
        return value.contiguous(memory_format=LAST) if value.dim() == 5 else value

    x, weight, bias = inputs
    options = {name: move(value) for name, value in options.items()}
    bias = None if bias is None else bias.to(device)
    return [move(x), weight.to(device), bias], options


def plain(inputs, options, dtype):
    """The specification at another precision."""

    def cast(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    rest = ABSENT | options
    rest["replicate"] = rest.pop("padding") == "replicate"
    return ref.causal_conv3d(*map(cast, inputs), **{name: cast(v) for name, v in rest.items()})


def check(case, device, seed=0, **more):
    inputs, options = make(case, device, seed)
    outputs = causal_conv3d(*inputs, **options, **more)
    exact, baseline = (plain(inputs, options, dtype) for dtype in (torch.float64, torch.bfloat16))
    names = ("out", "state", "active")[: len(outputs)]
    for name, ours, wanted, same in zip(names, outputs, exact, baseline):
        if ours is None:
            continue
        assert ours.dtype == torch.bfloat16
        assert ours.is_contiguous(memory_format=LAST) or ours.numel() == 0
        assert_error_ratio(ours, wanted, same, name)


SIZES = {
    "one pixel tile": Case((1, 5, 9), (64, 64), batch=1),
    "more frames than two": Case((3, 7, 8), (64, 40), batch=2, **ACTIVE),
    "many tiles": Case((2, 33, 17), (16, 64), batch=1, state=True, residual=True),
    "shared pixels": Case((1, 9, 10), (64, 128), batch=2, state=True, residual=True, **ACTIVE),
    "odd channels": Case((2, 6, 5), (72, 136), batch=1, state=True, **ACTIVE),
    "three blocks": Case((1, 3, 11), (136, 200), batch=1, norm=True),
    "flat": Case((3, 6, 9), (48, 72), batch=2, kernel=(1, 3, 3), residual=True, **ACTIVE),
    "in time only": Case((3, 5, 9), (24, 64), batch=1, kernel=(3, 1, 1), state=True),
    "pixel by pixel": Case((2, 6, 9), (64, 192), batch=1, kernel=(1, 1, 1), norm=True),
    "wide in time": Case((2, 4, 9), (8, 8), batch=1, kernel=(5, 1, 3), state=True, silu=True),
    "no bias": Case((1, 4, 9), (64, 64), batch=1, bias=False, residual=True),
    "few channels": Case((2, 4, 9), (64, 3), batch=2, state=True, **ACTIVE),
}
UPSAMPLED = {
    "space": Case((2, 5, 9), (64, 64), batch=2, upsample=(1, 2), state=True),
    "space start": Case((1, 5, 9), (64, 136), batch=1, upsample=(1, 2)),
    "time": Case((2, 5, 9), (16, 64), batch=1, upsample=(2, 1), state=True, residual=True),
    "both": Case((2, 5, 9), (64, 72), batch=2, upsample=(2, 2), state=True, residual=True),
    "both start": Case((3, 5, 3), (64, 64), batch=2, upsample=(2, 2)),
    "both first frame": Case((1, 5, 3), (64, 64), batch=1, upsample=(2, 2), **ACTIVE),
    "few channels": Case((1, 5, 3), (16, 5), batch=1, upsample=(2, 2), state=True),
}


# Few channels, no residual: a row of the product for every tap in space and channel
ROWS = {
    "wider than a tile": Case((3, 31, 13), (64, 3), batch=1, state=True, **ACTIVE),
    "two blocks of channels": Case((2, 5, 7), (72, 3), batch=2),
    "replicated": Case((1, 32, 7), (16, 2), batch=1, padding="replicate", silu=True),
    "one direction": Case((2, 34, 5), (16, 8), batch=1, kernel=(2, 3, 1), state=True),
    "flat": Case((2, 3, 9), (8, 1), batch=1, kernel=(1, 1, 3), bias=False),
}
NEXT_NORM = {
    "a frame each": Case((3, 33, 9), (16, 64), batch=1, state=True, residual=True, next_norm=True),
    "not all rows": Case((1, 5, 9), (16, 40), batch=2, next_norm=True, **ACTIVE),
    "shared pixels": Case((1, 9, 10), (64, 128), batch=1, residual=True, next_norm=True),
    "odd channels": Case((2, 33, 5), (16, 72), batch=1, next_norm=True),
    "two tiles of channels": Case((2, 3, 11), (16, 136), batch=1, residual=True, next_norm=True),
    "upsampled": Case((2, 5, 9), (16, 64), batch=1, upsample=(2, 2), next_norm=True),
    "replicated": Case((2, 5, 9), (16, 64), padding="replicate", residual=True, next_norm=True),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(kernel, schedule, name):
    schedule(multiprocessors=3, seed=len(name))
    check(SIZES[name], kernel)


@pytest.mark.parametrize("name", ROWS)
def test_taps_in_the_rows(kernel, schedule, name):
    schedule(multiprocessors=3, seed=len(name))
    check(ROWS[name], kernel)


@pytest.mark.parametrize("keep_out", [False, True])
@pytest.mark.parametrize("name", NEXT_NORM)
def test_next_norm(kernel, schedule, name, keep_out):
    schedule(multiprocessors=2 + keep_out, seed=len(name))
    check(NEXT_NORM[name], kernel, keep_out=keep_out)


@pytest.mark.parametrize("name", UPSAMPLED)
def test_upsampling_folds_into_the_weights(kernel, schedule, name):
    schedule(multiprocessors=5, seed=len(name))
    check(UPSAMPLED[name], kernel)


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 33, 9), (16, 64), batch=1, padding="replicate"),
        Case((1, 4, 16), (64, 72), batch=2, padding="replicate", state=True, **ACTIVE),
        Case((2, 3, 9), (16, 64), batch=1, padding="replicate", upsample=(2, 2)),
        Case((2, 1, 2), (16, 8), batch=1, padding="replicate", kernel=(3, 3, 1), **ACTIVE),
    ],
    ids=str,
)
def test_replicated_edges(kernel, schedule, case):
    schedule(multiprocessors=2, seed=1)
    check(case, kernel)


@pytest.mark.parametrize("wgmma", [0, 2])
@pytest.mark.parametrize("tma", [0, 1, 2])
@pytest.mark.parametrize("wide", [False, True])
def test_any_order_of_completion(kernel, schedule, wide, tma, wgmma):
    schedule(multiprocessors=2, seed=1 + tma, tma=tma, wgmma=wgmma)
    channels = (64, 136) if wide else (128, 64)
    padding = "replicate" if tma == 1 else "zeros"
    case = Case((3, 6, 10), channels, batch=1, residual=True, padding=padding, **ACTIVE)
    check(case, kernel, seed=tma)


@pytest.mark.parametrize("wgmma", [0, 2])
@pytest.mark.parametrize("tma", [0, 1, 2])
@pytest.mark.parametrize("channels", [3, 64, 128])
def test_any_order_of_completion_behind_the_product(kernel, schedule, channels, tma, wgmma):
    """Two tiles one after the other through the same staging."""
    schedule(multiprocessors=1, seed=1 + tma, tma=tma, wgmma=wgmma)
    norms = channels > 3
    case = Case((2, 3, 9), (16, channels), batch=1, next_norm=norms, residual=norms and tma != 1)
    check(case, kernel, seed=tma)


@pytest.mark.parametrize(
    "channels, upsample, padding",
    [
        ((64, 64), (1, 1), "zeros"),
        ((16, 72), (2, 2), "zeros"),
        ((16, 64), (2, 2), "replicate"),
        pytest.param((64, 64), (2, 2), "zeros", marks=pytest.mark.slow),
        pytest.param((64, 72), (1, 1), "replicate", marks=pytest.mark.slow),
    ],
)
def test_chunks_of_any_length_give_the_same_bits(kernel, schedule, channels, upsample, padding):
    case = Case((4, 4, 9), channels, batch=1, upsample=upsample, padding=padding, **ACTIVE)
    (x, weight, bias), options = make(case, kernel)
    whole, last = causal_conv3d(x, weight, bias, **options)
    for number, plan in enumerate([(1, 1, 1, 1), (1, 3), (1, 2, 1)]):
        schedule(multiprocessors=1 + 3 * number, seed=number)
        outs, state = [], None
        for chunk in x.split(plan, dim=2):
            chunk = chunk.contiguous(memory_format=LAST)
            out, state = causal_conv3d(chunk, weight, bias, state=state, **options)
            outs.append(out)
        assert torch.equal(torch.cat(outs, dim=2), whole) and torch.equal(state, last)


@pytest.mark.parametrize("channels", [3, 16])
def test_pixels(kernel, channels):
    case = Case((2, 5, 9), (64, channels), batch=1, state=True, **ACTIVE)
    inputs, options = make(case, kernel)
    out, _ = causal_conv3d(*inputs, **options, pixels=True)
    exact, *_ = plain(inputs, options, torch.float64)
    levels = (exact * 127.5 + 127.5).clamp(0, 255)
    assert out.dtype == torch.uint8 and out.is_contiguous(memory_format=LAST)
    assert (out.double() - levels).abs().max() < 1  # what is convolved has been rounded too
    assert out.min() == 0 and out.max() == 255


@pytest.mark.parametrize("frames", [2, 4])
def test_a_view_serves_as_state(kernel, frames):
    """A view of the chunk before serves, with other frames between those of the batch entries."""
    case = Case((2 * frames, 2, 3), (16, 8), batch=2, kernel=(3, 1, 1))
    (x, weight, bias), options = make(case, kernel)
    whole, last = causal_conv3d(x, weight, bias, **options)
    outs, state = [], None
    for chunk in x.split(frames, dim=2):
        chunk = chunk.contiguous(memory_format=LAST)
        out, state = causal_conv3d(chunk, weight, bias, state=state, share_state=True, **options)
        assert state.untyped_storage().data_ptr() == chunk.untyped_storage().data_ptr()
        outs.append(out)
    assert torch.equal(torch.cat(outs, dim=2), whole) and torch.equal(state, last)


def test_an_expanded_state_serves(kernel):
    """Entries of an expanded batch share their memory, 0 apart."""
    case = Case((2, 2, 3), (16, 8), batch=2, kernel=(3, 1, 1), state=True)
    (x, weight, bias), options = make(case, kernel)
    state = options.pop("state")[:1].expand(2, -1, -1, -1, -1)
    out, _ = causal_conv3d(x, weight, bias, state=state, **options)
    wanted, _ = causal_conv3d(x, weight, bias, state=state.contiguous(), **options)
    assert torch.equal(out, wanted)


def test_frozen_weights_are_packed_once(kernel):
    """A change in place packs again, to the same address; a trained weight is packed in every
    call."""
    (x, weight, bias), options = make(Case((1, 2, 3), (8, 8), kernel=(1, 3, 3)), kernel)
    (_, other, _), _ = make(Case((1, 2, 3), (8, 8), kernel=(1, 3, 3)), kernel, seed=1)

    def run(weight):
        return causal_conv3d(x, weight, bias, **options)[0]

    def packed(weight):
        (entry,) = sm90.packed_weights._packed[weight].values()
        return entry.tensor

    wanted, changed = run(weight), run(other)
    first = packed(weight)
    before, address = first.clone(), first.data_ptr()
    assert torch.equal(run(weight), wanted) and packed(weight) is first
    assert packed(other) is not first

    weight.copy_(other)  # as load_state_dict does
    assert torch.equal(run(weight), changed)
    assert packed(weight).data_ptr() == address and not torch.equal(packed(weight), before)

    weight.data = other.clone()
    assert torch.equal(run(weight), changed)
    trained = torch.nn.Parameter(weight.clone())
    run(trained)
    assert trained not in sm90.packed_weights._packed
    held = len(sm90.packed_weights._packed)
    del weight
    gc.collect()
    assert len(sm90.packed_weights._packed) == held - 1


@pytest.mark.parametrize("warm", [False, True])
def test_a_graph_replays_with_changed_weights(kernel, warm):
    if kernel != "cuda":
        pytest.skip("graphs are the device's")
    (x, weight, bias), options = make(Case((1, 6, 9), (64, 64), batch=1), kernel)

    def run():
        return causal_conv3d(x, weight, bias, **options)[0]

    if warm:
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    weight.neg_()
    wanted = run()  # packs again; a graph that packs itself does so anyway
    graph.replay()
    assert torch.equal(out, wanted)


def test_one_weight_for_two_upsamplings(kernel):
    (x, weight, bias), options = make(Case((1, 3, 4), (8, 8), batch=1), kernel)
    for options["upsample"] in ((1, 2), (2, 2), (1, 2)):
        out, _ = causal_conv3d(x, weight, bias, **options)
        exact, baseline = (plain([x, weight, bias], options, t) for t in (torch.float64, x.dtype))
        assert_error_ratio(out, exact[0], baseline[0])


def test_state_and_input_are_left_alone(kernel):
    inputs, options = make(SIZES["shared pixels"], kernel)
    before = [t.clone() for t in (*inputs, options["state"], options["residual"])]
    causal_conv3d(*inputs, **options)
    after = (*inputs, options["state"], options["residual"])
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(dtype=torch.float32), "it takes bfloat16, got torch.float32"),
        (dict(contiguous=True), "it takes channels last in memory"),
        (dict(channels=(20, 8)), "it takes a multiple of 8 input channels, at most 1024, got 20"),
        (dict(kernel=(1, 5, 1)), "it takes kh and kw of 1 or 3, got"),
        (dict(stride=(1, 2, 2)), "it takes no stride and an upsampling of at most 2, got"),
        (dict(upsample=(3, 1)), "it takes no stride and an upsampling of at most 2, got"),
        (dict(channels=(16, 3), residual=True), "it takes a residual with a multiple of 8"),
        (dict(channels=(16, 3), next_norm=True), "it takes next_norm_weight with a multiple of 8"),
    ],
)
def test_limits_name_themselves(kernel, change, words):
    change = dict(change)
    dtype, contiguous = change.pop("dtype", None), change.pop("contiguous", False)
    case = Case((2, 4, 4), **(dict(channels=(16, 8)) | change))
    (x, weight, bias), options = make(case, kernel)
    x = x.contiguous() if contiguous else x
    if dtype:
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    with pytest.raises(BackendError, match=words):
        causal_conv3d(x, weight, bias, **options)
    with use_backend("auto"):  # others take it
        causal_conv3d(x, weight, bias, **options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "case",
    [*SIZES.values(), *UPSAMPLED.values(), *ROWS.values(), *NEXT_NORM.values()],
    ids=[*SIZES, *UPSAMPLED, *ROWS, *NEXT_NORM],
)
def test_sweep(kernel, schedule, case, seed):
    schedule(multiprocessors=(1, 4, 9, 17)[seed], seed=seed, tma=seed % 3, wgmma=seed % 2 * 2)
    check(case, kernel, seed)


@pytest.mark.parametrize("learnt", ["bias", "norm_weight", "residual", "next_norm_weight"])
def test_no_norm_ahead_of_a_gradient(kernel, learnt):
    """A decoder of which a part is trained norms where the gradient can follow."""
    weight = torch.zeros(64, 64, 1, 1, 1, dtype=torch.bfloat16, device=kernel)
    x = torch.zeros(1, 64, 1, 2, 2, dtype=torch.bfloat16, device=kernel).to(memory_format=LAST)
    others = {name: torch.ones(64, device=kernel) for name in ("bias", "next_norm_weight")}
    others |= {"norm_weight": None, "residual": None}
    assert fuses_next_norm(x, weight, *others.values())
    others[learnt] = torch.ones(64, device=kernel, requires_grad=True)
    assert not fuses_next_norm(x, weight, *others.values())
    with torch.no_grad():
        assert fuses_next_norm(x, weight, *others.values())


def test_autocast_hides_the_dtype_that_a_kernel_would_take(kernel):
    """The op casts before it chooses, so nobody can say whether that kernel norms."""
    weight = torch.zeros(64, 64, 1, 1, 1)
    x = torch.zeros(1, 64, 1, 2, 2).to(memory_format=LAST)
    with torch.autocast(x.device.type, torch.bfloat16), torch.no_grad():
        assert not fuses_next_norm(x, weight)
