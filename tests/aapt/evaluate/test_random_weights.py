"""Presets with random weights: sizes, and streams that run."""

import pytest
import torch

from aapt.device import memory_of
from aapt.evaluate import random_weights
from aapt.evaluate.breakdown import predict_parts
from aapt.evaluate.random_weights import SIZES, original_decoder, random_generator
from aapt.model.presets import PRESETS, aapt_2b, aapt_8b, aapt_small
from aapt.vae.cost import decoder_work, total


def attention_over_products(config, height: int, width: int) -> float:
    """Operations of a step's attention over those of its products (docs/method.md#14)."""
    grid = config.token_grid(height // 8, width // 8)
    tokens = grid[0] * grid[1]
    keys = config.text_tokens + (config.window(grid) + 2) * tokens
    return 4 * keys / (24 * config.width)


def test_the_small_network_has_the_papers_proportions():
    assert set(SIZES) == set(PRESETS)
    paper = attention_over_products(aapt_8b(), 416, 736)
    assert attention_over_products(aapt_small(), 160, 256) == pytest.approx(paper, rel=0.02)


def test_aapt_2b_has_two_billion_parameters_and_one_second_at_720p():
    config = aapt_2b()
    generator = random_generator("aapt-2b", "meta", torch.bfloat16)
    blocks = sum(p.numel() for p in generator.model.transformer.blocks.parameters())
    assert blocks == pytest.approx(2.0e9, rel=0.02)
    assert (generator.height, generator.width) == (720, 1280)
    assert config.window(config.token_grid(90, 160)) == generator.fps // 4 == 6
    assert config.heads % 16 == 0


def test_aapt_2b_is_predicted_at_60_fps_at_720p():
    generator = random_generator("aapt-2b", "meta", torch.bfloat16)
    step = predict_parts(generator, "h100").step
    assert 4 / (step / 1e3) > 60
    # By hand, docs/method.md#14
    products = 2 * 3600 * 20 * 12 * 2048**2 / 700e12
    attention = 4 * 3600 * (512 + 8 * 3600) * 2048 * 20 / 600e12
    assert 1e3 * (products + attention) < step < 1e3 * (products + attention) + 25


def test_weights_beyond_the_memory_are_refused_before_they_are_drawn(monkeypatch):
    monkeypatch.setattr(random_weights, "memory_of", lambda device: 10_000_000_000)
    message = (
        r"^model: aapt-8b has (3\d\.\d) GB of weights, cpu has 10\.0 GB of memory; .*--predict"
    )
    with pytest.raises(ValueError, match=message):
        random_generator("aapt-8b", "cpu", torch.float32)
    assert memory_of(torch.device("cpu")) > 1e9 and memory_of(torch.device("meta")) is None


def test_a_preset_streams_with_random_weights():
    torch.manual_seed(0)
    generator = random_generator("aapt-small")
    picture = torch.zeros(160, 256, 3, dtype=torch.uint8).numpy()
    with generator.open(picture, "") as stream:
        assert stream.step().shape == (4, 160, 256, 3)
        assert stream._memory.latent.isfinite().all()
    original = original_decoder("aapt-small", generator.vae)
    light, full = (
        total(decoder_work(vae.config, 160, 256)).flops for vae in (generator.vae, original)
    )
    assert full > 2 * light
    with pytest.raises(ValueError, match="^height, width: expected multiples of 16, got 100 x 100"):
        random_generator("aapt-small", size=(100, 100))
