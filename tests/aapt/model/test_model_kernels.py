"""A streaming step through the sm_90a kernels, simulated, against the same step on the CPU."""

from dataclasses import replace
from functools import wraps

import pytest
import torch

import aapt.model.layers
from aapt.model.config import FewStepConfig
from aapt.model.mmdit import MMDiT
from aapt.streaming.few_step import FewStepRollout
from aapt.training.recipes import tiny_world
from aapt_kernels import use_backend
from aapt_kernels.backend import no_sim

from ..helpers import SIZE, wan_transformer
from ..plain_wan import PlainWan

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
    config = replace(tiny_world().model, depth=2, window_frames=2)
    model = MMDiT(config).bfloat16().eval()
    text = torch.randn(1, config.text_tokens, config.text_width).bfloat16()
    steps = config.window_frames + 4
    plain = stream(model, text, steps)
    calls = request.getfixturevalue("simulated")
    simulated = stream(model, text, steps)
    assert calls == steps * config.depth * ["kv_append", "cached_attention"]
    assert simulated.isfinite().all()
    error = (simulated - plain).float().square().mean().sqrt()
    assert error < 0.02 * plain.float().square().mean().sqrt()


@pytest.mark.parametrize("distance", ["absolute", "clamped"])
@pytest.mark.parametrize(
    ("chunk", "window", "sink", "first"), [(3, 4, 2, 1), (2, 5, 3, None), (3, 6, 4, None)]
)
def test_chunks_reach_the_kernels(simulated, chunk, window, sink, first, distance):
    """Neither sink nor window nor first chunk is a multiple of the chunk; the ring wraps. Against
    the plain rolling cache in float64, no farther than the same cache in bfloat16."""
    net = wan_transformer(
        width=128,
        heads=2,
        head_dim=64,
        rope_axes=(24, 20, 20),
        depth=2,
        chunk=chunk,
        first_chunk=first,
        window_frames=window,
        sink_frames=sink,
        sink_distance=distance,
    ).bfloat16()
    sampling = FewStepConfig((1.0, 0.625))
    text, lens = torch.randn(1, 6, 8).bfloat16(), torch.tensor([4])
    steps = (sink + window) // chunk + 2
    sizes = [net.config.opening_frames, *[chunk] * (steps - 1)]
    drawn = [torch.randn(2, 1, 4, frames, *SIZE).bfloat16() for frames in sizes]
    with torch.no_grad():
        rollout = FewStepRollout(net, text, lens, SIZE, sampling)
        made = torch.cat([rollout.step(noise) for noise in drawn], dim=2)
    passes = 3 * len(drawn)
    assert simulated == passes * net.config.depth * ["kv_append", "cached_attention"]
    plain = []
    for dtype in (torch.bfloat16, torch.float64):
        stream = PlainWan(net.to(dtype), text.to(dtype), lens, relative=distance == "clamped")
        with torch.no_grad():
            chunks = [stream.chunk(noise.to(dtype), list(sampling.times), 0.0) for noise in drawn]
        plain.append(torch.cat(chunks, dim=2).double())
    errors = [(each.double() - plain[1]).square().mean().sqrt() for each in (made, plain[0])]
    assert 0 < errors[0] < 1.3 * errors[1] < 0.1 * plain[1].square().mean().sqrt()
