"""Recipes of docs/drop-in.md: the blocks printed there run here, and give the results of the code
that they replace."""

import copy
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from aapt_kernels import FrameLayout, KVCache, cached_attention, kv_append, patch
from aapt_kernels.block_causal_attention.cases import LAYOUTS
from aapt_kernels.testing import assert_error_ratio

pytest.importorskip("diffusers")

from diffusers import WanTransformer3DModel  # noqa: E402
from diffusers.models.transformers.transformer_wan import WanAttnProcessor  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "drop-in.md"


def recipe(title: str) -> list[str]:
    """Return the code blocks under a heading."""
    section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def run(block: str, **names) -> dict:
    """Run a block with these names and return all names it defines."""
    exec(compile(block, str(PAGE), "exec"), names)
    return names


# FlexAttention

unfused = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@unfused
def test_flex_attention(backend):
    before, after, layout_mask = recipe("FlexAttention")
    q, k, v = torch.randn(3, 2, 3, 480, 16)
    expected = run(before, q=q, k=k, v=v)
    ours = run(after, q=q, k=k, v=v)
    torch.testing.assert_close(ours["out"], expected["out"])
    kept = run(layout_mask, **expected | {"layout": ours["layout"], "out": None})
    torch.testing.assert_close(kept["out"], expected["out"])
    assert torch.equal(kept["mask"].to_dense(), expected["mask"].to_dense())


def test_flex_attention_gradients(backend):
    """FlexAttention has none on the CPU; dense attention under its mask has."""
    before, after, _ = recipe("FlexAttention")
    q, k, v = (torch.randn(1, 2, 480, 8, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        visible = run(before.split("mask = ")[0])["visible"]
    rows = torch.arange(480)
    mask = visible(None, None, rows[:, None], rows)
    for x in (q, k, v):
        x.requires_grad_()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    actual = run(after, q=q, k=k, v=v)["out"]
    torch.testing.assert_close(actual, expected)
    dout = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (q, k, v), dout),
        torch.autograd.grad(expected, (q, k, v), dout),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@unfused
@pytest.mark.parametrize("name", ["odd", "unlimited", "no-window", "two-sinks", "past-two-sinks"])
def test_flex_attention_takes_the_mask_of_a_layout(name):
    *_, layout_mask = recipe("FlexAttention")
    before, layout = recipe("FlexAttention")[0], LAYOUTS[name]
    imports = run(before.split("\n\n\n")[0])
    q = torch.randn(1, 2, layout.query_length, 8)
    k, v = torch.randn(2, 1, 2, layout.key_length, 8)
    out = run(layout_mask, **imports, layout=layout, q=q, k=k, v=v)["out"]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.dense_mask())
    torch.testing.assert_close(out, expected)


# diffusers

FRAMES, ROWS, COLUMNS = 9, 4, 6  # more frames than the sink and the window of the page
TOKENS = ROWS // 2 * (COLUMNS // 2)


@pytest.fixture
def wan():
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    for block in model.blocks:  # ones would hide a wrong order
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            nn.init.uniform_(norm.weight, 0.5, 2)
    return model


@pytest.fixture
def clip():
    """Latents, a noise level for each frame, text."""
    levels = torch.randint(1000, (2, FRAMES)).repeat_interleave(TOKENS, dim=1)
    return {
        "latents": torch.randn(2, 4, FRAMES, ROWS, COLUMNS),
        "timestep": levels,
        "text": torch.randn(2, 5, 8),
    }


class Masked(WanAttnProcessor):
    """diffusers' own attention under a dense mask."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, x, encoder_hidden_states, attention_mask, rotary_emb):
        return super().__call__(attn, x, encoder_hidden_states, self.mask, rotary_emb)


def outcome(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """The output and every parameter's gradient."""
    model.zero_grad()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {"output": output.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_wan_page(wan, clip):
    """The blocks of the page: as it is, under the block-causal mask, and undone."""
    before, after, causal = recipe("diffusers: Wan")
    names = {"transformer": wan, **clip}
    theirs = [block.attn1.processor for block in wan.blocks]
    expected = run(before, **names)["output"]
    ours = run(after, **names)
    torch.testing.assert_close(ours["output"], expected, rtol=1e-4, atol=1e-5)
    assert [block.attn1.processor for block in wan.blocks] == theirs
    masked = run(causal, **names | {"patch": ours["patch"]})["output"]
    assert (masked - expected).abs().max() > 0.1
    assert [block.attn1.processor for block in wan.blocks] == theirs
    assert torch.equal(run(before, **names)["output"], expected)


def predict(model: nn.Module, clip: dict[str, Tensor]) -> Tensor:
    return model(clip["latents"], clip["timestep"], clip["text"]).sample


@contextmanager
def masked(model: nn.Module, mask: Tensor):
    """diffusers' own attention under a dense mask."""
    for block in model.blocks:
        block.attn1.set_processor(Masked(mask))
    yield
    for block in model.blocks:
        block.attn1.set_processor(WanAttnProcessor())


def test_patched_wan_is_bidirectional(backend, wan, clip):
    expected = outcome(wan, predict(wan, clip))
    with patch(wan):
        assert_same(outcome(wan, predict(wan, clip)), expected)


CAUSAL = [(6, 1), (0, 0), (2, 3), (None, 1)]  # window and sink


@pytest.mark.parametrize(("window", "sink"), CAUSAL)
def test_patched_wan_is_block_causal(backend, wan, clip, window, sink):
    with patch(wan, causal=True, window_frames=window, sink_frames=sink):
        actual = outcome(wan, predict(wan, clip))
    mask = FrameLayout(0, TOKENS, FRAMES, window, sink).dense_mask()
    with masked(wan, mask):
        assert_same(actual, outcome(wan, predict(wan, clip)))


def test_patched_wan_with_gradient_checkpointing(backend, wan, clip):
    with patch(wan, causal=True, window_frames=6):
        expected = outcome(wan, predict(wan, clip))
        wan.enable_gradient_checkpointing()
        wan.train()
        assert_same(outcome(wan, predict(wan, clip)), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_patched_wan_in_half_precision(backend, wan, clip, causal):
    """No further from float32 than twice what diffusers is under a dense mask."""
    outputs = {}
    mask = torch.ones(FRAMES * TOKENS, FRAMES * TOKENS, dtype=torch.bool)
    if causal:
        mask = FrameLayout(0, TOKENS, FRAMES, 6).dense_mask()
    timestep = clip["timestep"]
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):  # in this order of the same weights
            wan.to(dtype)
            clip = {name: x.to(dtype) for name, x in clip.items()} | {"timestep": timestep}
            with patch(wan, causal=causal, window_frames=6 if causal else None):
                ours = predict(wan, clip)
            with masked(wan, mask):
                outputs[dtype] = ours, predict(wan, clip)
    actual, baseline = outputs[torch.bfloat16]
    assert actual.dtype == torch.bfloat16
    assert_error_ratio(actual, outputs[torch.float32][1], baseline)


def test_patched_wan_in_float64(backend, wan, clip):
    """Wan's norms are float32 in any model; the attention itself loses nothing beside them."""
    wan.double()
    clip = {name: x.double() for name, x in clip.items()}
    expected = predict(wan, clip)
    with patch(wan):
        torch.testing.assert_close(predict(wan, clip), expected, rtol=1e-6, atol=1e-6)


def test_patched_wan_compiles_without_a_break(wan, clip):
    with patch(wan, causal=True, window_frames=6):
        expected = outcome(wan, predict(wan, clip))
        graphs = CompileCounterWithBackend("aot_eager")
        wan.compile_repeated_blocks(fullgraph=True, backend=graphs)
        assert_same(outcome(wan, predict(wan, clip)), expected)
        assert graphs.frame_count > 0


def test_patched_wan_does_not_see_the_future(backend, wan, clip):
    with torch.no_grad(), patch(wan, causal=True, window_frames=6):
        first = predict(wan, clip)
        clip["latents"][:, :, -2:] += 1
        second = predict(wan, clip)
    torch.testing.assert_close(second[:, :, :-2], first[:, :, :-2])
    assert (second[:, :, -2:] - first[:, :, -2:]).abs().max() > 0.1


def test_patched_wan_takes_any_size(backend, wan, clip):
    """Sizes follow each other, and latents may come by name."""
    for rows, frames in ((ROWS, FRAMES), (2, 4), (ROWS, 1)):
        latents = clip["latents"][:, :, :frames, :rows]
        timestep, tokens = torch.tensor([3, 500]), rows // 2 * (COLUMNS // 2)
        call = {"hidden_states": latents, "timestep": timestep}
        call["encoder_hidden_states"] = clip["text"]
        with patch(wan, causal=True, window_frames=1):
            actual = wan(**call).sample
        with masked(wan, FrameLayout(0, tokens, frames, 1).dense_mask()):
            torch.testing.assert_close(actual, wan(**call).sample, rtol=1e-4, atol=1e-5)


def test_patch_of_a_pipeline_with_two_transformers(wan, clip):
    second = copy.deepcopy(wan)
    expected = predict(wan, clip)
    pipeline = SimpleNamespace(transformer=wan, transformer_2=second, vae=nn.Linear(1, 1))
    patched = patch(pipeline, causal=True, window_frames=0, sink_frames=0)
    for model in (wan, second):
        assert (predict(model, clip) - expected).abs().max() > 0.1
    patched.undo()
    patched.undo()  # changes nothing
    for model in (wan, second):
        assert torch.equal(predict(model, clip), expected)
        assert not model._forward_pre_hooks


def test_undo_leaves_a_processor_that_came_later(wan):
    patched = patch(wan)
    later = WanAttnProcessor()
    wan.blocks[0].attn1.set_processor(later)
    patched.undo()
    assert wan.blocks[0].attn1.processor is later
    assert isinstance(wan.blocks[1].attn1.processor, WanAttnProcessor)


def test_patch_ends_with_its_block_on_an_error(wan):
    theirs = [block.attn1.processor for block in wan.blocks]
    with pytest.raises(KeyError), patch(wan, causal=True):
        raise KeyError
    assert [block.attn1.processor for block in wan.blocks] == theirs


def test_patch_imports_no_diffusers():
    code = "import sys, aapt_kernels; aapt_kernels.patch; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"pipeline": nn.Linear(1, 1)},
            TypeError,
            "pipeline: expected a diffusers Wan pipeline or transformer, got Linear, in which no "
            "attn1 is a WanAttention",
        ),
        (
            {"pipeline": SimpleNamespace(transformer=None)},
            TypeError,
            "pipeline: expected a diffusers Wan pipeline or transformer, got SimpleNamespace, in "
            "which no attn1 is a WanAttention",
        ),
        (
            {"window_frames": 3},
            ValueError,
            "causal: expected True with window_frames or sink_frames, got False; pass causal=True",
        ),
        (
            {"causal": True, "window_frames": -1},
            ValueError,
            "window_frames: expected an integer >= 0 or None, got -1",
        ),
        (
            {"causal": True, "sink_frames": 1.5},
            TypeError,
            "sink_frames: expected an integer >= 0, got 1.5",
        ),
    ],
)
def test_patch_refuses(wan, change, error, words):
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        patch(**{"pipeline": wan} | change)
    assert all(isinstance(block.attn1.processor, WanAttnProcessor) for block in wan.blocks)


def test_patched_layers_refuse_what_they_would_ignore(wan, clip):
    with patch(wan):
        attention = wan.blocks[0].attn1
        with pytest.raises(ValueError, match="^attention_mask: expected none in a patched layer"):
            attention(torch.zeros(1, TOKENS, 24), None, torch.ones(1), None)
        attention.processor._parallel_config = object()  # as `enable_parallelism` does
        with pytest.raises(ValueError, match="got one; undo the patch$"):
            predict(wan, clip)


# Self-Forcing

BATCH, HEADS, HEAD_DIM, GRID = 2, 2, 12, (2, 3)
STEPS = 20


class SelfAttention(nn.Module):
    """Layer of a causal Wan: projections, and norms across heads."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.eps = HEADS, 1e-6
        width = HEADS * HEAD_DIM
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(width, eps=self.eps) for _ in range(2))
        for norm in (self.norm_q, self.norm_k):
            nn.init.uniform_(norm.weight, 0.5, 2)


def rotations(first_frame: int, frames: int) -> Tensor:
    """exp(i angle) of every token, (tokens, head_dim / 2): a third each of time, row and column."""
    places = torch.cartesian_prod(
        torch.arange(first_frame, first_frame + frames), *(torch.arange(size) for size in GRID)
    ).double()
    frequency = 100.0 ** -(torch.arange(HEAD_DIM // 6, dtype=torch.float64) / (HEAD_DIM // 6))
    angles = (places[:, :, None] * frequency).flatten(1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Neighbours as complex numbers, in float64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs[:, None]).flatten(-2).type_as(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize(
    ("local_attn_size", "sink_size", "first", "chunk"),
    [
        (4, 1, 1, 1),
        (5, 2, 1, 1),
        (3, 0, 1, 1),
        (9, 3, 3, 3),
        (7, 2, 3, 3),
        (6, 1, 2, 5),
        (5, 0, 1, 4),
    ],
)
def test_rolling_cache(backend, local_attn_size, sink_size, first, chunk, positions):
    """Two layers, past the buffer's size several times, two noisy passes and a clean one a step.
    Sink, window and the first chunk need not be multiples of the chunk."""
    before, after = recipe("Self-Forcing: the rolling cache")
    ours = run(after)
    if positions == "relative":
        before, after = recipe("LongLive 2: relative positions")
        ours |= {"self_attention": run(after)["self_attention"]}
    theirs = run(before, rotate=rotate, attention=attention)["self_attention"]
    table = rotations(0, local_attn_size)
    layers = nn.ModuleList(SelfAttention() for _ in range(2))
    prepared = nn.ModuleList(SelfAttention() for _ in range(2))
    prepared.load_state_dict(layers.state_dict())
    for layer in prepared:
        ours["rotate_halves"](layer)
    tokens = GRID[0] * GRID[1]
    shape = (BATCH, local_attn_size * tokens, HEADS, HEAD_DIM)
    rolling = [
        {name: torch.zeros(shape) for name in "kv"}
        | {name: torch.tensor(0) for name in ("local_end", "global_end")}
        for _ in layers
    ]
    cache = ours["make_cache"](
        len(layers), BATCH, HEADS, HEAD_DIM, local_attn_size, sink_size, tokens
    )
    assert cache.capacity == local_attn_size * tokens
    done = 0
    with torch.inference_mode():
        for frames in (first, *[chunk] * (STEPS - 1)):
            freqs = (rotations(done, frames),)
            their_freqs = freqs[0]
            if positions == "relative":
                freqs = (*freqs, rotations(min(done, local_attn_size - frames), frames))
                their_freqs = table
            for _ in range(3):
                expected = actual = torch.randn(BATCH, frames * tokens, HEADS * HEAD_DIM)
                for index, layer in enumerate(layers):
                    state = rolling[index], done * tokens, sink_size * tokens
                    expected = theirs(layer, expected, their_freqs, *state)
                    actual = ours["self_attention"](prepared[index], actual, *freqs, cache, index)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            cache.advance(frames)
            done += frames
    assert all(state["global_end"] == done * tokens for state in rolling)


def test_cross_attention():
    before, after = recipe("Wan: cross-attention to text")
    layer, x, text = SelfAttention(), *(torch.randn(2, n, HEADS * HEAD_DIM) for n in (6, 5))
    expected = run(before, attention=attention)["cross_attention"](layer, x, text)
    ours = run(after)
    pair = ours["text_keys_values"](layer, text)
    torch.testing.assert_close(ours["cross_attention"](layer, x, *pair), expected)


def test_blocks_that_are_given_their_number_share_two_graphs():
    (block,) = recipe("Under FSDP2 and torch.compile")
    Block = run(block, torch=torch, kv_append=kv_append, cached_attention=cached_attention)["Block"]
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    cache = KVCache(1, 6, 2, 8, text_tokens=0, tokens_per_frame=3, window_frames=2)
    twin = cache.clone()
    with torch.no_grad():
        for layer in range(6):
            block, (q, k, v) = Block(), torch.randn(3, 1, 3, 2, 8)
            expected = block(q, k, v, twin, layer)
            block.compile(backend=graphs, fullgraph=True)
            torch.testing.assert_close(block(q, k, v, cache, layer), expected)
    assert graphs.frame_count <= 2
    assert torch.equal(cache.k, twin.k) and torch.equal(cache.v, twin.v)


def test_every_block_of_the_page_runs_here():
    """A block that is added to the page needs a test."""
    tested = Path(__file__).read_text()
    for section in PAGE.read_text().split("\n## ")[1:]:
        title = section.partition("\n")[0]
        assert ("```python" in section) == (f'recipe("{title}")' in tested), title
