"""The bundled decoder in 8 bits: bars for its pixels, planted bugs, and the prediction by hand."""

from importlib import import_module
from pathlib import Path

import pytest

from aapt.evaluate.breakdown import GPUS, decode_seconds
from aapt.vae import float8
from aapt.vae.config import light
from aapt.vae.cost import decoder_work
from aapt.vae.folder import LIGHT

ROOT = str(Path(__file__).parents[2])
BAR = 55  # dB against bfloat16, of the inner layers


@pytest.fixture
def decoder(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.float8_decoder")


def inner_layers(decoder) -> float:
    found = decoder.measure(LIGHT, clips=1, steps=1)
    return next(lost for name, lost, _ in found if name == "inner layers")


def test_the_light_decoder_keeps_its_picture(decoder):
    found = {name: rest for name, *rest in decoder.measure(LIGHT, clips=1, steps=2)}
    (same, plain), (whole, _) = found["no layer"], found["all layers"]
    inner, quality = found["inner layers"]
    assert same == float("inf") and inner > BAR and plain - quality < 0.05
    assert inner > whole + 5  # the ends lose more: they read latents or make pixels
    single = [lost for name, (lost, _) in found.items() if name.startswith("layers.")]
    assert len(single) == 6 and min(single) > inner


@pytest.mark.parametrize(
    "plant",
    [
        lambda values, scales: (values, 1.3 * scales),
        lambda values, scales: (values, scales.roll(1)),
        lambda values, scales: (values.float().flip(2).to(values.dtype), scales),
    ],
    ids=["scales too large", "scales of other channels", "taps in time reversed"],
)
def test_a_planted_bug_is_seen(decoder, monkeypatch, plant):
    right = float8.round_weight
    monkeypatch.setattr(float8, "round_weight", lambda weight: plant(*right(weight)))
    assert inner_layers(decoder) < BAR


def test_the_prediction_in_bfloat16_is_that_of_a_step(decoder):
    gpu = GPUS["h100"]
    plain, rounded = decoder.predict(light(), 720, 1280, gpu)
    assert plain == pytest.approx(decode_seconds(decoder_work(light(), 720, 1280), gpu))
    assert 0.5 * plain < rounded < 0.7 * plain
