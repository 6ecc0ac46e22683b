"""Recipes of docs/drop-in.md: the blocks printed there run here, and give the results of the code
that they replace."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from aapt_kernels import FrameLayout
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


def test_wan_with_one_frame_is_bidirectional(backend, wan, clip):
    before, after = recipe("diffusers: Wan")
    expected = outcome(wan, run(before, transformer=wan, **clip)["output"])
    processor = run(after, transformer=wan, **clip)["BlockCausalProcessor"]
    for block in wan.blocks:
        block.attn1.set_processor(processor(FrameLayout(0, FRAMES * TOKENS, 1, 0)))
    assert_same(outcome(wan, run(before, transformer=wan, **clip)["output"]), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_wan_block_causal(backend, wan, clip, checkpointing):
    before, after = recipe("diffusers: Wan")
    ours = run(after, transformer=wan, **clip)
    actual = outcome(wan, ours["output"])
    assert ours["layout"] == FrameLayout(0, TOKENS, FRAMES, 6)
    assert not ours["layout"].dense_mask()[-1].all()
    if checkpointing:
        wan.enable_gradient_checkpointing()
        wan.train()
        again = outcome(wan, run(before, transformer=wan, **clip)["output"])
        assert_same(again, actual)
    for block in wan.blocks:
        block.attn1.set_processor(Masked(ours["layout"].dense_mask()))
    assert_same(actual, outcome(wan, run(before, transformer=wan, **clip)["output"]))


def test_wan_in_half_precision(backend, wan, clip):
    """No further from float32 than twice what diffusers is under a dense mask."""
    before, after = recipe("diffusers: Wan")
    timestep = clip["timestep"]
    outputs = {}
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):  # in this order of the same weights
            wan.to(dtype)
            clip = {name: x.to(dtype) for name, x in clip.items()} | {"timestep": timestep}
            ours = run(after, transformer=wan, **clip)
            for block in wan.blocks:
                block.attn1.set_processor(Masked(ours["layout"].dense_mask()))
            theirs = run(before, transformer=wan, **clip)["output"]
            outputs[dtype] = ours["output"], theirs
    actual, baseline = outputs[torch.bfloat16]
    assert actual.dtype == torch.bfloat16
    assert_error_ratio(actual, outputs[torch.float32][1], baseline)


def test_wan_compiles_without_a_break(wan, clip):
    before, after = recipe("diffusers: Wan")
    expected = outcome(wan, run(after, transformer=wan, **clip)["output"])
    graphs = CompileCounterWithBackend("aot_eager")
    wan.compile_repeated_blocks(fullgraph=True, backend=graphs)
    assert_same(outcome(wan, run(before, transformer=wan, **clip)["output"]), expected)
    assert graphs.frame_count > 0


def test_wan_does_not_see_the_future(backend, wan, clip):
    before, after = recipe("diffusers: Wan")
    with torch.no_grad():
        first = run(after, transformer=wan, **clip)["output"]
        clip["latents"][:, :, -2:] += 1
        second = run(before, transformer=wan, **clip)["output"]
    torch.testing.assert_close(second[:, :, :-2], first[:, :, :-2])
    assert (second[:, :, -2:] - first[:, :, -2:]).abs().max() > 0.1


def test_wan_of_another_size_is_an_error(wan, clip):
    before, after = recipe("diffusers: Wan")
    run(after, transformer=wan, **clip)
    clip["latents"], clip["timestep"] = clip["latents"][:, :, :-1], clip["timestep"][:, :-TOKENS]
    words = r"^q: expected \(batch, 54, heads, head_dim\) .*, got \(2, 48, 2, 12\)$"
    with pytest.raises(ValueError, match=words):
        run(before, transformer=wan, **clip)


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


@pytest.mark.parametrize(
    ("local_attn_size", "sink_size", "chunk"), [(4, 1, 1), (5, 2, 1), (3, 0, 1), (3, 1, 3)]
)
def test_rolling_cache(backend, local_attn_size, sink_size, chunk):
    """Two layers, past the buffer's size several times, two noisy passes and a clean one a step."""
    before, after = recipe("Self-Forcing: the rolling cache")
    theirs = run(before, rotate=rotate, attention=attention)["self_attention"]
    ours = run(after)
    layers = nn.ModuleList(SelfAttention() for _ in range(2))
    prepared = nn.ModuleList(SelfAttention() for _ in range(2))
    prepared.load_state_dict(layers.state_dict())
    for layer in prepared:
        ours["rotate_halves"](layer)
    tokens = chunk * GRID[0] * GRID[1]
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
    with torch.inference_mode():
        for step in range(STEPS):
            freqs = rotations(step * chunk, chunk)
            for _ in range(3):
                expected = actual = torch.randn(BATCH, tokens, HEADS * HEAD_DIM)
                for index, layer in enumerate(layers):
                    state = rolling[index], step * tokens, sink_size * tokens
                    expected = theirs(layer, expected, freqs, *state)
                    actual = ours["self_attention"](prepared[index], actual, freqs, cache, index)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            cache.advance()
    assert all(state["global_end"] == STEPS * tokens for state in rolling)
