"""The decoder's convolutions and one steady step of the light decoder against cuDNN, and its
attention against PyTorch's.

On a GPU, at 736x416: every peer is the plain composition (concatenate the past, pad, convolve,
add) in the layout that its name says, eager or compiled with max-autotune; CUDA graphs replay both
sides of the step. Run with `pytest benchmarks/bench_vae_decoder.py --device cuda`; `--device dry`
cuts the cases down to a CPU. The prediction: `python benchmarks/decoder_model.py`.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from aapt.vae import CausalVAE, decoder_work, layers, light, total
from aapt.vae.attention import attend
from aapt.vae.stream import capture
from aapt_kernels import causal_conv3d
from aapt_kernels.causal_conv3d import fuses_next_norm
from aapt_kernels.causal_conv3d.cases import ACTIVE, Case, make_inputs

from .compositions import concatenating_conv3d
from .conftest import Work
from .peers import Compiled, attempt, compiled, other_backends

LAST, FIRST = torch.channels_last_3d, torch.contiguous_format

# One of every kind of the light decoder's convolutions, steady, at 736x416.
CONVOLUTIONS = {
    "64 -> 64 at full size": Case((4, 416, 736), (64, 64), residual=True, **ACTIVE),
    "128 -> 64 at full size": Case((4, 416, 736), (128, 64), **ACTIVE),
    "128 -> 128": Case((2, 208, 368), (128, 128), residual=True, **ACTIVE),
    "256 -> 256": Case((1, 104, 184), (256, 256), residual=True, **ACTIVE),
    "512 -> 512": Case((1, 52, 92), (512, 512), residual=True, **ACTIVE),
    "128 -> 128, twice the size": Case((2, 208, 368), (128, 128), upsample=(2, 2)),
    "64 -> 64, normed for the next": Case((4, 416, 736), (64, 64), next_norm=True),
    "64 -> 3": Case((4, 416, 736), (64, 3), **ACTIVE),
}


@pytest.fixture(autouse=True)
def not_in_make_bench(mode):
    if mode == "cpu":
        pytest.skip("bench_causal_conv3d.py has the CPU's cases")


def tuned(function, mode):
    return compiled(function, mode, "max-autotune-no-cudagraphs")


def eager(function, mode):
    return function


def prepare(case, mode, device):
    """Inputs with channels last, on the device."""
    if mode == "dry":
        case = replace(case, size=(case.size[0], 6, 10))
    inputs, options = make_inputs(replace(case, batch=1, state=True), torch.bfloat16)
    options |= {"eps": 1e-6, "pixels": False, "residual": options.get("residual")}
    options.setdefault("norm_weight", None)
    if case.next_norm:
        options["keep_out"] = False

    def move(value, memory_format):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.to(device)
        return value.contiguous(memory_format=memory_format) if value.dim() == 5 else value

    def arguments(memory_format):
        moved = {name: move(value, memory_format) for name, value in options.items()}
        return [move(x, memory_format) for x in inputs], moved

    return arguments


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(against, mode, device, name):
    case = CONVOLUTIONS[name]
    arguments = prepare(case, mode, device)
    inputs, options = arguments(LAST)

    def ours():
        return wanted(causal_conv3d(*inputs, **options))

    def wanted(outputs):
        return outputs[2 if case.next_norm else 0]

    def cudnn(memory_format, how):
        inputs, options = arguments(memory_format)
        if options["upsample"] != (1, 1):  # the peer keeps its past at the output's rate
            options["state"] = options["state"].repeat_interleave(2, dim=2)
        run = how(concatenating_conv3d, mode)
        return lambda: wanted(run(*inputs, **options))

    rivals = {
        "cuDNN NDHWC, eager": attempt(lambda: cudnn(LAST, eager)),
        "cuDNN NDHWC, compiled": Compiled(lambda: cudnn(LAST, tuned)),
        "cuDNN NCDHW, compiled": Compiled(lambda: cudnn(FIRST, tuned)),
    }
    if mode == "cuda":
        rivals |= other_backends("causal_conv3d", inputs[0], ours)
    out = ours()
    x, weight = inputs[:2]
    # As the unfolded convolution would count
    flops = 2 * weight.numel() * out[0, 0].numel()
    moved = sum(t.numel() for t in (x, options["state"], weight, out))
    moved += out.numel() if options["residual"] is not None else 0
    against(ours, rivals, rounds=10, iterations=1, work=Work(flops, 2 * moved))


@pytest.mark.parametrize("height, width", [(416, 736), (720, 1280)])
def test_frame_attention(against, mode, device, height, width):
    """One head of 512 channels at an eighth of the video's size."""
    pixels, channels = (height // 8) * (width // 8), 512
    if mode == "dry":
        pixels, channels = 24, 16
    shape = (1, 1, pixels, 3 * channels)
    qkv = torch.randn(shape, dtype=torch.bfloat16, device=device).chunk(3, dim=-1)

    def math():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*qkv)

    rivals = {"SDPA": lambda: F.scaled_dot_product_attention(*qkv), "SDPA, plain products": math}
    work = Work(4 * pixels**2 * channels, 2 * 4 * pixels * channels)
    against(lambda: attend(*qkv), rivals, rounds=10, iterations=1, work=work)


@pytest.mark.parametrize("height, width", [(416, 736), (720, 1280)])
def test_steady_step_of_the_light_decoder(against, mode, device, monkeypatch, height, width):
    """Weights do not change times. The peer returns no pixels, ours does."""
    config, size = light(), (height, width)
    if mode == "dry":
        config, size = replace(config, decoder_channels=(8, 16, 16, 32)), (16, 32)
    work = total(decoder_work(config, *size))
    with torch.device(device):
        vae = CausalVAE(config).bfloat16().requires_grad_(False)
        latent = torch.randn(1, 16, 1, size[0] // 8, size[1] // 8, dtype=torch.bfloat16)

    def choose(convolution, fuses):
        monkeypatch.setattr(layers, "causal_conv3d", convolution)
        monkeypatch.setattr(layers, "fuses_next_norm", fuses)

    def decode(convolution, fuses, pixels, wrap=lambda f: f):
        choose(convolution, fuses)
        with torch.no_grad():
            _, state = vae.decode_frame(latent)
            step = wrap(lambda: vae.decode_frame(latent, state, pixels=pixels)[0])
            return capture(step, device)

    def plain(x, weight, bias, **options):
        options["pixels"] = False
        return concatenating_conv3d(x, weight, bias, **options)

    def cudnn(how):
        try:
            return decode(plain, lambda *_: False, False, lambda f: how(f, mode))
        finally:
            choose(causal_conv3d, fuses_next_norm)

    ours = decode(causal_conv3d, fuses_next_norm, True)
    rivals = {
        "cuDNN, eager": attempt(lambda: cudnn(eager)),
        "cuDNN, compiled": Compiled(lambda: cudnn(tuned)),
    }
    against(ours, rivals, rounds=5, iterations=1, work=Work(work.folded_flops, work.bytes))
