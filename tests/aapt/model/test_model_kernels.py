"""A streaming step through the sm_90a kernels, simulated, against the same step on the CPU."""

import pytest
import torch

from aapt.model.mmdit import MMDiT
from aapt.training.recipes import tiny_world
from aapt_kernels import use_backend
from aapt_kernels.backend import no_sim

if reason := no_sim():
    pytest.skip(reason, allow_module_level=True)


@torch.inference_mode()
def stream(model, backend, text, steps):
    """Latents of `steps` frames, each made from the one before."""
    config, generator = model.config, torch.Generator().manual_seed(1)

    def normal(channels):
        return torch.randn(1, channels, 1, 10, 16, generator=generator).bfloat16()

    time = torch.ones(1, dtype=torch.bfloat16)
    cache = model.new_cache(1, (10, 16), dtype=torch.bfloat16)
    lens = torch.tensor([text.shape[1] - 6])
    for layer, (k, v) in enumerate(model.encode_text(text, lens, time)):
        cache.write_text(layer, k, v, lens)
    recycled, outputs = normal(config.latent_channels), []
    for _ in range(steps):
        noise, condition = normal(config.latent_channels), normal(config.condition_channels)
        with use_backend(backend):
            recycled = model.step(noise, recycled, condition, time, cache)
        outputs.append(recycled)
    return torch.cat(outputs, dim=2)


def test_streaming_reaches_the_kernels():
    """The ring wraps within the steps."""
    torch.manual_seed(0)
    config = tiny_world().model
    model = MMDiT(config).bfloat16().eval()
    text = torch.randn(1, config.text_tokens, config.text_width).bfloat16()
    steps = config.window_frames + 4
    simulated, plain = (stream(model, backend, text, steps) for backend in ("sim", "cpu"))
    assert simulated.isfinite().all()
    error = (simulated - plain).float().square().mean().sqrt()
    assert error < 0.02 * plain.float().square().mean().sqrt()
