"""Costs of a steady step, layer by layer, from the configuration: operations, bytes, parameters.

Bytes are the least that a kernel with fused norms, upsampling and bias can move: each input and its
past frames once, each output and residual once, weights once.
"""

from dataclasses import dataclass

import torch

from .autoencoder import CausalVAE
from .config import VAEConfig
from .layers import Call, FrameAttention


@dataclass(frozen=True)
class Work:
    """One kernel for one latent frame. A multiplication and an addition count as two operations."""

    name: str
    flops: int  # of the convolution at the output's rate
    folded_flops: int  # with nearest upsampling folded into the weights
    bytes: int
    state_bytes: int  # of `bytes`: past frames
    parameters: int


def total(works: list[Work]) -> Work:
    """Adds up the work of several kernels."""
    fields = ("flops", "folded_flops", "bytes", "state_bytes", "parameters")
    return Work("total", *(sum(getattr(work, field) for work in works) for field in fields))


def decoder_work(
    config: VAEConfig, height: int, width: int, element_bytes: int = 2, pixels: bool = True
) -> list[Work]:
    """Work of the decoder for a video of `height` x `width`, in the order it runs. With `pixels`
    the last convolution writes uint8, unless a lapped map is added after it. The linear skip is
    left out."""
    with torch.device("meta"):
        decoder = CausalVAE(config).decoder
    names = {module: name for name, module in decoder.named_modules()}
    size = (1, height // config.space_factor, width // config.space_factor)
    works = []

    def add(call: Call) -> None:
        last = call.conv is decoder.conv_out and decoder.lapped is None
        out_bytes = 1 if pixels and last else element_bytes
        works.append(_conv_work(names[call.conv], call, element_bytes, out_bytes))

    if decoder.lapped is not None:
        add(Call(decoder.lapped, *size))
    if decoder.projection is not None:
        add(Call(decoder.projection, *size))
    add(Call(decoder.conv_in, *size))
    for layer in decoder.layers:
        for call in layer.calls(*size):
            add(call)
        if isinstance(layer, FrameAttention):
            works.insert(-1, _attention_work(names[layer], layer, size, element_bytes))
        time, space = getattr(layer, "stride", (1, 1))
        size = (size[0] * time, size[1] * space, size[2] * space)
    add(Call(decoder.conv_out, *size))
    return works


def flops_per_latent_frame(config: VAEConfig, height: int, width: int) -> tuple[int, int]:
    """Steady-state (encoder, decoder) FLOPs per latent frame of a `height` x `width` video, the
    linear skip included."""
    with torch.device("meta"):
        vae = CausalVAE(config)
    latent = (1, height // config.space_factor, width // config.space_factor)
    encode = 0
    decode = total(decoder_work(config, height, width)).flops
    if vae.linear is not None:
        encode += _flops(Call(vae.linear.encode, *latent))
        if vae.decoder.lapped is None:  # which stands in for the linear map back
            decode += _flops(Call(vae.linear.decode, *latent))
    if vae.encoder is not None:
        size = (config.time_factor, height // config.patch_size, width // config.patch_size)
        encode += _flops(Call(vae.encoder.conv_in, *size))
        for layer in vae.encoder.layers:
            encode += sum(map(_flops, layer.calls(*size)))
            if isinstance(layer, FrameAttention):
                encode += _attention_work("", layer, size, 0).flops
            time, space = getattr(layer, "stride", (1, 1))
            size = (size[0] // time, size[1] // space, size[2] // space)
        encode += _flops(Call(vae.encoder.conv_out, *size))
    return encode, decode


def _out_pixels(call: Call) -> int:
    (repeats, copies), (st, sh, sw) = call.conv.upsample, call.conv.stride
    return (
        (call.frames * repeats // st) * (call.height * copies // sh) * (call.width * copies // sw)
    )


def _flops(call: Call) -> int:
    return 2 * call.conv.weight.numel() * _out_pixels(call)


def _distinct_taps(kernel: int, repeats: int, ahead: int) -> float:
    """Input elements under the taps of one output element, averaged over the copies; `ahead` taps
    reach past the element itself."""
    taps = range(ahead - kernel + 1, ahead + 1)
    return sum(len({(copy + i) // repeats for i in taps}) for copy in range(repeats)) / repeats


def _conv_work(name: str, call: Call, element_bytes: int, out_bytes: int) -> Work:
    conv = call.conv
    out_channels, in_channels, kt, kh, kw = conv.weight.shape
    repeats, copies = conv.upsample
    flops = _flops(call)
    taps = _distinct_taps(kt, repeats, 0)
    taps *= _distinct_taps(kh, copies, kh // 2) * _distinct_taps(kw, copies, kw // 2)
    frame = in_channels * call.height * call.width * element_bytes
    state = -(-(kt - 1) // repeats) * frame
    out = out_channels * _out_pixels(call)
    residual = out * element_bytes if call.residual else 0
    parameters = sum(p.numel() for p in conv.parameters())
    moved = call.frames * frame + state + out * out_bytes + residual
    return Work(
        name,
        flops,
        round(flops * taps / (kt * kh * kw)),
        moved + parameters * element_bytes,
        state,
        parameters,
    )


def _attention_work(
    name: str, layer: FrameAttention, size: tuple[int, int, int], element_bytes: int
) -> Work:
    """The two products of scaled dot-product attention."""
    frames, height, width = size
    pixels, channels = height * width, len(layer.proj.weight)
    flops = 4 * frames * channels * pixels**2
    moved = 4 * frames * channels * pixels * element_bytes  # q, k, v and the output
    return Work(f"{name}.attention", flops, flops, moved, 0, 0)
