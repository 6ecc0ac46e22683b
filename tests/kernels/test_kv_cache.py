"""KVCache on its own, and what kv_append and cached_attention refuse."""

import pickle
import re

import pytest
import torch

from aapt_kernels import KVCache, cached_attention, kv_append

TEXT, TOKENS, WINDOW = 4, 3, 2


def make_cache(**changes):
    sizes = dict(batch=2, layers=2, heads=1, head_dim=2)
    geometry = dict(text_tokens=TEXT, tokens_per_frame=TOKENS, window_frames=WINDOW)
    return KVCache(**sizes | geometry | changes)


def make_frame(value=0.0, tokens=TOKENS):
    return torch.full((2, tokens, 1, 2), value)


def append(cache, value):
    for layer in range(2):
        frame = make_frame(value)
        kv_append(frame, frame, frame, cache, layer, None, None, None, None)
    cache.advance()


def test_capacity_is_text_sink_and_ring():
    cache = make_cache(sink_frames=2)
    assert cache.capacity == TEXT + (2 + WINDOW + 1) * TOKENS
    assert cache.k.shape == cache.v.shape == (2, 2, cache.capacity, 1, 2)
    assert cache.step.shape == () and cache.step.dtype == torch.int64


def test_what_is_pickled_is_the_state_alone():
    """Memory for the kernels and their checks are those of a device, which another may not have."""
    cache = make_cache()
    append(cache, 2.0)
    cache.workspace, cache.checked = torch.zeros(9), {("cached_attention", 0, 3)}
    read = pickle.loads(pickle.dumps(cache))
    assert read.workspace is None and read.checked == set()
    assert cache.workspace is not None and cache.checked
    for name, x in cache.tensors().items():
        assert torch.equal(read.tensors()[name], x)


def test_text_fills_the_end_of_its_slot():
    cache = make_cache()
    k = torch.arange(12.0).view(2, 3, 1, 2) + 1
    cache.write_text(1, k, 2 * k)
    rows = slice(TEXT - 3, TEXT)
    assert torch.equal(cache.k[1, :, rows], k) and torch.equal(cache.v[1, :, rows], 2 * k)
    assert not cache.k[0].any() and not cache.k[1, :, TEXT:].any()
    assert not cache.k[1, :, : TEXT - 3].any()
    assert cache.text_lens.tolist() == [3, 3]
    cache.write_text(1, k, 2 * k, torch.tensor([1, 2], dtype=torch.int32))
    assert cache.text_lens.tolist() == [1, 2]
    assert torch.equal(cache.k[1, 0, TEXT - 1], k[0, 0])
    assert torch.equal(cache.k[1, 1, TEXT - 2 : TEXT], k[1, :2])
    assert torch.equal(cache.v[1, 1, TEXT - 2 : TEXT], 2 * k[1, :2])


@pytest.mark.parametrize("sink_frames", [0, 1, 2])
def test_prefix_is_sink_then_past_in_order(sink_frames):
    cache = make_cache(sink_frames=sink_frames)
    for frame in range(8):
        if frame < sink_frames:
            words = f"prefix: expected at least {sink_frames} finished steps, got {frame}"
            with pytest.raises(RuntimeError, match=words):
                cache.prefix(0)
        else:
            past = range(max(sink_frames, frame - WINDOW), frame)
            assert cache.past_frames == len(past)
            k, v = cache.prefix(0)
            wanted = [*range(sink_frames), *past]
            assert k.shape[1] == len(wanted) * TOKENS
            assert k[0, ::TOKENS, 0, 0].tolist() == wanted
            assert torch.equal(k, v)
        append(cache, float(frame))


def test_reset_and_clone():
    cache = make_cache()
    cache.write_text(0, *(torch.ones(2, 2, 1, 2),) * 2)
    append(cache, 1.0)
    twin = cache.clone()
    cache.reset()
    append(cache, 5.0)
    append(cache, 6.0)
    assert int(twin.step) == 1 and int(cache.step) == 2
    assert twin.prefix(0)[0].unique().tolist() == [1.0]
    assert cache.prefix(0)[0].unique().tolist() == [5.0, 6.0]
    assert cache.text_lens.tolist() == twin.text_lens.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda c: make_cache(heads=0), ValueError, "heads: expected an integer >= 1, got 0"),
        (
            lambda c: make_cache(window_frames=None),
            ValueError,
            "window_frames: expected an integer >= 0, got None",
        ),
        (
            lambda c: c.write_text(0, make_frame(tokens=5), make_frame(tokens=5)),
            ValueError,
            "k: expected at most 4 text tokens, the slot of this cache, got 5",
        ),
        (
            lambda c: c.write_text(0, torch.zeros(2, 3, 4, 2), torch.zeros(2, 3, 4, 2)),
            ValueError,
            "k: expected (2, length, 1, 2) for this cache, got (2, 3, 4, 2)",
        ),
        (
            lambda c: c.write_text(0, make_frame(), make_frame(tokens=2)),
            ValueError,
            "v: expected (2, 3, 1, 2), got (2, 2, 1, 2)",
        ),
        (
            lambda c: c.write_text(0, make_frame().double(), make_frame().double()),
            TypeError,
            "k: expected torch.float32 like cache, got torch.float64",
        ),
        (
            lambda c: c.write_text(0, make_frame(), make_frame(), torch.zeros(1).long()),
            ValueError,
            "text_lens: expected (2,), got (1,)",
        ),
        (
            lambda c: c.write_text(2, make_frame(), make_frame()),
            IndexError,
            "layer: expected 0 ... 1, got 2",
        ),
        (
            lambda c: call_append(c, k=make_frame(tokens=4)),
            ValueError,
            "k: expected (2, 3, 1, 2) for this cache, got (2, 4, 1, 2)",
        ),
        (
            lambda c: call_append(c, v=make_frame().bfloat16()),
            TypeError,
            "v: expected torch.float32 like cache, got torch.bfloat16",
        ),
        (
            lambda c: call_append(c, q=make_frame().to("meta")),
            ValueError,
            "q: expected a tensor on cpu like cache, got meta",
        ),
        (
            lambda c: call_append(c, v=torch.zeros(2, 3, 1, 4)[..., ::2]),
            ValueError,
            "v: expected a contiguous last dimension (stride 1), got strides (12, 4, 4, 2)",
        ),
        (
            lambda c: call_append(c, q=make_frame().requires_grad_()),
            RuntimeError,
            "q: kv_append has no gradient; expected a tensor that does not require grad, or a "
            "call under torch.no_grad(), got requires_grad=True",
        ),
        (
            lambda c: call_append(c, k_weight=torch.ones(2, requires_grad=True)),
            RuntimeError,
            "k_weight: kv_append has no gradient; expected a tensor that does not require grad, "
            "or a call under torch.no_grad(), got requires_grad=True",
        ),
        (
            lambda c: call_append(c, cos=torch.ones(4, 1), sin=torch.ones(4, 1)),
            ValueError,
            "cos: expected (3, 1), got (4, 1)",
        ),
        (lambda c: call_append(c, layer=-1), IndexError, "layer: expected 0 ... 1, got -1"),
        (
            lambda c: cached_attention(make_frame(tokens=2), c, 0),
            ValueError,
            "q: expected 3 tokens for each of 1 to 3 frames, the ring of this cache, got 2",
        ),
        (
            lambda c: cached_attention(make_frame(), c, 0, q_sink=make_frame(tokens=1)),
            ValueError,
            "q_sink: expected (2, 3, 1, 2) for this cache, got (2, 1, 1, 2)",
        ),
        (
            lambda c: cached_attention(make_frame().requires_grad_(), c, 0),
            RuntimeError,
            "q: cached_attention has no gradient; expected a tensor that does not require grad, "
            "or a call under torch.no_grad(), got requires_grad=True",
        ),
    ],
)
def test_errors(call, error, words):
    cache = make_cache()
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        call(cache)
    assert not cache.k.any()


def call_append(cache, layer=0, **changes):
    arguments = {"q": make_frame(), "k": make_frame(), "v": make_frame()} | changes
    weights = {"q_weight": None, "k_weight": None, "cos": None, "sin": None}
    return kv_append(cache=cache, layer=layer, **weights | arguments)


def test_parameters_may_require_grad_without_grad_mode():
    cache = make_cache()
    weight = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        call_append(cache, q=make_frame(1.0), q_weight=weight, k_weight=weight)
