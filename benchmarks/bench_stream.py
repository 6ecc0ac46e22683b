"""Times whole steps of a stream: the bundled model with decoding, aapt-8b with random weights.

Run with `make gpu PART=stream`; on a CPU `aapt bench stream` times the bundled model.
"""

import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from aapt.evaluate.speed import bench_stream
from aapt.model.mmdit import MMDiT
from aapt.model.presets import aapt_8b
from aapt.streaming.generator import StreamingGenerator
from aapt.streaming.student import StudentRollout

VIDEO_FRAMES = 4  # per step
PHASES = (  # the operator that a device time belongs to, by the first name that is part of its own
    ("attention", ("cached_attention",)),
    ("kv_append", ("kv_append",)),
    ("products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm")),
)


pytestmark = pytest.mark.patience(45)  # 8 billion weights are drawn, and both rings filled


@pytest.fixture(autouse=True)
def on_a_device(mode):
    if mode == "cpu":
        pytest.skip("`aapt bench stream` times the bundled model on a CPU")


def test_bundled_model(mode, device, record_property):
    generator = StreamingGenerator.from_pretrained("tiny-world")
    generator.model.to(device)
    generator.vae.to(device)
    picture = Image.open(generator.sample_image()).convert("RGB")
    first = np.asarray(picture.resize((generator.width, generator.height)))
    steps = 240 if mode == "cuda" else 1
    result = bench_stream(generator, first, generator.sample_prompt, steps)
    step = result["step_ms"]
    words = f"p50 {step['p50']:.2f} ms, p99 {step['p99']:.2f} ms, {result['fps']:.0f} fps"
    record_property("result", result | {"summary": words})


@pytest.mark.parametrize(("height", "width"), [(416, 736), (720, 1280)])
def test_aapt_8b(mode, device, record_property, height, width):
    """The generator's step without the decoder, on a full ring; times do not depend on weights."""
    config, size = aapt_8b(), (height // 8, width // 8)
    if mode == "dry":
        small = {"width": 256, "heads": 2, "depth": 2, "text_width": 32, "text_tokens": 8}
        config, size = replace(config, window_frames=2, **small), (4, 6)
    with torch.device(device):
        with default_dtype(torch.bfloat16):  # in float32 first, the weights alone would take 33 GB
            model = MMDiT(config).bfloat16().requires_grad_(False).eval()
        shape = (1, config.latent_channels, 1, *size)
        noise, latent = torch.randn(2, *shape, dtype=torch.bfloat16)
        text = torch.randn(1, config.text_tokens, config.text_width, dtype=torch.bfloat16)
        text_lens = torch.tensor([config.text_tokens])
        rollout = StudentRollout(model, text, text_lens, latent)
    rollout.cache.k.normal_()
    rollout.cache.v.normal_()
    rollout.cache.step.fill_(3 * rollout.cache.ring_frames)

    def step():
        return model.step(noise, latent, None, rollout.time, rollout.cache)

    with torch.inference_mode():
        result = {"eager_ms": step_milliseconds(step, device, rounds=10)}
        result["phases_ms"] = phases(step, device)
        result["finite"] = bool(step().isfinite().all())
        if mode == "cuda":
            try:
                result["graph_ms"] = graph_milliseconds(step, device)
            except RuntimeError as error:  # the eager figures stay
                result["graph_error"] = str(error)[:500]
    if mode == "cuda":
        result["memory_bytes"] = torch.cuda.max_memory_allocated(device)
    best = min(result["eager_ms"], result.get("graph_ms", torch.inf))
    result["fps_without_decoder"] = 1e3 * VIDEO_FRAMES / best
    split = ", ".join(f"{name} {ms:.1f}" for name, ms in result["phases_ms"].items())
    words = f"{best:.1f} ms a step, {result['fps_without_decoder']:.1f} fps; device ms: {split}"
    record_property("result", result | {"summary": words})
    assert result["finite"] and "graph_error" not in result


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def step_milliseconds(step, device, rounds: int) -> float:
    """Median from call to the end of the device's work."""
    times = []
    for _ in range(rounds + 2):
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - begun))
    return float(np.median(times[2:]))


def graph_milliseconds(step, device) -> float:
    """The step as one CUDA graph, as a stream replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return step_milliseconds(graph.replay, device, rounds=20)


def phases(step, device) -> dict[str, float]:
    """Device milliseconds of one eager step by purpose (PHASES). A dry run counts CPU time."""
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    totals = dict.fromkeys([*(name for name, _ in PHASES), "the rest"], 0.0)
    for event in profile.key_averages():
        # A kernel is an event of its own, and once more part of the operator that launched it.
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA:
            continue
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = next((name for name, parts in PHASES if any(p in event.key for p in parts)), None)
        totals[name or "the rest"] += own / 1e3
    return totals
