"""Contracts that hold for every op: autocast, empty problems, the meta device, integers, inference
mode."""

import re

import numpy as np
import pytest
import torch

from aapt_kernels import (
    FrameLayout,
    KVCache,
    block_causal_attention,
    cached_attention,
    causal_conv3d,
    kv_append,
    qk_norm_rope,
)

from .calls import DIFFERENTIABLE, make_cache, make_call


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_autocast_casts_as_attention_of_pytorch_does(op, backend):
    """float32 of a norm meets bfloat16 of a projection; gradients have the dtypes of the inputs.

    What an op computes in float32 it computes in float32 under autocast too."""
    function, tensors = make_call(op)
    rounded = [x.bfloat16() for x in tensors]
    expected = function(*rounded)
    mixed = [x.clone() if i % 2 else x.float() for i, x in enumerate(rounded)]
    leaves = [x.requires_grad_() for x in mixed]
    with torch.autocast("cpu", torch.bfloat16):
        actual = function(*leaves)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    for gradient, leaf in zip(
        torch.autograd.grad(actual[0].sum(), leaves[:2], allow_unused=True), leaves
    ):
        assert gradient is None or gradient.dtype == leaf.dtype


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_autocast_leaves_float64_alone(op, backend):
    function, tensors = make_call(op, torch.float64)
    expected = function(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(function(*tensors), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_casts_to_the_dtype_of_the_cache(dtype, backend):
    q, k, v = torch.randn(3, 1, 3, 2, 8).bfloat16()
    nothing = (None,) * 4
    cache, twin = make_cache(dtype=dtype), make_cache(dtype=dtype)
    rotated = kv_append(*(x.to(dtype) for x in (q, k, v)), twin, 0, *nothing)
    expected = cached_attention(rotated, twin, 0)
    with torch.autocast("cpu", torch.bfloat16):
        rotated = kv_append(q.float(), k.float(), v, cache, 0, *nothing)
        actual = cached_attention(rotated.float(), cache, 0)
    assert actual.dtype == dtype and torch.equal(actual, expected)
    assert torch.equal(cache.k, twin.k) and torch.equal(cache.v, twin.v)


@pytest.mark.parametrize("shape", [(0, 17, 2, 8), (2, 17, 0, 8)])
def test_no_batch_and_no_heads(shape, backend):
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    out, lse = block_causal_attention(q, k, v, FrameLayout(5, 3, 4, 2), return_lse=True)
    rotated = qk_norm_rope(q, k, torch.ones(8), None, *torch.rand(2, 17, 4))
    assert out.shape == rotated[0].shape == rotated[1].shape == shape
    assert lse.shape == (shape[0], shape[2], 17)
    sum(x.sum() for x in (out, lse, *rotated)).backward()
    assert all(x.grad.shape == shape for x in (q, k, v))


@pytest.mark.parametrize("past_frames", [None, 2])
def test_no_rows(past_frames, backend):
    layout = FrameLayout(0, 3, 0, 2, past_frames=past_frames)
    q = torch.randn(2, 0, 2, 8, requires_grad=True)
    k = torch.randn(2, layout.key_length, 2, 8, requires_grad=True)
    out = block_causal_attention(q, k, k, layout)
    out.sum().backward()
    assert out.shape == q.grad.shape == (2, 0, 2, 8)
    assert k.grad.shape == k.shape and not k.grad.any()
    assert qk_norm_rope(q, q, None, None, None, None)[0].shape == q.shape


def test_no_batch_of_a_convolution(backend):
    x, weight = torch.randn(0, 4, 3, 6, 6), torch.randn(8, 4, 3, 3, 3)
    for tensor in (x, weight):
        tensor.requires_grad_()
    out, state = causal_conv3d(x, weight, norm_weight=torch.ones(4), silu=True)
    out.sum().backward()
    assert out.shape == (0, 8, 3, 6, 6) and state.shape == (0, 4, 2, 6, 6)
    assert x.grad.shape == x.shape and not weight.grad.any()


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        ((1, 4, 1, 0, 6), (8, 4, 3, 3, 3), "x: expected at least one channel and pixel, got"),
        ((1, 4, 1, 6, 0), (8, 4, 3, 3, 3), "x: expected at least one channel and pixel, got"),
        ((1, 0, 1, 6, 6), (8, 0, 3, 3, 3), "x: expected at least one channel and pixel, got"),
        ((1, 4, 1, 6, 6), (0, 4, 3, 3, 3), "weight: expected out_channels and kt >= 1, got"),
        ((1, 4, 1, 6, 6), (8, 4, 0, 3, 3), "weight: expected out_channels and kt >= 1, got"),
    ],
)
def test_a_convolution_of_nothing_is_named(x, weight, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        causal_conv3d(torch.zeros(x), torch.zeros(weight))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_shapes_on_the_meta_device(op):
    function, tensors = make_call(op)
    expected = function(*tensors)
    function, _ = make_call(op, device="meta")
    leaves = [x.to("meta").requires_grad_() for x in tensors]
    actual = function(*leaves)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.is_meta and (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    sum(x.sum() for x in actual).backward()
    assert all(x.grad.shape == x.shape for x in leaves)


def test_a_stream_on_the_meta_device():
    cache, frame = make_cache(device="meta"), torch.empty(1, 3, 2, 8, device="meta")
    cache.write_text(0, frame[:, :2], frame[:, :2])
    q = kv_append(frame, frame, frame, cache, 0, None, None, None, None)
    assert cached_attention(q, cache, 0).shape == frame.shape
    cache.advance()
    cache.reset()


def test_a_cache_serves_inside_and_outside_of_inference_mode():
    outside = make_cache()
    with torch.inference_mode():
        inside = make_cache()
        caches = [outside, inside, inside.clone(), outside.clone()]
    frame, weight = torch.randn(1, 3, 2, 8), torch.ones(8, requires_grad=True)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.no_grad()):
        with mode:
            for cache in caches:
                cache.write_text(0, frame[:, :2], frame[:, :2])
                q = kv_append(frame, frame, frame, cache, 0, weight, weight, None, None)
                assert cached_attention(q, cache, 0).isfinite().all()
                cache.advance()
                cache.reset()
    k, v = inside.prefix(0) if int(inside.step) else (inside.k[0], inside.v[0])
    q = torch.randn_like(k).requires_grad_()  # and what it holds may be saved for a gradient
    block_causal_attention(q, k, v, FrameLayout(0, k.shape[1], 1, 0)).sum().backward()


SIZES = dict(text_tokens=4, tokens_per_frame=3, window_frames=2)


def test_sizes_are_integers_of_any_kind():
    layout = FrameLayout(*(np.int64(n) for n in (5, 3, 4, 2)))
    assert layout == FrameLayout(5, 3, 4, 2)
    assert all(type(n) is int for n in layout.integers if n is not None)
    cache = KVCache(*map(np.int32, (1, 2, 2, 8)), **{n: np.int64(x) for n, x in SIZES.items()})
    assert cache.integers == (4, 3, 2, 1)
    frame = torch.randn(1, 3, 2, 8)
    kv_append(frame, frame, frame, cache, np.int64(1), None, None, None, None)
    assert cache.k[1].any() and not cache.k[0].any()
    x, weight = torch.randn(1, 4, 1, 4, 4), torch.randn(4, 4, 1, 1, 1)
    stride = tuple(np.array([1, 2, 2]))
    assert causal_conv3d(x, weight, stride=stride)[0].shape == (1, 4, 1, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: FrameLayout(5.0, 3, 4, 2),
            TypeError,
            "text_tokens: expected an integer >= 0, got 5.0",
        ),
        (
            lambda: FrameLayout(5, 3, 4, 2.5),
            TypeError,
            "window_frames: expected an integer >= 0 or None, got 2.5",
        ),
        (
            lambda: FrameLayout(5, 3, None, 2),
            ValueError,
            "frames: expected an integer >= 0, got None",
        ),
        (
            lambda: KVCache(1, 1.0, 2, 8, **SIZES),
            TypeError,
            "layers: expected an integer >= 1, got 1.0",
        ),
        (
            lambda: make_cache().check_layer(1.0),
            TypeError,
            "layer: expected an integer, got 1.0",
        ),
        (
            lambda: causal_conv3d(
                torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 1, 1), stride=(1, 2.0, 2)
            ),
            ValueError,
            "stride: expected three integers >= 1, got (1, 2.0, 2)",
        ),
    ],
)
def test_what_is_no_integer_is_named(call, error, words):
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        call()


def test_a_negative_text_length_is_none(backend):
    q = torch.randn(2, 17, 2, 8)
    layout = FrameLayout(5, 3, 4, 2)
    results = [
        block_causal_attention(q, q, q, layout, text_lens=torch.tensor(lens), return_lse=True)
        for lens in ((-1, 5), (0, 9))
    ]
    cache, frame = make_cache(), q[:1, :3]
    kv_append(frame, frame, frame, cache, 0, None, None, None, None)
    for length in (-1, 0):
        cache.text_lens.fill_(length)
        results.append(cached_attention(frame, cache, 0, return_lse=True))
    for ours, expected in ((results[0], results[1]), (results[2], results[3])):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert ours[0].isfinite().all()
