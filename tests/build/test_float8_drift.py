"""The comparison of streams in 8 bits: each variant is what its name says, and a second of it."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from aapt.evaluate import metrics
from aapt.model.float8 import Float8Linear

ROOT = str(Path(__file__).parents[2])


@pytest.fixture
def drift(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.float8_drift")


def test_variants_are_what_they_say(drift):
    found = {}
    for variant in drift.VARIANTS:
        generator = variant.generator()
        transformer = generator.model.transformer
        cache = transformer.new_cache(1, generator.latent_size, dtype=torch.bfloat16)
        layers = sum(isinstance(x, Float8Linear) for x in transformer.modules())
        found[variant.name] = (transformer.video_in.weight.dtype, layers > 0, cache.k.dtype)
    bf16, e4m3 = torch.bfloat16, torch.float8_e4m3fn
    assert found == {
        "float32": (torch.float32, False, bf16),
        "bfloat16": (bf16, False, bf16),
        "bfloat16, other noise": (bf16, False, bf16),
        "e4m3 linear": (bf16, True, bf16),
        "e4m3 linear and cache": (bf16, True, e4m3),
    }


def test_eight_bits_are_further_from_bfloat16_than_bfloat16_from_float32(drift):
    videos = {v.name: drift.stream(v, 1, 1) for v in drift.VARIANTS}
    lost = {name: metrics.psnr(video, videos["bfloat16"]) for name, video in videos.items()}
    assert videos["float32"].shape[:3] == (1, 1, 2)
    assert lost["float32"] > lost["e4m3 linear"] + 3 and lost["e4m3 linear"] > 30
    assert lost["e4m3 linear and cache"] > 30
    assert not torch.equal(videos["e4m3 linear"], videos["e4m3 linear and cache"])


def test_the_truth_does_not_drift(drift):
    truth = drift.render(worlds=2, seconds=3)
    assert drift.drift(truth, truth, 1, 3) == drift.Drift(0.0, 0.0, 1.0)
    dark = drift.drift(truth // 2, truth, 2, 3)
    assert dark.features > 1 and dark.palette > 0.1
    assert dark.sharpness == pytest.approx(0.5, abs=0.02)


def test_the_table(drift, monkeypatch, capsys):
    video = torch.zeros(1, 6, 2, 24, 24, 3, dtype=torch.uint8)
    video[..., ::2, :] = 255
    monkeypatch.setattr(drift, "render", lambda *_: video)
    monkeypatch.setattr(drift, "stream", lambda variant, *_: video // (1 + variant.seed))
    monkeypatch.setattr("sys.argv", ["float8_drift", "--worlds", "1", "--seconds", "6"])
    drift.main()
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("PSNR in dB beside bfloat16, 1 worlds;")
    assert rows[2] == "| | 1 s | 2 s | 3 s | 5 s | 3 to 6 s |"
    assert rows[4] == "| bfloat16 | inf | inf | inf | inf | 0.00, 0.00, 1.00 |"
    assert rows[6].startswith("| bfloat16, other noise | 9.0 | 9.0") and len(rows) == 4 + 5
