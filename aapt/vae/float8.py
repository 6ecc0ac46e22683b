"""Decoders in 8 bits: e4m3 inputs, states and weights of the inner convolutions
(docs/method.md#18)."""

import torch
from torch import Tensor, nn

from aapt_kernels import causal_conv3d_e4m3
from aapt_kernels.causal_conv3d import fuses_next_norm
from aapt_kernels.causal_conv3d.e4m3 import round_weight

from .autoencoder import CausalVAE
from .layers import CausalConv3d, SeparateUpsample
from .stream import forget_forms

ENDS = ("conv_in", "conv_out", "lapped", "projection")  # they read latents or make pixels


class Float8Conv3d(CausalConv3d):
    """`CausalConv3d` in 8 bits, without strides and without a gradient. Its input is rounded after
    norm and SiLU, by the layer before if a kernel can; its output has the precision of the bias.

    A change of the module's precision leaves weight and scales as they are.
    """

    def __init__(self, layer: CausalConv3d):
        nn.Module.__init__(self)
        values, scales = round_weight(layer.weight)
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scales)
        self.bias, self.norm_weight = layer.bias, layer.norm_weight
        self.silu, self.eps = layer.silu, layer.eps
        self.stride, self.upsample, self.padding = layer.stride, layer.upsample, layer.padding

    def _apply(self, fn, recurse=True):
        # A cast sees bytes, which it leaves as they are, and no scales
        kept = {name: self._buffers.pop(name) for name in ("weight", "weight_scale")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            self._buffers[name] = fn(tensor.view(torch.uint8)).view(tensor.dtype)
        return self

    def _fuses_next_norm(self, x: Tensor, *others: Tensor | None) -> bool:
        return fuses_next_norm(x, self.weight, *others, op="causal_conv3d_e4m3")

    def _convolve(self, x: Tensor, **options) -> tuple[Tensor | None, ...]:
        own = dict(upsample=self.upsample, padding=self.padding)
        weight = self.weight, self.weight_scale
        return causal_conv3d_e4m3(x, *weight, self.bias, **own, **options)


def round_decoder(vae: CausalVAE) -> None:
    """Replaces the inner convolutions of a decoder by their 8-bit form. Those that read latents or
    make pixels keep their precision, and so does Wan's upsampling in time.

    ValueError for three decoders: one without norms (no scale fits its numbers), one in float64,
    and one that is already rounded.
    """
    if vae.config.decoder != "residual":
        raise ValueError(
            "decoder_dtype: expected None for a decoder without norms, such as TAEHV's, got float8"
        )
    if vae.latent_mean.dtype == torch.float64:
        raise ValueError("decoder_dtype: expected None for a decoder in float64, got float8")
    decoder = vae.decoder
    if any(isinstance(module, Float8Conv3d) for module in decoder.modules()):
        raise ValueError("decoder_dtype: expected a decoder in its own precision, got float8")
    kept = {getattr(decoder, name) for name in ENDS}
    kept |= {x.time_conv for x in decoder.modules() if isinstance(x, SeparateUpsample)}
    for module in list(decoder.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, CausalConv3d) and layer not in kept:
                setattr(module, name, Float8Conv3d(layer))
    forget_forms(vae)
