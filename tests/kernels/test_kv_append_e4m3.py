"""The sm_90a kernel of kv_append on a cache of E4M3 against float64: simulated everywhere, and on
the device where there is one."""

import pytest
import torch

from aapt_kernels import kv_append

from .appended import TEXT, Appended
from .oracles import hadamard_matrix

E4M3 = torch.float8_e4m3fn
ROUNDING = 2**-8  # of BF16 queries: the kernel rounds once, by half a unit


def bits(x):
    return x.contiguous().view(torch.uint8)


def storage(x):
    """All bytes behind a cache, the padding of its rows included."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def spacing(x):
    """Distance between the E4M3 values around x."""
    exponent = torch.where(x == 0, torch.ones_like(x), x.abs()).log2().floor().clamp(min=-6)
    return torch.exp2(exponent - 3)


class Stream(Appended):
    """Random frames, appended to one layer of a cache that is NaN elsewhere."""

    def __init__(self, device, *, use_hadamard=True, **options):
        options |= dict(dtype=E4M3, use_hadamard=use_hadamard, self_check=False)
        super().__init__(device, **options)
        head_dim = self.shape[3]
        matrix = hadamard_matrix(head_dim) if use_hadamard else torch.eye(head_dim).double()
        self.matrix = matrix.to(device)

    def fill(self):
        for x in (self.cache.k, self.cache.v):
            storage(x).fill_(0x7F)
        scales = torch.rand(2, 2, self.shape[2], generator=self.generator) * 0.1 + 0.02
        self.cache.k_scale[:], self.cache.v_scale[:] = scales.to(self.device)

    def make_qkv(self):
        """v has values beyond the range, and NaN."""
        qkv = super().make_qkv()
        qkv[0, -1, 2, 0, :4] = torch.tensor([1e4, -torch.inf, torch.nan, -0.0])
        return qkv

    def append_and_check(self, *slots):
        """Check one step: the outputs, the slots, and every other byte of the cache."""
        cache, rows = self.cache, self.rows(slots)
        q, k, v = self.make_frame()
        before = storage(cache.k).clone(), storage(cache.v).clone()
        queries, keys = self.append(q, k, v)
        for got, want in queries:
            torch.testing.assert_close(got.double(), want @ self.matrix, rtol=ROUNDING, atol=2e-5)

        key_bits, value_bits = (bits(x[1].view(torch.uint8)[:, rows]) for x in (cache.k, cache.v))
        exact = keys @ self.matrix / cache.k_scale[1, :, None].double()
        assert exact.abs().max() < 448
        key = key_bits.view(E4M3).double()
        # A value within float32's error of the middle may go either way, no other
        float32_error = 2**-18 * exact.abs().amax(-1, keepdim=True)
        assert ((key - exact).abs() <= spacing(exact) / 2 + float32_error).all()
        quotients = v.float() * cache.v_scale[1, :, None].reciprocal()
        expected = quotients.clamp(-448, 448).to(E4M3)
        nan = expected.isnan()
        assert nan.any() and torch.equal(value_bits.view(E4M3).isnan(), nan)
        assert torch.equal(value_bits[~nan], bits(expected)[~nan])

        for x, old in zip((cache.k, cache.v), before, strict=True):
            after = storage(x).clone()
            for whole in (after, old):
                twin = whole.as_strided(x.shape, x.stride())
                twin[1, :, rows] = 0
            assert torch.equal(after, old)
        cache.advance(len(slots))


@pytest.mark.parametrize("use_hadamard", [False, True])
@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 1, 1), (2, 7, 3), (1, 130, 5)])
def test_writes_the_frame_and_nothing_else(
    kernel, schedule, batch, tokens, heads, head_dim, across_heads, use_hadamard
):
    """Slots begin and end anywhere in a word and a tile."""
    schedule(seed=tokens, multiprocessors=2)
    stream = Stream(
        kernel,
        batch=batch,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        across_heads=across_heads,
        use_hadamard=use_hadamard,
        weight_dtype=torch.bfloat16 if use_hadamard else torch.float32,
    )
    for slot in (0, 1, 2, 3, 1):
        stream.append_and_check(slot)


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize(
    ("frames", "window_frames", "sink_frames", "steps"),
    [(3, 2, 1, [(0, 1, 2), (3, 1, 2)]), (2, 2, 3, [(0, 1), (2, 3), (4, 5), (3, 4)])],
)
def test_several_frames_go_round_the_ring(
    kernel, frames, window_frames, sink_frames, steps, across_heads
):
    stream = Stream(
        kernel,
        batch=2,
        tokens=70,
        frames=frames,
        window_frames=window_frames,
        sink_frames=sink_frames,
        across_heads=across_heads,
    )
    for slots in steps:
        stream.append_and_check(*slots)


def test_text_and_prefix_use_the_same_memory(kernel):
    """write_text and prefix, in plain PyTorch, agree with the kernel on what a byte means."""
    stream = Stream(kernel, batch=2, tokens=9, window_frames=1, sink_frames=1)
    cache = stream.cache
    for _ in range(3):
        q, k, v = stream.make_frame()
        v = v.nan_to_num(0, 0, 0).clamp(-4, 4)
        kv_append(q, k, v, cache, 1, None, None, None, None)
        cache.advance()
    for got, want in zip(cache.prefix(1), (k, v), strict=True):
        newest = got[:, -9:].double()
        assert (newest - want.double()).norm() < 0.03 * want.double().norm()
    # The newest frame is in the last slot
    cache.write_text(1, k[:, :TEXT], v[:, :TEXT])
    texts, frames = (
        [x[1].view(torch.uint8)[:, a : a + TEXT] for x in (cache.k, cache.v)]
        for a in (0, TEXT + 2 * 9)
    )
    assert torch.equal(texts[1], frames[1])
    text, frame = (x[0].contiguous().view(E4M3).double() for x in (texts, frames))
    assert (text - frame).norm() < 0.02 * frame.norm()  # PyTorch rounds k to BF16 before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"v_cache": lambda x: x.contiguous()},
            r"v_cache: expected the tokens of a column side by side, on 16-byte boundaries",
        ),
        ({"v_scale": lambda x: None}, "expected k_scale with v_scale"),
        ({"k_scale": lambda x: x[1:]}, r"k_scale: expected contiguous float32 \(3,\)"),
        ({"v_scale": lambda x: x.double()}, r"v_scale: expected contiguous float32 \(3,\)"),
    ],
)
def test_unsuitable_arguments_never_reach_the_kernel(kernel, change, words):
    stream = Stream(kernel)
    cache = stream.cache
    names = "q k v k_cache v_cache step".split()
    tensors = (*stream.make_frame(), cache.k[0], cache.v[0], cache.step)
    arguments = dict(zip(names, tensors, strict=True))
    scales = dict(zip(("k_scale", "v_scale"), cache.scales(0), strict=True))
    for name, spoil in change.items():
        held = arguments if name in arguments else scales
        held[name] = spoil(held[name])
    rest = (*[None] * 6, 1e-5, *cache.integers, *scales.values(), True)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.aapt.kv_append(*arguments.values(), *rest)


@pytest.mark.slow
@pytest.mark.parametrize("across_heads", [False, True])
def test_a_frame_of_the_8b_model(kernel, across_heads):
    stream = Stream(kernel, tokens=1196, heads=24, head_dim=128, across_heads=across_heads)
    stream.append_and_check(0)
    stream.append_and_check(1)
