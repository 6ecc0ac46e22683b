"""`causal_conv3d`: one step of streaming VAE decoding and one training step of a convolution.

The backend "reference" is the plain composition (concatenate the cached frames, pad, convolve,
add), "cpu" the one `auto` takes. Run with `pytest benchmarks/bench_causal_conv3d.py`.
"""

import copy

import pytest
import torch

from aapt.vae import CausalVAE, layers, tiny
from aapt_kernels import causal_conv3d, use_backend
from aapt_kernels.causal_conv3d.cases import ACTIVE, Case, make_inputs
from aapt_kernels.testing import time_by_turns

from .compositions import concatenating_conv3d

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.benchmark(group="tiny VAE: decode one latent frame at 128x80")
def test_decode_frame(benchmark, dtype, backend):
    vae = CausalVAE(tiny()).to(dtype).requires_grad_(False)
    latent = torch.randn(1, 16, 1, 10, 16, dtype=dtype)
    with use_backend(backend):
        _, state = vae.decode_frame(latent)
        benchmark.pedantic(
            vae.decode_frame, (latent, state), rounds=30, warmup_rounds=5, iterations=1
        )


def test_decode_frame_against_concatenation(monkeypatch, record_property):
    """Compares the network with itself over `concatenating_conv3d`: float32, alternately in one
    process, in both memory formats. Ratios of medians."""
    torch.manual_seed(0)
    vae = CausalVAE(tiny()).requires_grad_(False)
    for parameter in vae.parameters():
        parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2)
    plain = copy.deepcopy(vae)
    for parameter in plain.parameters():
        parameter.data = parameter.contiguous()
    latent = torch.randn(1, 16, 1, 10, 16)
    _, state = vae.decode_frame(latent)
    contiguous = tuple(part.contiguous() for part in state)

    def decode(convolution, vae, state):
        def run():
            monkeypatch.setattr(layers, "causal_conv3d", convolution)
            return vae.decode_frame(latent, state)

        return run

    steps = {
        "ours": decode(causal_conv3d, vae, state),
        "concatenated, NCDHW": decode(concatenating_conv3d, plain, contiguous),
        "concatenated, NDHWC": decode(concatenating_conv3d, vae, state),
    }
    with torch.inference_mode():
        outputs = [step() for step in steps.values()]
        times = time_by_turns(steps, torch.device("cpu"), rounds=60)
    (video, ours), *peers = outputs
    for peer_video, theirs in peers:
        torch.testing.assert_close(video, peer_video, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    own = times.pop("ours").median
    words = f"{torch.get_num_threads()} threads: ours {1e3 * own:.1f} ms"
    for name, peer in times.items():
        words += f"; {name} {1e3 * peer.median:.1f} ms, {peer.median / own:.2f} times as long"
    print(f"\n{words}")
    record_property("result", {"summary": words})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.benchmark(group="norm, SiLU, 3x3x3 convolution 48 -> 48: forward and backward")
def test_forward_backward(benchmark, dtype, backend):
    case = Case((17, 20, 32), (48, 48), batch=4, residual=True, **ACTIVE)
    inputs, options = make_inputs(case, dtype)
    inputs = [t.requires_grad_() for t in inputs]
    options["norm_weight"].requires_grad_()

    def step():
        out, _ = causal_conv3d(*inputs, **options)
        out.backward(options["residual"])

    with use_backend(backend):
        benchmark.pedantic(step, rounds=5, warmup_rounds=1, iterations=1)
