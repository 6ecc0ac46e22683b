"""`causal_conv3d`: one step of streaming VAE decoding and one training step of a convolution.

The backend "reference" is the plain composition (concatenate the cached frames, pad, convolve,
add), "cpu" the one `auto` takes. Run with `pytest benchmarks/bench_causal_conv3d.py`.
"""

import pytest
import torch

from aapt.vae import CausalVAE, tiny
from aapt_kernels import causal_conv3d, use_backend
from aapt_kernels.causal_conv3d.cases import ACTIVE, Case, make_inputs

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
