"""Several new frames per call, and a cache of float8, against dense attention over the whole
history under a mask made here."""

import copy
import re

import pytest
import torch

from aapt_kernels import KVCache, cached_attention, kv_append, use_backend
from aapt_kernels.backend import BackendError, interpreted, no_sim

from .oracles import hadamard_matrix, rotate, round_to_e4m3

BATCH, HEADS, HEAD_DIM, TEXT, TOKENS = 2, 3, 8, 4, 5
NAMES = ["triton"] if interpreted() else ["reference", "cpu"]
FLOAT = torch.float32 if interpreted() else torch.float64
CLOSE = dict(rtol=1e-4, atol=1e-5) if interpreted() else dict(rtol=1e-10, atol=1e-10)
E4M3 = torch.float8_e4m3fn
STORES_BITS = pytest.mark.skipif(interpreted(), reason="Triton rounds q and the weights to float8")


@pytest.fixture(params=NAMES)
def backend(request):
    with use_backend(request.param):
        yield request.param


class Stream:
    """A cache and, beside it, every key and value that a step has appended."""

    def __init__(
        self,
        window,
        sink,
        *,
        text_lens=(TEXT, TEXT),
        dtype=FLOAT,
        scale=(1.0, 1.0),
        use_hadamard=False,
    ):
        self.window, self.sink, self.text_lens = window, sink, text_lens
        options = dict(dtype=dtype, compute_dtype=FLOAT, use_hadamard=use_hadamard)
        self.matrix = hadamard_matrix(HEAD_DIM) if use_hadamard else torch.eye(HEAD_DIM).double()
        self.cache = KVCache(
            BATCH,
            2,
            HEADS,
            HEAD_DIM,
            text_tokens=TEXT,
            tokens_per_frame=TOKENS,
            window_frames=window,
            sink_frames=sink,
            **options,
        )
        self.scales = None
        if dtype == E4M3:
            self.scales = [s * (1 + torch.arange(HEADS)) for s in scale]
            for held, own in zip(
                (self.cache.k_scale, self.cache.v_scale), self.scales, strict=True
            ):
                held[1] = own
        # What no step has written is seen by nobody
        self.cache.k.fill_(torch.nan)
        self.cache.v.fill_(torch.nan)
        text = torch.randn(2, BATCH, TEXT, HEADS, HEAD_DIM, dtype=FLOAT)
        self.cache.write_text(1, *text, torch.tensor(text_lens))
        self.text = [self.stored(x, i) for i, x in enumerate(text)]
        self.frames = [[], []]

    def stored(self, x, i):
        """The values that the cache keeps of keys (i = 0) or values (i = 1)."""
        x = x.double() @ self.matrix if i == 0 else x.double()
        if self.scales is None:
            return x
        scale = self.scales[i][:, None].double()
        return round_to_e4m3(x / scale) * scale

    def append(self, frames, spoil=lambda x: x):
        """Append random frames; returns q, q_sink and what the history would be after it."""
        q, k, v = spoil(torch.randn(3, BATCH, frames * TOKENS, HEADS, HEAD_DIM, dtype=FLOAT))
        angles = torch.rand(2, frames * TOKENS, HEAD_DIM // 2, dtype=FLOAT) * 6.3
        (cos, cos_sink), (sin, sin_sink) = angles.cos(), angles.sin()
        tables = dict(cos_sink=cos_sink, sin_sink=sin_sink)
        rotated = kv_append(q, k, v, self.cache, 1, None, None, cos, sin, **tables)
        for ours, table in zip(rotated, ((cos, sin), (cos_sink, sin_sink)), strict=True):
            exact = rotate(q.double(), *table) @ self.matrix
            torch.testing.assert_close(ours.double(), exact, equal_nan=True, **CLOSE)
        # The rotated key is rounded to the compute dtype before it is stored
        k = rotate(k.double(), cos, sin).to(FLOAT)
        new = [self.stored(x, i).split(TOKENS, dim=1) for i, x in enumerate((k, v))]
        history = [old + list(frames) for old, frames in zip(self.frames, new, strict=True)]
        return *rotated, history

    def attend(self, q, q_sink, history):
        """Dense attention: every new frame sees text, the sink and one window for all."""
        last = len(history[0]) - 1
        k, v = (torch.cat([x, *y], dim=1) for x, y in zip(self.text, history, strict=True))
        frame = torch.arange(len(history[0])).repeat_interleave(TOKENS)
        in_sink = frame < self.sink
        seen = (in_sink | (frame >= last - self.window)).expand(BATCH, -1)
        text = torch.arange(TEXT) < torch.tensor(self.text_lens)[:, None]
        hidden = ~torch.cat([text, seen], dim=1)
        k, v = (x.masked_fill(hidden[..., None, None], 0) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k)
        if q_sink is not None:
            of_sink = torch.einsum("bqhd,bkhd->bhqk", q_sink.double(), k)
            scores[..., TEXT:] = torch.where(in_sink, of_sink[..., TEXT:], scores[..., TEXT:])
        scores = (scores * HEAD_DIM**-0.5).masked_fill(hidden[:, None, None], -torch.inf)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)

    def step(self, frames, clamped, passes=1, spoil=lambda x: x):
        """Append and attend `passes` times, check each, finish the step; returns the output."""
        for _ in range(passes):
            q, q_sink, history = self.append(frames, spoil)
            q_sink = q_sink if clamped else None
            out, lse = cached_attention(q, self.cache, 1, q_sink=q_sink, return_lse=True)
            expected, expected_lse = self.attend(q, q_sink, history)
            for ours, exact in ((out, expected), (lse, expected_lse)):
                torch.testing.assert_close(ours.double(), exact, equal_nan=True, **CLOSE)
        self.frames = history
        self.cache.advance(frames)
        assert int(self.cache.step) == len(history[0])
        return out


# window frames, sink frames, frames of each step
PLANS = [
    (0, 1, [1, 1, 1, 1]),
    (2, 1, [1, 1, 1, 1, 1, 1]),
    (2, 1, [3, 3, 3, 3]),
    (2, 0, [3, 1, 2, 3]),
    (3, 2, [1, 3, 3, 3, 3]),
    (3, 5, [2, 2, 2, 2, 4, 3]),
    (4, 1, [4, 4, 4, 5, 1]),
    (6, 3, [2, 7, 5, 3, 6]),
]
if interpreted():  # which is slow
    PLANS = [(2, 0, [3, 1, 2, 3]), (3, 2, [1, 3, 3, 3])]


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("text_lens", [(TEXT, TEXT), (0, 3)])
@pytest.mark.parametrize(("window", "sink", "plan"), PLANS)
def test_frames_of_a_step_see_each_other_and_one_window(
    backend, window, sink, plan, text_lens, clamped
):
    """Filling and going round the ring, from 1 to window + 1 frames, across the end of the sink."""
    stream = Stream(window, sink, text_lens=text_lens)
    for frames in plan:
        stream.step(frames, clamped)


@pytest.mark.parametrize("clamped", [False, True])
def test_passes_over_a_step_write_its_frames_anew(backend, clamped):
    stream = Stream(3, 2)
    for frames in (1, 3, 4, 2):
        stream.step(frames, clamped, passes=3)


def test_nan_is_gone_with_its_frame(backend):
    """The last of three frames is NaN: its step sees NaN, and later ones until it is forgotten."""
    stream = Stream(4, 1)

    def spoil(x):
        x[:, :, -TOKENS:] = torch.nan
        return x

    stream.step(3, False)
    stream.step(3, False, spoil=spoil)  # frames 3, 4, 5
    finite = [bool(stream.step(2, False).isfinite().all()) for _ in range(4)]
    assert finite == [False, False, True, True]


@pytest.mark.parametrize(("window", "sink", "plan"), PLANS)
def test_the_prefix_after_chunks(window, sink, plan):
    stream = Stream(window, sink)
    for frames in plan:
        stream.step(frames, False)
    done = sum(plan)
    wanted = [*range(sink), *range(max(sink, done - window), done)]
    assert stream.cache.past_frames == len(wanted) - sink
    for ours, frames in zip(stream.cache.prefix(1), stream.frames, strict=True):
        torch.testing.assert_close(ours.double(), torch.cat([frames[i] for i in wanted], dim=1))


@pytest.mark.parametrize("dtype", [FLOAT, pytest.param(E4M3, marks=STORES_BITS)])
@pytest.mark.parametrize(("window", "sink", "plan"), PLANS)
def test_a_cache_filled_from_outside_continues_the_stream(window, sink, plan, dtype):
    """Frames that were made elsewhere, over others in the cache; the step after them is that of the
    stream they are of."""
    stream, other = (Stream(window, sink, dtype=dtype) for _ in range(2))
    name = NAMES[-1]
    with use_backend(name):
        other.step(1, False)
        for frames in plan[:-1]:
            stream.step(frames, False)
        done = sum(plan[:-1])
        if done < sink:
            pytest.skip("prefix needs the whole sink")
        other.cache.load_prefix(1, *stream.cache.prefix(1), done)
        for kept, history in zip(other.frames, stream.frames, strict=True):
            kept[:] = history
        other.text, text = stream.text, stream.cache.text_tokens
        for ours, theirs in ((other.cache.k, stream.cache.k), (other.cache.v, stream.cache.v)):
            ours[1, :, :text] = theirs[1, :, :text]
        other.step(plan[-1], False)
    assert int(other.cache.step) == sum(plan)


def test_frames_from_outside_must_be_those_that_are_seen():
    cache = Stream(2, 1).cache
    good = torch.zeros(BATCH, 3 * TOKENS, HEADS, HEAD_DIM, dtype=FLOAT)
    for name, k, v, step, words in (
        ("k", good[:, TOKENS:], good, 7, "expected (2, 15, 3, 8) for 1 sink and 2 past frames "),
        ("v", good, good[..., :4], 3, "expected (2, 15, 3, 8) for 1 sink and 2 past frames before"),
        ("k", good, good, 2, "expected (2, 10, 3, 8) for 1 sink and 1 past frames before frame 2"),
        ("step", good, good, -1, "expected an integer >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {re.escape(words)}"):
            cache.load_prefix(0, k, v, step)
    with pytest.raises(TypeError, match="k: expected"):
        cache.load_prefix(0, good.half(), good, 3)
    with pytest.raises(IndexError, match="layer: expected 0 ... 1, got 2"):
        cache.load_prefix(2, good, good, 3)
    assert int(cache.step) == 0 and cache.k[0].isnan().all()


@pytest.mark.parametrize("use_hadamard", [False, True])
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("clamped", [False, True])
@STORES_BITS
def test_a_cache_of_float8(backend, frames, clamped, use_hadamard):
    options = dict(scale=(0.25, 0.01), text_lens=(1, TEXT), use_hadamard=use_hadamard)
    stream = Stream(3, 1, dtype=E4M3, **options)
    for _ in range(5):
        stream.step(frames, clamped)
    wanted = [0, *range(5 * frames - 3, 5 * frames)]
    k, v = (torch.cat([history[i] for i in wanted], dim=1) for history in stream.frames)
    for ours, exact in zip(stream.cache.prefix(1), (k @ stream.matrix, v), strict=True):
        assert ours.dtype == FLOAT
        torch.testing.assert_close(ours.double(), exact)


@pytest.mark.parametrize("use_hadamard", [False, True])
@STORES_BITS
def test_a_float8_cache_filled_by_its_own_prefix_keeps_its_bits(use_hadamard):
    streams = [Stream(2, 1, dtype=E4M3, use_hadamard=use_hadamard) for _ in range(2)]
    with use_backend("cpu"):
        for _ in range(4):
            streams[0].step(1, False)
    one, other = (stream.cache for stream in streams)
    other.load_prefix(1, *one.prefix(1), 4)
    for ours, theirs in zip(other.prefix(1), one.prefix(1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@STORES_BITS
def test_values_of_a_float8_cache_are_transposed_in_memory():
    """Keys of a value's column are side by side, in rows on 16-byte boundaries; a clone's as
    well."""
    stream = Stream(2, 1, dtype=E4M3)
    for cache in (stream.cache, stream.cache.clone()):
        k, v = cache.k[1], cache.v[1]
        assert cache.capacity == 24 and k.shape == v.shape == (BATCH, 24, HEADS, HEAD_DIM)
        assert k.stride() == (HEADS * 32 * HEAD_DIM, HEAD_DIM, 32 * HEAD_DIM, 1)
        assert v.stride() == (HEADS * 32 * HEAD_DIM, 1, 32 * HEAD_DIM, 32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(dtype=FLOAT), f"expected False for a cache of {FLOAT}, got True"),
        (
            dict(dtype=E4M3, head_dim=24),
            "expected False for a head_dim of 24, which is no power of two, got True",
        ),
    ],
)
def test_caches_without_the_hadamard_matrix(options, words):
    sizes = dict(head_dim=8) | options
    with pytest.raises(ValueError, match=f"^use_hadamard: {re.escape(words)}$"):
        KVCache(
            *(1, 1, 1, sizes.pop("head_dim")),
            **dict(text_tokens=0, tokens_per_frame=1, window_frames=1, use_hadamard=True),
            **sizes,
        )


@STORES_BITS
def test_float8_keeps_what_is_too_large_finite(backend):
    options = dict(dtype=E4M3, self_check=False)
    cache = KVCache(1, 1, 1, 2, text_tokens=1, tokens_per_frame=1, window_frames=1, **options)
    assert cache.compute_dtype == torch.bfloat16
    x = torch.tensor([1e6, -1e6], dtype=torch.bfloat16).view(1, 1, 1, 2)
    cache.write_text(0, x, x)
    kv_append(x, x, x, cache, 0, None, None, None, None)
    cache.advance()
    for stored in (*cache.prefix(0), cache.k[:, 0, :1].to(torch.bfloat16)):
        assert stored.flatten().tolist() == [448.0, -448.0]
    bad = torch.full_like(x, torch.nan)
    kv_append(bad, bad, bad, cache, 0, None, None, None, None)
    assert cached_attention(x, cache, 0).isnan().all()


@STORES_BITS
def test_copies_of_a_float8_cache_have_its_scales():
    stream = Stream(1, 1, dtype=E4M3, scale=(0.5, 2.0))
    with use_backend("cpu"):
        stream.step(2, False)
        stream.step(1, False)
    cache = stream.cache
    for twin in (cache.clone(), copy.deepcopy(cache)):
        other = Stream(1, 1, dtype=E4M3).cache
        other.load(twin)
        cache.check_twin(other)
        for ours in (twin, other):
            for a, b in zip(ours.prefix(1), cache.prefix(1), strict=True):
                assert torch.equal(a, b)
        twin.k_scale.zero_()
        assert cache.k_scale[1].tolist() == [0.5, 1.0, 1.5]
    assert cache.bytes == 2 * cache.k.numel() + 8 + 16 + 2 * 2 * HEADS * 4
    for other in (Stream(1, 1), Stream(1, 1, dtype=E4M3, use_hadamard=True)):
        with pytest.raises(ValueError, match="cache: expected one of"):
            cache.load(other.cache)


@STORES_BITS
def test_autocast_casts_to_the_compute_dtype():
    options = dict(text_tokens=0, tokens_per_frame=1, window_frames=1, dtype=E4M3)
    cache = KVCache(1, 1, 1, 8, **options)
    x = torch.randn(1, 1, 1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        q = kv_append(x, x, x, cache, 0, None, None, None, None)
        assert q.dtype == cached_attention(x, cache, 0).dtype == torch.bfloat16


@pytest.mark.skipif(bool(no_sim()), reason=str(no_sim()))
def test_attention_names_the_head_dim_that_it_does_not_take():
    options = dict(text_tokens=0, tokens_per_frame=1, window_frames=1, dtype=E4M3)
    cache = KVCache(1, 1, 1, 64, **options)
    x = torch.randn(1, 1, 1, 64).bfloat16()
    words = "it takes a head_dim of 128 with a cache of float8, got 64"
    with use_backend("sim"), pytest.raises(BackendError, match=words):
        cached_attention(x, cache, 0)


def make_frames(length):
    return torch.zeros(BATCH, length, HEADS, HEAD_DIM, dtype=FLOAT)


def append(cache, lengths, tables=None):
    q, k, v = (make_frames(length) for length in lengths)
    cos = sin = None
    if tables is not None:
        cos, sin = torch.zeros(2, tables, HEAD_DIM // 2)
    return kv_append(q, k, v, cache, 0, None, None, cos, sin)


def tokens_words(got):
    return f"q: expected 5 tokens for each of 1 to 3 frames, the ring of this cache, got {got}"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda c: append(c, (0, 0, 0)), ValueError, tokens_words(0)),
        (lambda c: append(c, (7, 7, 7)), ValueError, tokens_words(7)),
        (lambda c: append(c, (20, 20, 20)), ValueError, tokens_words(20)),
        (lambda c: cached_attention(make_frames(20), c, 0), ValueError, tokens_words(20)),
        (
            lambda c: append(c, (10, 5, 10)),
            ValueError,
            "k: expected (2, 10, 3, 8) for this cache, got (2, 5, 3, 8)",
        ),
        (
            lambda c: append(c, (10, 10, 15)),
            ValueError,
            "v: expected (2, 10, 3, 8) for this cache, got (2, 15, 3, 8)",
        ),
        (
            lambda c: append(c, (10, 10, 10), tables=5),
            ValueError,
            "cos: expected (10, 4), got (5, 4)",
        ),
        (
            lambda c: cached_attention(make_frames(10), c, 0, q_sink=make_frames(5)),
            ValueError,
            "q_sink: expected (2, 10, 3, 8) for this cache, got (2, 5, 3, 8)",
        ),
        (
            lambda c: cached_attention(make_frames(5)[:, :, :2], c, 0),
            ValueError,
            "q: expected (2, n * tokens_per_frame, 3, 8) for this cache, got (2, 5, 2, 8)",
        ),
        (lambda c: c.advance(0), ValueError, "frames: expected an integer >= 1, got 0"),
        (lambda c: c.advance(1.5), TypeError, "frames: expected an integer >= 1, got 1.5"),
        (
            lambda c: c.advance(4),
            ValueError,
            "frames: expected at most 3, the ring of this cache, got 4",
        ),
        (
            lambda c: Stream(2, 1, dtype=torch.int8),
            TypeError,
            "dtype: expected one of torch.float32, torch.float64, torch.bfloat16, torch.float16, "
            "torch.float8_e4m3fn, got torch.int8",
        ),
        (
            lambda c: Stream(2, 1, dtype=torch.bfloat16),
            TypeError,
            f"compute_dtype: expected torch.bfloat16 for a cache of torch.bfloat16, got {FLOAT}",
        ),
    ],
)
def test_errors(call, error, words):
    cache = Stream(2, 1).cache
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        call(cache)
    assert int(cache.step) == 0
