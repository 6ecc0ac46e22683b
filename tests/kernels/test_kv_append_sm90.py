"""The sm_90a kernel of kv_append against float64: simulated everywhere, and on the device where
there is one. Both run the same source through the same host code."""

import pytest
import torch

from aapt_kernels import kv_append, use_backend

from .appended import TEXT, Appended
from .oracles import normalize

# The plain composition in BF16 rounds at least twice; this kernel rounds once, by half a unit.
ROUNDING = 2**-8


class Stream(Appended):
    """Random frames, appended to one layer of a cache that is NaN elsewhere."""

    def __init__(self, device, **options):
        super().__init__(device, dtype=torch.bfloat16, **options)

    def fill(self):
        self.cache.k.fill_(float("nan"))
        self.cache.v.fill_(float("nan"))

    def append_and_check(self, *slots):
        """Check one step: the outputs, the slots, and every other bit of the cache."""
        cache, rows = self.cache, self.rows(slots)
        q, k, v = self.make_frame()
        before = cache.k.clone(), cache.v.clone()
        queries, keys = self.append(q, k, v)
        for got, want in (*queries, (cache.k[1, :, rows], keys)):
            torch.testing.assert_close(got.double(), want, rtol=ROUNDING, atol=1e-5)
        assert torch.equal(cache.v[1, :, rows], v)
        for after, old in zip((cache.k, cache.v), before, strict=True):
            rest = after.clone()
            rest[1, :, rows] = old[1, :, rows]
            assert torch.equal(rest.view(torch.int16), old.view(torch.int16))
        cache.advance(len(slots))


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 1, 1), (2, 7, 3), (1, 5, 70)])
def test_writes_the_frame_and_nothing_else(
    kernel, schedule, batch, tokens, heads, head_dim, weight_dtype, across_heads
):
    schedule(seed=tokens)
    stream = Stream(
        kernel,
        batch=batch,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        weight_dtype=weight_dtype,
        across_heads=across_heads,
    )
    for slot in (0, 1, 2, 3, 1, 2):
        stream.append_and_check(slot)


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize(("window_frames", "sink_frames"), [(0, 0), (0, 1), (1, 0), (2, 2)])
def test_every_slot_of_the_cache(kernel, window_frames, sink_frames, across_heads):
    stream = Stream(
        kernel, window_frames=window_frames, sink_frames=sink_frames, across_heads=across_heads
    )
    ring = [sink_frames + frame for frame in range(window_frames + 1)]
    for slot in [*range(sink_frames), *ring, *ring, ring[0]]:
        stream.append_and_check(slot)


# frames, window frames, sink frames; the slots of each step
SEVERAL = [
    (2, 1, 1, [(0, 1), (2, 1), (2, 1)]),
    (3, 2, 1, [(0, 1, 2), (3, 1, 2), (3, 1, 2)]),
    (2, 2, 3, [(0, 1), (2, 3), (4, 5), (3, 4), (5, 3)]),
    (3, 3, 0, [(0, 1, 2), (3, 0, 1), (2, 3, 0)]),
]


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize(("frames", "window_frames", "sink_frames", "steps"), SEVERAL)
def test_several_frames_go_round_the_ring(
    kernel, frames, window_frames, sink_frames, steps, across_heads
):
    stream = Stream(
        kernel,
        batch=2,
        tokens=5,
        frames=frames,
        window_frames=window_frames,
        sink_frames=sink_frames,
        across_heads=across_heads,
    )
    for slots in steps:
        stream.append_and_check(*slots)


@pytest.mark.parametrize("multiprocessors", [1, 2, 132])
@pytest.mark.parametrize("across_heads", [False, True])
def test_blocks_loop_over_what_is_left(kernel, schedule, across_heads, multiprocessors):
    """Each block of a small device takes several rounds, the last one only in part."""
    schedule(seed=3, multiprocessors=multiprocessors)
    stream = Stream(kernel, tokens=41, heads=12, head_dim=128, across_heads=across_heads)
    stream.append_and_check(0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_without_norm_and_rotation_it_copies(kernel, head_dim):
    stream = Stream(kernel, head_dim=head_dim)
    q, k, v = stream.make_frame()
    q_out = kv_append(q, k, v, stream.cache, 0, None, None, None, None)
    assert torch.equal(q_out, q)
    assert torch.equal(stream.cache.k[0, :, 5:12], k)
    assert torch.equal(stream.cache.v[0, :, 5:12], v)


@pytest.mark.parametrize("across_heads", [False, True])
def test_one_norm_without_the_other(kernel, across_heads):
    stream = Stream(kernel, across_heads=across_heads)
    q, k, v = stream.make_frame()
    weight = stream.weights[1]
    q_out = kv_append(q, k, v, stream.cache, 0, None, weight, None, None, eps=1e-5)
    assert torch.equal(q_out, q)
    want = normalize(k, weight, 1e-5)
    got = stream.cache.k[0, :, 5:12].double()
    torch.testing.assert_close(got, want, rtol=ROUNDING, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": lambda q: q.float()}, "bfloat16"),
        ({"q": lambda q: torch.zeros(*q.shape[:-1], 65).bfloat16()[..., 1:]}, "16-byte boundaries"),
        ({"k_weight": lambda w: w.bfloat16()}, "k_weight: expected a contiguous tensor"),
        ({"cos": lambda c: c.double()}, "cos: expected a contiguous tensor"),
        ({"step": lambda s: s.int()}, "step: expected a contiguous tensor"),
        ({"k_cache": lambda c: c[:, 1:]}, "k_cache: expected"),
    ],
)
def test_unsuitable_arguments_never_reach_the_kernel(kernel, change, words):
    stream = Stream(kernel)
    cache = stream.cache
    names = "q k v k_cache v_cache step q_weight k_weight cos sin cos_sink sin_sink".split()
    tensors = (*stream.make_frame(), cache.k[0], cache.v[0], cache.step, *stream.weights)
    arguments = dict(zip(names, (*tensors, *stream.angles, None, None), strict=True))
    for name, spoil in change.items():
        arguments[name] = spoil(arguments[name]).to(kernel)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.aapt.kv_append(*arguments.values(), 1e-5, *cache.integers, None, None, False)


def test_a_captured_step_follows_the_counter():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stream = Stream("cuda", head_dim=128)
    cache, frame = stream.cache, stream.make_frame()
    with use_backend("cuda"):
        kv_append(*frame, cache, 0, *stream.weights, *stream.angles)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kv_append(*frame, cache, 0, *stream.weights, *stream.angles)
            cache.advance()
    cache.reset()
    cache.v.zero_()
    for _ in range(5):
        graph.replay()
    slots = cache.v[0, 0, TEXT:].unflatten(0, (-1, 7))
    assert int(cache.step) == 5
    assert all(torch.equal(slot, frame[2][0]) for slot in slots)
    assert (cache.v[1] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [1, 12, 24, 40])
@pytest.mark.parametrize("tokens", [1, 31, 60, 127])
def test_sweep(kernel, schedule, tokens, heads, head_dim, across_heads):
    for seed, multiprocessors in enumerate((1, 3, 132)):
        schedule(seed=seed, multiprocessors=multiprocessors)
        stream = Stream(
            kernel,
            batch=1 + seed % 2,
            tokens=tokens,
            heads=heads,
            head_dim=head_dim,
            weight_dtype=(torch.bfloat16, torch.float32)[seed % 2],
            across_heads=across_heads,
            window_frames=1,
            seed=seed,
        )
        for slot in (0, 1, 2):
            stream.append_and_check(slot)


@pytest.mark.slow
@pytest.mark.parametrize("across_heads", [False, True])
def test_a_frame_of_the_8b_model(kernel, across_heads):
    stream = Stream(kernel, tokens=1196, heads=24, head_dim=128, across_heads=across_heads)
    for slot in (0, 1):
        stream.append_and_check(slot)
