"""Linear layers in 8 bits: e4m3 weights and inputs with scales (docs/method.md#18).

Weights have a scale for each block of 128 x 128, inputs one for each row and 128 channels. On sm_90
cuBLASLt multiplies them on the tensor cores. Elsewhere the product of the rounded numbers is
computed in float32, which has the same numbers and no more speed than the layer's own precision.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from aapt_kernels import quantise_rows

FORMAT = torch.float8_e4m3fn
BLOCK = 128
PADDING = 4  # cuBLASLt reads this many scales along the summed dimension at once


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight (outputs, inputs) to e4m3.

    Returns values in its shape, and scales (blocks of outputs, blocks of inputs) float32 with zeros
    up to a multiple of PADDING blocks of inputs. A scale is the largest size in its block / 448.
    ValueError for a weight with NaN or infinity.
    """
    if not weight.isfinite().all():
        raise ValueError("weight: expected finite numbers, got NaN or infinity")
    outputs, inputs = weight.shape
    padded = F.pad(weight.float(), (0, -inputs % BLOCK, 0, -outputs % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    info = torch.finfo(torch.float32)
    scales = (blocks.abs().amax((1, 3)) / torch.finfo(FORMAT).max).clamp(min=info.tiny)
    values = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)
    return values[:outputs, :inputs].to(FORMAT), F.pad(scales, (0, -scales.shape[1] % PADDING))


def dequantise_weight(values: Tensor, scales: Tensor) -> Tensor:
    """Returns the weight (outputs, inputs) that `quantise_weight` has rounded, in float32."""
    outputs, inputs = values.shape
    each = scales.repeat_interleave(BLOCK, 0)[:outputs].repeat_interleave(BLOCK, 1)[:, :inputs]
    return values.float() * each


class Rounded(NamedTuple):
    """Input of a product, in 8 bits when its operator writes it: values (..., inputs), scales
    (groups of 128 inputs, rows), and the dtype of the product's result."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


class Float8Linear(nn.Module):
    """`nn.Linear` with an e4m3 weight. It has no gradient.

    A change of the module's precision changes its bias alone.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        blocks = -(-inputs // BLOCK)
        scales = torch.zeros(-(-outputs // BLOCK), blocks + -blocks % PADDING)
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=FORMAT))
        self.register_buffer("weight_scale", scales)
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear) -> "Float8Linear":
        """Rounds the weight of a layer, whose bias is kept; on the meta device the form alone."""
        weight = linear.weight.detach()
        with torch.device(weight.device):
            made = cls(linear.in_features, linear.out_features)
        if weight.device.type != "meta":
            made.weight, made.weight_scale = quantise_weight(weight)
        made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return made

    def _apply(self, fn, recurse=True):
        # A cast sees bytes, which it leaves as they are
        kept = {name: self._buffers.pop(name) for name in ("weight", "weight_scale")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            self._buffers[name] = fn(tensor.view(torch.uint8)).view(tensor.dtype)
        return self

    def forward(self, x: Tensor | Rounded) -> Tensor:
        """Maps x (..., inputs) to (..., outputs)."""
        return self.product(x, self.bias)

    def product(self, x: Tensor | Rounded, bias: Tensor | None = None) -> Tensor:
        """Multiplies x (..., inputs), which it rounds unless an operator has, by the weight and
        adds a bias, if any."""
        if isinstance(x, Tensor):
            values, scales = quantise_rows(x.flatten(0, -2))
            x = Rounded(values.view(x.shape), scales, x.dtype)
        values, scales, dtype = x.values.flatten(0, -2), x.scales, x.dtype
        if on_tensor_cores(dtype, self.weight):
            out = F.scaled_mm(
                values,
                self.weight.t(),
                scales.t(),
                ScalingType.BlockWise1x128,
                self.weight_scale.t(),
                ScalingType.BlockWise128x128,
                bias=bias,
                output_dtype=dtype,
            )
        else:
            inputs = values.float() * scales.t().repeat_interleave(BLOCK, 1)[:, : values.shape[1]]
            out = F.linear(inputs, dequantise_weight(self.weight, self.weight_scale))
            out = (out if bias is None else out + bias).to(dtype)
        return out.unflatten(0, x.values.shape[:-1])


def on_tensor_cores(dtype: torch.dtype, weight: Tensor) -> bool:
    """Return whether PyTorch multiplies inputs of this dtype and a weight in 8 bits: whole blocks,
    bfloat16, on sm_90. The meta device counts as sm_90, so that predictions see the product."""
    if dtype != torch.bfloat16 or any(size % BLOCK for size in weight.shape):
        return False
    if weight.device.type == "cuda":
        return torch.cuda.get_device_capability(weight.device) == (9, 0)
    return weight.device.type == "meta"


def quantise_blocks(transformer: nn.Module) -> None:
    """Replaces every linear layer in the blocks of a transformer by its 8-bit form, one after the
    other. Modulation, the layers from latents and text to tokens and the output layer stay."""
    for module in list(transformer.blocks.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:  # an adapted one has more than a weight
                setattr(module, name, Float8Linear.of(layer))
