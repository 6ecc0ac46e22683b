"""Linear layers in 8 bits against loops over their blocks, and against the layers they replace."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import ScalingType
from torch.utils._python_dispatch import TorchDispatchMode

from aapt.model import float8
from aapt.model.float8 import Float8Linear, quantise_blocks, quantise_weight
from aapt.model.linear import product
from aapt.model.mmdit import MMDiT
from aapt.model.presets import aapt_8b

from ...kernels.test_quantise_rows import nearest
from ...kernels.test_quantise_rows import oracle as rows_oracle
from ..helpers import tiny_model, wan_transformer

SHAPES = [(128, 128), (256, 384), (200, 300), (1, 5)]


def block_oracle(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rounded weight in float64 and its scales, block by block."""
    values = torch.zeros(weight.shape, dtype=torch.float64)
    scales = torch.zeros(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = weight[at].abs().max() / 448
            values[at] = nearest(weight[at] / scales[i, j])
    return values, scales


def plain(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return the layer's 8-bit product in float64 by the two oracles."""
    values, scales = block_oracle(layer.weight.detach().float())
    outputs, inputs = values.shape
    weight = values.clone()
    for row in range(outputs):
        weight[row] *= scales[row // 128].double().repeat_interleave(128)[:inputs]
    rounded, row_scales = rows_oracle(x.flatten(0, -2))
    rows = rounded * row_scales.double().t().repeat_interleave(128, dim=1)[:, :inputs]
    return (rows @ weight.t() + layer.bias.double()).unflatten(0, x.shape[:-1])


def make(outputs: int, inputs: int) -> tuple[nn.Linear, torch.Tensor]:
    """Return a layer with blocks of different sizes, and its input."""
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    layer.weight *= torch.logspace(0, 2, outputs)[:, None] * torch.logspace(0, -1, inputs)
    return layer, torch.randn(2, 9, inputs) * torch.logspace(-1, 1, 9)[:, None]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_weight_is_rounded_block_by_block(outputs, inputs):
    layer, _ = make(outputs, inputs)
    values, scales = quantise_weight(layer.weight)
    expected, expected_scales = block_oracle(layer.weight)
    blocks = expected_scales.shape[1]
    assert torch.equal(scales[:, :blocks], expected_scales)
    assert scales.shape[1] % 4 == 0 and not scales[:, blocks:].any()
    assert torch.equal(values.double(), expected)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_rounded_numbers(outputs, inputs, dtype):
    layer, x = make(outputs, inputs)
    layer, x = layer.to(dtype), x.to(dtype)
    actual = Float8Linear.of(layer)(x)
    assert actual.dtype == dtype and actual.shape == (2, 9, outputs)
    bound = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual.double(), plain(layer, x), rtol=bound, atol=bound)


def test_the_product_without_bias_is_for_the_next_operator():
    layer, x = make(256, 128)
    rounded = Float8Linear.of(layer)
    torch.testing.assert_close(product(rounded, x) + layer.bias, rounded(x))
    torch.testing.assert_close(product(layer, x), F.linear(x, layer.weight))


def test_rounding_costs_four_per_cent():
    layer, x = nn.Linear(512, 512).requires_grad_(False), torch.randn(64, 512)
    exact, rounded = layer(x), Float8Linear.of(layer)(x)
    assert 0.02 < float((rounded - exact).norm() / exact.norm()) < 0.04


@pytest.mark.parametrize(
    "plant",
    [
        lambda scale: scale[0, 0].mul_(1.1),
        lambda scale: scale.copy_(scale.flip(0)),
        lambda scale: scale[:, :3].copy_(scale[:, :3].flip(1).clone()),
        lambda scale: scale[1].zero_(),
    ],
    ids=["one block", "blocks of outputs", "blocks of inputs", "not written"],
)
def test_a_wrong_scale_is_seen(plant):
    layer, x = make(256, 384)
    rounded = Float8Linear.of(layer)
    plant(rounded.weight_scale)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(rounded(x).double(), plain(layer, x), rtol=1e-4, atol=1e-4)


def test_scales_of_other_rows_are_seen(monkeypatch):
    layer, x = make(256, 384)
    rounded, rows = Float8Linear.of(layer), float8.quantise_rows
    monkeypatch.setattr(float8, "quantise_rows", lambda x: (rows(x)[0], rows(x)[1].roll(1, dims=1)))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(rounded(x).double(), plain(layer, x), rtol=1e-4, atol=1e-4)


def test_a_change_of_precision_or_device_keeps_the_bits():
    layer, _ = make(256, 300)
    rounded = Float8Linear.of(layer)
    bits, scale = rounded.weight.view(torch.uint8).clone(), rounded.weight_scale.clone()
    for changed in (rounded.bfloat16(), rounded.double(), nn.Sequential(rounded).half()[0]):
        assert torch.equal(changed.weight.view(torch.uint8), bits)
        assert torch.equal(changed.weight_scale, scale)
    assert rounded.bias.dtype == torch.float16
    away = copy.deepcopy(rounded).to("meta")
    assert away.weight.is_meta and away.weight.dtype == torch.float8_e4m3fn
    back = away.to_empty(device="cpu")
    assert back.weight_scale.dtype == torch.float32 and back.weight.shape == rounded.weight.shape


def scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, *, bias, output_dtype):
    """Stands in for PyTorch's product on sm_90: its documented scales, in float64."""
    assert (recipe_a, recipe_b) == (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
    assert scale_a.stride() == (1, len(a)) and b.stride(0) == 1
    padded = -(-(a.shape[1] // 128) // 4) * 4
    assert scale_b.shape == (padded, b.shape[1] // 128) and scale_b.stride() == (1, padded)
    out = torch.zeros(len(a), b.shape[1], dtype=torch.float64)
    for k in range(a.shape[1] // 128):
        at = slice(128 * k, 128 * k + 128)
        part = a[:, at].double() @ b[at].double()
        out += part * scale_a[:, k, None].double() * scale_b[k].double().repeat_interleave(128)
    return (out if bias is None else out + bias.double()).to(output_dtype)


def test_the_tensor_cores_get_what_they_document(monkeypatch):
    layer, x = make(384, 640)
    rounded = Float8Linear.of(layer)
    expected = rounded(x)
    monkeypatch.setattr(float8, "on_tensor_cores", lambda rows, weight: True)
    monkeypatch.setattr(float8.F, "scaled_mm", scaled_mm)
    torch.testing.assert_close(rounded(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(rounded, x), expected - layer.bias, rtol=1e-4, atol=1e-4)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_pytorch_accepts_the_layout_of_the_scales():
    """On the meta device PyTorch checks shapes and strides as on the chip."""
    layer = Float8Linear(640, 384).bfloat16().to("meta")
    x = torch.empty(1, 1196, 640, dtype=torch.bfloat16, device="meta")
    with Names() as seen:
        assert layer(x).shape == (1, 1196, 384)
    assert "aten::_scaled_mm_v2" in seen.names and "aapt::quantise_rows" in seen.names
    layer.weight_scale = layer.weight_scale.t().contiguous().t()
    with pytest.raises((RuntimeError, ValueError), match="blockwise scaling"):
        layer(x)


@pytest.mark.parametrize(
    ("dtype", "inputs", "device"),
    [
        (torch.float32, 128, "meta"),
        (torch.bfloat16, 192, "meta"),
        (torch.bfloat16, 128, "cpu"),
    ],
)
def test_other_products_are_computed_in_float32(dtype, inputs, device):
    layer = Float8Linear(inputs, 128).to(dtype).to(device)
    with Names() as seen:
        layer(torch.zeros(3, inputs, dtype=dtype, device=device))
    assert "aten::_scaled_mm_v2" not in seen.names


def test_a_broken_weight_is_refused():
    weight = torch.zeros(4, 4)
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="^weight: expected finite numbers, got NaN or infinity$"):
        quantise_weight(weight)


def test_layers_of_blocks_are_replaced_and_no_others():
    for transformer in (tiny_model().float().transformer, wan_transformer().float()):
        linear = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
        quantise_blocks(transformer)
        kept = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
        rounded = [n for n, m in transformer.named_modules() if isinstance(m, Float8Linear)]
        assert rounded == [n for n in linear if n.startswith("blocks.")]
        assert kept == [n for n in linear if not n.startswith("blocks.")]
        assert {"video_in", "video_modulation", "video_out"} <= set(kept)


def test_cosine_of_every_block_of_a_small_aapt_8b():
    """Outputs and updates of each block, errors of the blocks before included."""
    sizes = dict(width=512, heads=4, depth=4, text_width=64, text_tokens=16, window_frames=3)
    model = MMDiT(dataclasses.replace(aapt_8b(), **sizes, grid_windows=())).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            parameter.normal_(std=0.01 if parameter.ndim == 2 and "bias" not in name else 0.2)
    rounded = copy.deepcopy(model)
    quantise_blocks(rounded)
    x, text = torch.randn(1, 16, 5, 8, 12), torch.randn(1, 16, 64)
    inputs = (x, x.roll(1, 2), None, text, torch.tensor([16]), torch.ones(1))
    before = model.patchify(*inputs[:3], torch.arange(5))
    exact, ours = (each.features(*inputs, taps=range(4))[2] for each in (model, rounded))
    for block in range(4):
        whole = F.cosine_similarity(exact[block].flatten(), ours[block].flatten(), dim=0)
        update = [(out[block] - before).flatten() for out in (exact, ours)]
        assert whole > 0.9995 and F.cosine_similarity(*update, dim=0) > 0.99, block
        before = exact[block]
