"""Each op is a real torch op: opcheck passes, and a compiled graph has no break."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from aapt_kernels import (
    FrameLayout,
    KVCache,
    block_causal_attention,
    cached_attention,
    kv_append,
    qk_norm_rope,
)
from aapt_kernels.block_causal_attention.cases import make_inputs

LAYOUT = FrameLayout(2, 3, 3, 1, past_frames=1)
OPS = torch.ops.aapt


def attention_arguments(optional):
    inputs = make_inputs(LAYOUT, batch=1, heads=2, head_dim=4, dtype=torch.float32)
    q, k, v, q_sink = (inputs[name].requires_grad_() for name in ("q", "k", "v", "q_sink"))
    extras = (torch.tensor([1]), q_sink) if optional else (None, None)
    return (q, k, v, *extras, *LAYOUT.integers, 0.5, not optional)


def norm_rope_arguments(optional, requires_grad=True):
    q, k = torch.randn(2, 1, 3, 2, 4).unbind()
    if requires_grad:
        q, k = q.requires_grad_(), k.requires_grad_()
    if not optional:
        return (q, k, *[None] * 6, 1e-6)
    weights = [torch.ones(4, requires_grad=requires_grad) for _ in range(2)]
    return (q, k, *weights, *torch.rand(4, 3, 2), 1e-6)


def make_cache(**options):
    sizes = dict(batch=1, layers=2, heads=2, head_dim=4)
    geometry = dict(text_tokens=2, tokens_per_frame=3, window_frames=1)
    return KVCache(**sizes, **geometry | options)


@pytest.mark.parametrize("optional", [False, True])
def test_block_causal_attention(optional):
    opcheck(OPS.block_causal_attention.default, attention_arguments(optional))


@pytest.mark.parametrize("optional", [False, True])
def test_block_causal_attention_backward(optional):
    arguments = [x.detach() if torch.is_tensor(x) else x for x in attention_arguments(optional)]
    out, lse = OPS.block_causal_attention(*arguments)
    dlse = torch.randn_like(lse) if optional else None
    backward = (torch.randn_like(out), dlse, *arguments[:3], out, lse, *arguments[3:], False)
    opcheck(OPS.block_causal_attention_backward.default, backward)


@pytest.mark.parametrize("optional", [False, True])
def test_qk_norm_rope(optional):
    opcheck(OPS.qk_norm_rope.default, norm_rope_arguments(optional))


@pytest.mark.parametrize("optional", [False, True])
def test_qk_norm_rope_backward(optional):
    arguments = norm_rope_arguments(optional, requires_grad=False)
    gradients = [torch.randn_like(arguments[0]) for _ in range(3)]
    if not optional:
        gradients[2] = None
    opcheck(OPS.qk_norm_rope_backward.default, (*gradients, *arguments))


@pytest.mark.parametrize("optional", [False, True])
def test_kv_append(optional):
    cache = make_cache()
    q, k, *rest = norm_rope_arguments(optional, requires_grad=False)
    cached = (torch.randn_like(q), cache.k[1], cache.v[1], cache.step)
    opcheck(OPS.kv_append.default, (q, k, *cached, *rest, *cache.integers, None, None, False))


@pytest.mark.parametrize("optional", [False, True])
def test_cached_attention(optional):
    cache = make_cache()
    q = torch.randn(1, 6, 2, 4)
    arguments = (q, cache.k[1], cache.v[1], cache.step, cache.text_lens, q if optional else None)
    workspace = torch.zeros(32, dtype=torch.int32) if optional else None
    opcheck(
        OPS.cached_attention.default,
        (*arguments, *cache.integers, 0.5, *cache.scales(1), workspace),
    )


def test_a_cache_of_float8():
    """The check of what a call mutates is left out: PyTorch cannot make it on float8."""
    cache = make_cache(dtype=torch.float8_e4m3fn)
    checks = ("test_autograd_registration", "test_faketensor")
    q, k, v = torch.randn(3, 1, 6, 2, 4)
    tensors = (q, k, v, cache.k[1], cache.v[1], cache.step, *[None] * 6)
    arguments = (*tensors, 1e-6, *cache.integers, *cache.scales(1), True)
    opcheck(OPS.kv_append.default, arguments, test_utils=checks)
    tensors = (q, cache.k[1], cache.v[1], cache.step, cache.text_lens, None)
    arguments = (*tensors, *cache.integers, 0.5, *cache.scales(1), None)
    opcheck(OPS.cached_attention.default, arguments, test_utils=checks)


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_training_compiles_without_a_break(backend):
    x = torch.randn(1, LAYOUT.query_length, 2, 4)
    prefix = torch.randn(1, LAYOUT.key_length - LAYOUT.query_length, 2, 4)
    cos, sin = torch.rand(2, LAYOUT.query_length, 2)

    def function(x, weight):
        q, k = qk_norm_rope(x, x, weight, weight, cos, sin)
        k = torch.cat([k[:, :2], prefix, k[:, 2:]], dim=1)
        out, lse = block_causal_attention(q, k, k, LAYOUT, prefix_grad=False, return_lse=True)
        return out.square().sum() + lse.sum()

    results = []
    for run in (function, compiled(function)):
        leaves = [x.clone().requires_grad_(), torch.ones(4, requires_grad=True)]
        loss = run(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_training_compiles_with_activation_checkpointing(backend):
    q, k, v = torch.randn(3, 1, LAYOUT.query_length, 2, 4)
    prefix = torch.randn(1, LAYOUT.key_length - LAYOUT.query_length, 2, 4)

    def attend(q, k, v):
        k, v = (torch.cat([x[:, :2], prefix, x[:, 2:]], dim=1) for x in (k, v))
        return block_causal_attention(q, k, v, LAYOUT).square()

    def loss(q, k, v):
        return checkpoint(attend, q, k, v, use_reentrant=False).sum()

    results = []
    for run in (lambda *x: attend(*x).sum(), compiled(loss)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        results.append(torch.autograd.grad(run(*leaves), leaves))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_streaming_compiles_once_for_all_steps(backend):
    frames = torch.randn(7, 1, 3, 2, 4)
    cos, sin = torch.rand(2, 3, 2)
    weight = torch.ones(4)
    outputs = []
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    for compile in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend=count)):
        cache = make_cache()

        @compile
        def step(x, cache=cache):
            for layer in range(2):
                q, q_sink = kv_append(
                    x, x, x, cache, layer, weight, weight, cos, sin, cos_sink=sin, sin_sink=cos
                )
                x = x + cached_attention(q, cache, layer, q_sink=q_sink)
            cache.advance()
            return x

        outputs.append([step(frame) for frame in frames])
    torch.testing.assert_close(outputs[1], outputs[0])
    assert len(graphs) == 1


def test_mutation_survives_functionalisation():
    cache, twin = make_cache(), make_cache()
    frame = torch.randn(1, 3, 2, 4)

    def step(x, cache):
        q = kv_append(x, x, x, cache, 1, None, None, None, None)
        out = cached_attention(q, cache, 1)
        cache.advance()
        return out

    torch.testing.assert_close(compiled(step)(frame, cache), step(frame, twin))
    assert torch.equal(cache.k, twin.k) and int(cache.step) == 1


LAYOUTS = {
    "frames": [FrameLayout(5, 3, n, 2) for n in range(4, 16)],
    "text": [FrameLayout(n, 3, 4, 2) for n in range(4, 16)],
    "past": [FrameLayout(5, 3, 4, 2, past_frames=n) for n in range(2, 14)],
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_graphs_serve_every_length(name, dynamic):
    """The first length has a graph of its own, all others share one; gradients included."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(block_causal_attention, fullgraph=True, backend=graphs, dynamic=dynamic)
    for layout in LAYOUTS[name]:
        q = torch.randn(1, layout.query_length, 2, 8, requires_grad=True)
        k = torch.randn(1, layout.key_length, 2, 8, requires_grad=True)
        results = []
        for function in (attend, block_causal_attention):
            out = function(q, k, k, layout)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k))))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)
    assert graphs.frame_count <= 2


class FromShapes(torch.nn.Module):
    """Attention whose layout is computed from the shape of its input."""

    def forward(self, x):  # (B, frames, tokens, 3 x 2 x 8)
        q, k, v = x.flatten(1, 2).unflatten(-1, (3, 2, 8)).unbind(2)
        layout = FrameLayout(0, x.shape[2], x.shape[1], 2)
        return block_causal_attention(q, k, v, layout).flatten(2)


def test_two_graphs_serve_a_layout_from_shapes():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model = FromShapes()
    attend = torch.compile(model, fullgraph=True, backend=graphs)
    for frames in range(2, 12):
        x = torch.randn(1, frames, 3, 48)
        assert torch.equal(attend(x), model(x))
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_number_of_frames(strict):
    model, frames = FromShapes(), torch.export.Dim("frames", min=2, max=64)
    example = torch.randn(1, 4, 3, 48)
    program = torch.export.export(
        model, (example,), dynamic_shapes=({1: frames},), strict=strict
    ).module()
    for count in (2, 9, 33):
        x = torch.randn(1, count, 3, 48)
        assert torch.equal(program(x), model(x))


@pytest.mark.parametrize(
    ("dtype", "clamped"), [(torch.float32, True), (torch.float8_e4m3fn, False)]
)
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["frames", "text"])
def test_two_graphs_serve_every_step_of_a_stream(name, dynamic, dtype, clamped):
    """Chunks of any number of frames, or caches for any length of text."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def step(x, cache, cos, sin):
        sink = dict(cos_sink=sin, sin_sink=cos) if clamped else {}
        appended = kv_append(x, x, x, cache, 1, None, None, cos, sin, **sink)
        q, q_sink = appended if clamped else (appended, None)
        out = cached_attention(q, cache, 1, q_sink=q_sink)
        cache.advance(x.shape[1] // cache.tokens_per_frame)
        return out

    def make(text):
        options = dict(dtype=dtype, compute_dtype=torch.float32)
        cache = make_cache(text_tokens=text, window_frames=5, **options)
        words = torch.randn(1, text, 2, 4)
        for layer in range(2):
            cache.write_text(layer, words, words)
        return cache

    compiled = torch.compile(step, fullgraph=True, backend=graphs, dynamic=dynamic)
    cache = make(2)
    for i in range(1, 7):
        frames = i if name == "frames" else 1
        cache = cache if name == "frames" else make(i + 1)
        twin = cache.clone()
        x = torch.randn(1, 3 * frames, 2, 4)
        cos, sin = torch.rand(2, 3 * frames, 2)
        assert torch.equal(compiled(x, cache, cos, sin), step(x, twin, cos, sin))
        assert torch.equal(cache.k.float(), twin.k.float()) and torch.equal(cache.step, twin.step)
    assert graphs.frame_count <= 2


def test_two_graphs_serve_every_layer_given_as_an_argument():
    """Blocks compiled one by one: an integer attribute of a module would be a constant."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    cache = KVCache(1, 12, 2, 8, text_tokens=0, tokens_per_frame=3, window_frames=2)

    class Block(torch.nn.Module):
        def forward(self, x, cache, layer):
            q, k, v = x.unflatten(-1, (3, 2, 8)).unbind(2)
            q = kv_append(q, k, v, cache, layer, None, None, None, None)
            return cached_attention(q, cache, layer).flatten(2)

    with torch.no_grad():
        for layer in range(12):
            block = Block()
            block.compile(backend=graphs, fullgraph=True)
            block(torch.randn(1, 3, 48), cache, layer)
    assert graphs.frame_count <= 2
    assert cache.k.flatten(1).any(1).all()


def test_an_integer_attribute_of_a_module_is_a_graph_each():
    """A block that knows its layer is compiled once per layer, whatever reads the number: an
    addition is enough. If this fails, docs/drop-in.md can recommend one form more."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")

    class Block(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return x + self.layer

    for layer in range(4):
        block = Block(layer)
        block.compile(backend=graphs, fullgraph=True)
        block(torch.zeros(3))
    assert graphs.frame_count == 4


def test_two_graphs_serve_every_layer_kept_by_its_block_if_configured():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    cache = KVCache(1, 12, 2, 8, text_tokens=0, tokens_per_frame=3, window_frames=2)
    twin = cache.clone()

    class Block(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, cache):
            q, k, v = x.unflatten(-1, (3, 2, 8)).unbind(2)
            q = kv_append(q, k, v, cache, self.layer, None, None, None, None)
            return cached_attention(q, cache, self.layer).flatten(2)

    with torch.no_grad(), torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        for layer in range(12):
            block, x = Block(layer), torch.randn(1, 3, 48)
            expected = block(x, twin)
            block.compile(backend=graphs, fullgraph=True)
            torch.testing.assert_close(block(x, cache), expected)
    assert graphs.frame_count <= 2
    assert torch.equal(cache.k, twin.k) and torch.equal(cache.v, twin.v)
