"""A streaming step through the sm_90a kernels, simulated, against the same step on the CPU."""

from functools import wraps

import pytest
import torch

import aapt.model.layers
from aapt.model.transformer import VideoTransformer
from aapt.training.recipes import tiny_world
from aapt_kernels import use_backend
from aapt_kernels.backend import no_sim

if reason := no_sim():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def simulated(monkeypatch):
    """Simulates the operators of a step that have an sm_90a kernel; the CPU runs the others."""
    calls = []

    def simulate(op):
        @wraps(op)
        def run(*args, **kwargs):
            calls.append(op.__name__)
            with use_backend("sim"):
                return op(*args, **kwargs)

        return run

    for name in ("kv_append", "cached_attention"):
        monkeypatch.setattr(aapt.model.layers, name, simulate(getattr(aapt.model.layers, name)))
    return calls


@torch.inference_mode()
def stream(model, text, steps):
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
        recycled = model.step(noise, recycled, condition, time, cache)
        outputs.append(recycled)
    return torch.cat(outputs, dim=2)


def test_streaming_reaches_the_kernels(request):
    """The ring wraps within the steps."""
    torch.manual_seed(0)
    config = tiny_world().model
    model = VideoTransformer(config).bfloat16().eval()
    text = torch.randn(1, config.text_tokens, config.text_width).bfloat16()
    steps = config.window_frames + 4
    plain = stream(model, text, steps)
    calls = request.getfixturevalue("simulated")
    simulated = stream(model, text, steps)
    assert calls == steps * config.depth * ["kv_append", "cached_attention"]
    assert simulated.isfinite().all()
    error = (simulated - plain).float().square().mean().sqrt()
    assert error < 0.02 * plain.float().square().mean().sqrt()
