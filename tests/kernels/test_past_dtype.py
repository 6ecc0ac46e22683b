"""A cache whose past is float8, while text, sink and the newest frame stay as they are: against
attention in float64 to two sets of keys, made here."""

import re

import pytest
import torch

from aapt_kernels import KVCache, cached_attention, kv_append

from .oracles import attend, hadamard_matrix, rotate

E4M3 = torch.float8_e4m3fn
TEXT, LAYER = 5, 1
BF16 = 2**-8


def e4m3(x):
    """Round to 4 significant bits, 2^-9 at the finest and 448 at the most, ties to even."""
    x = x.double().clamp(-448, 448)
    exponent = torch.where(x == 0, torch.ones_like(x), x.abs()).log2().floor().clamp(min=-6)
    unit = torch.exp2(exponent - 3)
    return (x / unit).round() * unit


class Stream:
    """A cache that is NaN where nothing has been stored, and every key and value beside it."""

    def __init__(
        self,
        device="cpu",
        *,
        dtype=torch.float64,
        window=2,
        sink=1,
        tokens=6,
        heads=3,
        head_dim=8,
        text_lens=(TEXT, 2),
        use_hadamard=True,
        self_check=True,
    ):
        self.device, self.dtype, self.window, self.sink = device, dtype, window, sink
        self.shape = (len(text_lens), tokens, heads, head_dim)
        self.generator = torch.Generator().manual_seed(0)
        self.cache = KVCache(
            *(len(text_lens), 2, heads, head_dim),
            **dict(text_tokens=TEXT, tokens_per_frame=tokens, window_frames=window),
            **dict(sink_frames=sink, dtype=dtype, past_dtype=E4M3, use_hadamard=use_hadamard),
            **dict(self_check=self_check, device=device),
        )
        past = self.cache.past
        for x in (self.cache.k, self.cache.v):
            x.fill_(torch.nan)
        for x in (past.k, past.v):
            x.view(torch.uint8).fill_(0x7F)
        self.scales = [0.01 * (1 + torch.arange(heads)), 0.015 * (1 + torch.arange(heads))]
        past.k_scale[LAYER], past.v_scale[LAYER] = (x.to(device) for x in self.scales)
        self.matrix = hadamard_matrix(head_dim) if use_hadamard else torch.eye(head_dim).double()
        self.text_lens = torch.tensor(text_lens)
        self.text = [self.normal(len(text_lens), TEXT, heads, head_dim) for _ in range(2)]
        self.cache.write_text(LAYER, *(x.to(device) for x in self.text), self.text_lens)
        self.frames = []  # keys, turned, and values of every frame

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def step(self, pinned=False, passes=1):
        """Append a frame, attend, end the step. Return out and lse, and both from the oracle, of
        exact weights and of weights in E4M3."""
        for _ in range(passes):
            q, k, v = (self.normal(*self.shape) for _ in range(3))
            angles = torch.rand(2, *self.shape[1::2], generator=self.generator)[..., ::2] * 6.3
            tables = [x.to(self.device) for x in (*angles.cos(), *angles.sin())]
            cos, cos_sink, sin, sin_sink = tables
            given = (x.to(self.device) for x in (q, k, v))
            options = dict(cos_sink=cos_sink, sin_sink=sin_sink) if pinned else {}
            made = kv_append(*given, self.cache, LAYER, None, None, cos, sin, **options)
            made, q_sink = made if pinned else (made, None)
            ours = cached_attention(made, self.cache, LAYER, q_sink=q_sink, return_lse=True)
        k = rotate(k, angles[0].cos(), angles[0].sin()).to(self.dtype)
        self.frames.append((k, v))
        self.cache.advance()
        q_sink = q_sink if q_sink is None else q_sink.cpu()
        return [x.cpu() for x in ours], *(self.attend(made.cpu(), q_sink, e) for e in (False, True))

    def stored(self, k, v):
        """The past as the cache keeps it, keys turned back."""
        k, v = (
            e4m3(x / scale[:, None]) * scale[:, None].double()
            for x, scale in zip((k.double() @ self.matrix, v.double()), self.scales, strict=True)
        )
        return k @ self.matrix, v

    def attend(self, q, q_sink, rounds):
        tokens, scale = self.shape[1], self.shape[3] ** -0.5
        sinks, newest = self.frames[:-1][: self.sink], self.frames[-1]
        past = self.frames[self.sink : -1][-self.window :]
        near = [torch.cat([x, *y, z], 1) for x, y, z in zip(self.text, pairs(sinks), newest)]
        seen = torch.ones(near[0].shape[:2], dtype=torch.bool)
        seen[:, :TEXT] = torch.arange(TEXT) < self.text_lens[:, None]
        sink = slice(TEXT, TEXT + min(len(self.frames), self.sink) * tokens)
        out, lse = attend(q, *near, seen, scale, q_sink=q_sink, sink=sink)
        if not past:
            return out, lse
        far = [torch.cat(x, 1) for x in zip(*(self.stored(*frame) for frame in past), strict=True)]
        turned = q.double() @ self.matrix
        if self.cache.past.use_hadamard:  # rounded after a product with the signs of the matrix
            root = self.shape[3] ** 0.5
            turned = (turned * root).to(self.dtype).double() / root
        turned = [turned, far[0] @ self.matrix]
        seen = torch.ones(far[0].shape[:2], dtype=torch.bool)
        other, other_lse = attend(*turned, far[1], seen, scale, e4m3=rounds)
        merged = torch.logaddexp(lse, other_lse)
        weights = ((x - merged).exp().transpose(1, 2)[..., None] for x in (lse, other_lse))
        return sum(x * weight for x, weight in zip((out, other), weights, strict=True)), merged


def pairs(frames):
    """Keys and values of frames, in lists."""
    return [[k for k, _ in frames], [v for _, v in frames]]


def relative(x, y):
    return float((x.double() - y).norm() / y.norm())


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("use_hadamard", [False, True])
@pytest.mark.parametrize(("window", "sink"), [(1, 1), (2, 0), (3, 2)])
def test_the_past_is_rounded_and_nothing_else(backend, window, sink, use_hadamard, pinned):
    stream = Stream(window=window, sink=sink, use_hadamard=use_hadamard)
    for step in range(sink + 2 * window + 2):
        ours, exact, _ = stream.step(pinned, passes=1 + step % 2)
        for one, other in zip(ours, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert int(stream.cache.past.step) == 2 * window + 2


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("use_hadamard", [False, True])
def test_kernels_lose_what_the_emulation_loses(kernel, schedule, use_hadamard, pinned):
    schedule(multiprocessors=3, seed=1)
    sizes = dict(tokens=70, heads=2, head_dim=128, dtype=torch.bfloat16)
    stream = Stream(kernel, use_hadamard=use_hadamard, **sizes)
    for _ in range(5):
        (out, lse), (exact, _), (emulated, emulated_lse) = stream.step(pinned)
        assert relative(out, exact) <= 1.1 * relative(emulated, exact) + BF16
        assert relative(out, emulated) < 0.05
        torch.testing.assert_close(lse.double(), emulated_lse, rtol=0, atol=5e-3)
    calls = {("cached_attention", LAYER, 70), ("advance", LAYER, 70)}
    assert calls <= stream.cache.past.checked


def test_state_is_copied_with_the_past(backend):
    stream, other = Stream(), Stream()
    for _ in range(5):
        stream.step()
    twin = stream.cache.clone()
    other.cache.load(stream.cache)
    names = {"k", "v", "step", "text_lens", "past.k", "past.v", "past.step", "past.text_lens"}
    assert twin.tensors().keys() == names | {"past.k_scale", "past.v_scale"}
    assert twin.bytes == sum(x.nbytes for x in twin.tensors().values())
    wanted = [stream.frames[i] for i in (0, 3, 4)]
    for cache in (stream.cache, twin, other.cache):
        for x, exact in zip(cache.prefix(LAYER), zip(*wanted, strict=True), strict=True):
            torch.testing.assert_close(x[:, :6], exact[0], rtol=1e-12, atol=1e-12)
            assert relative(x[:, 6:], torch.cat(exact[1:], 1)) < 0.04
    twin.past.v.zero_()
    assert stream.cache.past.v.float().count_nonzero()
    stream.cache.reset()
    assert int(stream.cache.step) == int(stream.cache.past.step) == 0
    stream.frames = []
    for _ in range(3):
        (out, _), (exact, _), _ = stream.step()
        torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_cache_filled_from_outside_continues_the_stream(steps):
    stream, other = Stream(), Stream()
    for _ in range(steps):
        stream.step()
    frames = stream.frames[:1] + stream.frames[1:][-2:]
    k, v = (torch.cat([x[:, :0] for x in other.text[:1]] + x, 1) for x in pairs(frames))
    other.cache.load_prefix(LAYER, k, v, steps)
    other.generator.set_state(stream.generator.get_state())
    other.frames = list(stream.frames)
    for _ in range(3):
        (out, lse), (exact, exact_lse), _ = other.step()
        torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lse, exact_lse, rtol=1e-10, atol=1e-10)


def test_a_step_compiles_without_a_graph_break():
    torch._dynamo.reset()

    def step(x, cache):
        q = kv_append(x, x, x, cache, LAYER, None, None, None, None)
        out = cached_attention(q, cache, LAYER)
        cache.advance()
        return out

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    cache = Stream(dtype=torch.float32).cache
    twin = cache.clone()
    for seed in range(4):
        x = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(compiled(x, cache), step(x, twin))


def test_a_scale_that_does_not_fit_is_named_when_the_step_ends():
    stream = Stream()
    stream.step()
    stream.cache.past.v_scale[LAYER, 2] = 1e-4
    words = "advance: expected v as stored .* in head 2 of layer 1; set v_scale[1, 2] of the cache"
    with pytest.raises(RuntimeError, match=re.sub(r"[][]", r"\\\g<0>", words)):
        stream.step()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            dict(past_dtype=torch.bfloat16),
            TypeError,
            "past_dtype: expected torch.float8_e4m3fn beside a wider dtype, got torch.bfloat16 "
            "beside torch.float32",
        ),
        (
            dict(past_dtype=E4M3, dtype=E4M3),
            TypeError,
            "past_dtype: expected torch.float8_e4m3fn beside a wider dtype, got "
            "torch.float8_e4m3fn beside torch.float8_e4m3fn",
        ),
        (
            dict(past_dtype=E4M3, window_frames=0),
            ValueError,
            "window_frames: expected at least 1 with past_dtype, got 0",
        ),
    ],
)
def test_errors(options, error, words):
    sizes = dict(text_tokens=0, tokens_per_frame=1, window_frames=1)
    with pytest.raises(error, match=f"^{words}$"):
        KVCache(1, 1, 1, 8, **sizes | options)


def test_a_step_has_one_frame():
    cache = Stream().cache
    with pytest.raises(ValueError, match="frames: expected at most 1, the ring of this cache"):
        cache.advance(2)
    with pytest.raises(ValueError, match="cache: expected one of"):
        cache.load(KVCache(2, 2, 3, 8, text_tokens=TEXT, tokens_per_frame=6, window_frames=2))
