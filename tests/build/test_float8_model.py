"""The prediction of products in 8 bits, by hand and against the step's own prediction."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from aapt.evaluate.breakdown import GPUS, predict_parts
from aapt.evaluate.random_weights import random_generator
from aapt.model.float8 import quantise_blocks

ROOT = str(Path(__file__).parents[2])


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.float8_model")


def test_one_layer_by_hand(model):
    alone, fused = (model.Shape(1196, 3072, 3072, fused) for fused in (False, True))
    flops, gpu = 2 * 1196 * 3072 * 3072, GPUS["h100"]
    assert alone.seconds(gpu) == fused.seconds(gpu) == pytest.approx(flops / 700e12)
    rounding = 1196 * (3072 * 3 + 24 * 4) / 3.0e12 + 2e-6
    assert alone.float8_seconds(gpu) == pytest.approx(flops / 1200e12 + rounding)
    saved = 1196 * (3072 * 1 - 24 * 4) / 3.0e12
    assert fused.float8_seconds(gpu) == pytest.approx(flops / 1200e12 - saved)


def test_it_pays_for_wide_layers_alone(model):
    gains = {row[:2]: row[2] / row[3] for row in model.rows(GPUS["h100"])}
    assert all(gains["aapt-8b, 1280x720", layer] > 1.3 for layer in model.LAYERS)
    assert all(gains["aapt-2b, 1280x720", layer] > 1.1 for layer in model.LAYERS)
    assert gains["tiny-world", "out"] < 1


def test_a_step_has_these_layers(model):
    generator = random_generator("aapt-8b", "meta", torch.bfloat16)
    quantise_blocks(generator.model.transformer)
    found = predict_parts(generator, "h100")
    sums = [
        sum(row[column] for row in model.rows(GPUS["h100"]) if row[0] == "aapt-8b, 736x416")
        for column in (2, 3)
    ]
    depth = generator.model.config.depth
    rounding = depth * 1e-3 * sums[1] - found.parts["products"]
    moved = depth * 1196 * 3072 * ((3 + 4 / 128) - 6 * (1 - 4 / 128)) / 3.0e12 + depth * 2e-6
    assert rounding == pytest.approx(1e3 * moved, rel=1e-6)
