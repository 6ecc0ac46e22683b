"""Ways to make frames: what each runs, against counts by hand and the real rollouts."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aapt import StreamingGenerator
from aapt.evaluate import methods
from aapt.evaluate.breakdown import GPUS, Gpu, decode_seconds
from aapt.evaluate.methods import (
    METHODS,
    Network,
    measure_methods,
    networks,
    paired,
    predict_methods,
    report,
    shift_ring,
)
from aapt.evaluate.published import PUBLISHED
from aapt.model.config import FewStepConfig
from aapt.streaming.few_step import FewStepRollout
from aapt.streaming.student import StudentRollout
from aapt.vae import CausalVAE
from aapt.vae.cost import decoder_work

from ..helpers import CONFIG, SIZE, tiny_model, wan_transformer
from ..streaming.test_generator import HEIGHT, VAE, WIDTH, build

TOKENS = SIZE[0] * SIZE[1] // CONFIG.patch**2
BY_NAME = {method.name: method for method in METHODS}
# Frames of every pass of a run
PASSES = {
    "AAPT": [1],
    "one-step diffusion forcing": [2],
    "1 step and refresh": [1, 1],
    "4 steps and refresh": [3] * 5,
    "4 steps and refresh, shifted": [3] * 5,
    "4 steps, context rebuilt": [3] * 5,
    "AAPT, shifted": [1],
}


class Attentions(TorchDispatchMode):
    """Records the frames of the queries of each attention."""

    def __init__(self):
        super().__init__()
        self.frames = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aapt::cached_attention":
            self.frames.append(args[0].shape[1] // TOKENS)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def network():
    return Network(tiny_model().transformer, SIZE)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_run_makes_the_passes_that_its_line_counts(network, method):
    network.model.config = dataclasses.replace(CONFIG, window_frames=4)
    network = Network(network.model, SIZE)
    with Attentions() as seen:
        latent = method.run(network)
    assert latent.shape[2] == method.frames and latent.isfinite().all()
    assert seen.frames == [n for n in PASSES[method.name] for _ in range(CONFIG.depth)]


def test_a_float8_cache_runs_every_method_and_a_float8_past_none():
    model, vae = build()
    generator = StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH)
    generator.use_cache("float8")
    made = networks(generator)
    for method in METHODS:
        cache = made[method.sees_context].cache
        assert cache.k.dtype == torch.float8_e4m3fn and cache.k.float().std() > 0.5
        assert method.run(made[method.sees_context]).isfinite().all()
    generator.use_cache("float8-past")
    expected = "^cache: expected model or float8 for methods of several frames per pass, got "
    with pytest.raises(ValueError, match=expected + "float8-past, which takes one$"):
        networks(generator)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_ring_advances_by_the_frames_that_stay(network, method):
    before = int(network.cache.step)
    method.run(network)
    after = methods.CONTEXT if method.sees_context else before + method.frames
    assert int(network.cache.step) == after


def test_aapt_is_the_step_of_a_stream(network):
    first = network.clean[:, :, :1]
    rollout = StudentRollout(network.model, None, None, first)
    rollout.cache.load(network.cache)
    condition = network.condition[:, :, :1]
    expected = rollout.step(network.noise[:, :, :1], first, condition)
    torch.testing.assert_close(BY_NAME["AAPT"].run(network), expected)
    torch.testing.assert_close(network.cache.k, rollout.cache.k)


@pytest.mark.parametrize(("name", "times"), [("1 step and refresh", 1), ("4 steps and refresh", 4)])
def test_passes_with_refresh_are_those_of_a_few_step_model(name, times):
    model = wan_transformer(chunk=1 if times == 1 else 3, window_frames=4)
    network, method = Network(model, SIZE), BY_NAME[name]
    text = torch.randn(1, CONFIG.text_tokens, CONFIG.text_width, dtype=torch.float64)
    sampling = FewStepConfig(methods.TIMES[:times])
    rollout = FewStepRollout(model, text, torch.tensor([6]), SIZE, sampling)
    rollout.cache.k.copy_(network.cache.k)
    rollout.cache.v.copy_(network.cache.v)
    rollout.cache.step.copy_(network.cache.step)
    network.cache = rollout.cache.clone()
    noise = network.noise[:, :, : method.frames].expand(times, -1, -1, -1, -1, -1)
    torch.testing.assert_close(method.run(network), rollout.step(noise))
    torch.testing.assert_close(network.cache.v, rollout.cache.v)


def test_each_frame_of_a_pair_has_its_own_time(network):
    """Two equal times are one; two others modulate each frame for itself."""
    pair = network.noise[:, :, :2]
    first, last = network.start, network.times[0]
    same = network.run(pair, paired(last, last), advance=False)
    torch.testing.assert_close(same, network.run(pair, last, advance=False))
    shift, scale, *_ = paired(first, last).constants.modulation[0]
    assert torch.equal(shift[:, :1], first.constants.modulation[0][0])
    assert torch.equal(scale[:, 1:], last.constants.modulation[0][1])
    assert not torch.equal(network.run(pair, paired(first, last), advance=False), same)


def test_a_shift_moves_the_ring_and_nothing_else(network):
    cache, begin = network.cache, CONFIG.text_tokens + TOKENS
    before = [x.clone() for x in (cache.k, cache.v)]
    shift_ring(network, 1)
    for x, old in zip((cache.k, cache.v), before, strict=True):
        assert torch.equal(x[:, :, :begin], old[:, :, :begin])
        assert torch.equal(x[:, :, begin:-TOKENS], old[:, :, begin + TOKENS :])
        assert torch.equal(x[:, :, -TOKENS:], old[:, :, -TOKENS:])


def test_a_rebuilt_context_is_all_that_a_chunk_sees():
    model, vae = build()
    generator = StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH)
    narrow = networks(generator)[True]
    assert narrow.cache.capacity == CONFIG.text_tokens + 6 * narrow.cache.tokens_per_frame
    assert narrow.model.blocks is model.transformer.blocks
    assert model.config.window_frames == model.transformer.config.window_frames == 2
    model.transformer.config = dataclasses.replace(model.config, window_frames=1)
    with pytest.raises(ValueError, match="^model: expected a window of 2 frames or more, got 1; "):
        networks(generator)


def test_a_report_divides_by_frames_and_adds_a_decoder():
    seconds = np.array([[1.0, 2.0, 2.0, 15.0, 18.0, 6.0, 1.5, 1.0, 3.0]]) / 1e3
    found = report("by hand", seconds)
    assert found["decoder_ms"] == pytest.approx({"light": 1.0, "original": 3.0})
    rows = {row["name"]: row for row in found["methods"]}
    four = rows["4 steps and refresh"]
    assert (four["chunk_ms"], four["frame_ms"]) == pytest.approx((15.0, 5.0))
    assert four["ratio"] == pytest.approx(5.0)
    assert four["ratio_with_light"] == pytest.approx((5 + 1) / (1 + 1))
    assert four["ratio_with_original"] == pytest.approx((5 + 3) / (1 + 3))
    assert rows["4 steps, context rebuilt"]["ratio"] == pytest.approx(2.0)
    assert rows["AAPT"]["ratio_with_original"] == 1.0
    # Ratios pair times of one round: a round that is slow as a whole changes none
    slow = report("by hand", np.concatenate([seconds, 10 * seconds, 10 * seconds]))
    assert [row["ratio"] for row in slow["methods"]] == pytest.approx(
        [row["ratio"] for row in found["methods"]]
    )


def test_measured_rounds_name_every_method():
    model, vae = build()
    generator = StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH)
    found = measure_methods(generator, CausalVAE(VAE).eval(), rounds=1)
    assert found["how"] == "measured on cpu, 1 rounds"
    assert [row["name"] for row in found["methods"]] == list(PASSES)
    assert all(row["frame_ms"] > 0 and row["ratio"] > 0 for row in found["methods"])


def test_predicted_products_follow_the_passes(monkeypatch):
    """With attention and memory for nothing, time is that of products: passes times frames."""
    free = 1e30
    gpu = Gpu(products=1e9, attention=free, convolutions=1e9, memory=free, gap=0.0)
    monkeypatch.setitem(GPUS, "products", gpu)
    model, vae = build()
    generator = StreamingGenerator(
        model.bfloat16().to("meta"), vae.bfloat16().to("meta"), height=HEIGHT, width=WIDTH
    )
    found = predict_methods(generator, CausalVAE(VAE), "products")
    assert found["how"] == "predicted for products"
    for row in found["methods"]:
        assert row["ratio"] == pytest.approx(sum(PASSES[row["name"]]) / row["frames"], rel=1e-9)
    expected = 1e3 * decode_seconds(decoder_work(VAE, HEIGHT, WIDTH), gpu)
    assert found["decoder_ms"]["original"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="^predict: expected one of h100, h200, products, got x$"):
        predict_methods(generator, vae, "x")


def test_every_published_figure_has_a_source_and_an_omission():
    assert len({each.system for each in PUBLISHED}) == len(PUBLISHED) >= 8
    for each in PUBLISHED:
        assert all(len(value) > 5 for value in dataclasses.astuple(each)[1:]), each
