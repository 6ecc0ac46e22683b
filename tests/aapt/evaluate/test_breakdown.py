"""The parts of a step: every operation in its part, and figures that can be counted by hand."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aapt import Control, StreamingGenerator
from aapt.evaluate import breakdown
from aapt.evaluate.breakdown import (
    GPUS,
    PARTS,
    Gpu,
    PaperRanks,
    Parts,
    has_kernel,
    kernel_microseconds,
    measure_parts,
    predict_parts,
    predicted_on,
    timed,
)
from aapt.evaluate.random_weights import random_generator
from aapt.model.config import SamplingConfig
from aapt.model.float8 import quantise_blocks
from aapt.vae.cost import decoder_work

from ..streaming.few_step_generator import build as build_few_step
from ..streaming.test_generator import HEIGHT, WIDTH, build

OPS = torch.ops.aten
ROUND = Gpu(
    products=1e6,
    attention=1e6,
    convolutions=1e6,
    memory=1e9,
    float8_products=2e6,
    float8_attention=3e6,
    link=1e6,
    gap=0.0,
)


@pytest.fixture
def stream():
    model, vae = build()
    generator = StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH, prompts=["ab"])
    return generator.open(np.zeros((HEIGHT, WIDTH, 3), np.uint8), "ab")


@pytest.fixture
def on_paper():
    """A generator without memory, in the precision of a GPU."""
    model, vae = build()
    return StreamingGenerator(
        model.bfloat16().to("meta"), vae.bfloat16().to("meta"), height=HEIGHT, width=WIDTH
    )


def test_parts_and_what_is_left_are_the_whole_step(stream):
    expected = stream.fork()
    found = measure_parts(stream, Control(forward=1.0), steps=2)
    assert found.how == "measured on cpu" and list(found.parts) == list(PARTS)
    assert all(value > 0 for value in found.parts.values())
    assert found.step == pytest.approx(sum(found.parts.values()) + found.idle)
    assert found.text > 0 and found.blocks == 3
    assert found.as_json()["sum_of_parts"] == pytest.approx(sum(found.parts.values()))
    # Watching changes nothing: four steps were made, half of them watched
    for _ in range(4):
        expected.step(Control(forward=1.0))
    control = Control(yaw=0.5)
    assert np.array_equal(stream.step(control), expected.step(control))


def test_on_a_device_a_profile_of_steps_without_a_graph_tells_the_parts(stream, monkeypatch):
    """The CPU stands in for a device: an operation's kernels are the operation itself."""
    expected, synchronised = stream.fork(), []
    monkeypatch.setattr(StreamingGenerator, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronised.append)
    monkeypatch.setattr(breakdown, "kernel_microseconds", lambda event: event.cpu_time_total)
    monkeypatch.setattr(breakdown, "PROFILED_STEPS", 2)
    found = measure_parts(stream, Control(forward=1.0), steps=3)
    assert found.how == "measured on cuda" and list(found.parts) == list(PARTS)
    copied = found.parts.pop("copy")  # by NumPy, without an operation, on a CPU
    assert copied >= 0 and all(value > 0 for value in found.parts.values())
    assert found.step == pytest.approx(sum(found.parts.values()) + copied + found.idle)
    assert len(synchronised) == 3 + 1  # whole steps and the text
    monkeypatch.undo()
    for _ in range(3 + 2):
        expected.step(Control(forward=1.0))
    control = Control(yaw=0.5)
    assert np.array_equal(stream.step(control), expected.step(control))


def test_the_time_of_kernels_is_that_of_all_operations_in_a_range():
    """A range holds an operation with two kernels, and that one an operation with a third; the
    device's twin of the range, which spans all of them, does not count."""

    def event(durations, *children, annotation=False):
        kernels = [SimpleNamespace(duration=duration) for duration in durations]
        return SimpleNamespace(
            kernels=kernels, cpu_children=list(children), is_user_annotation=annotation
        )

    operation = event([3.0, 4.0], event([5.0]))
    assert kernel_microseconds(event([20.0], operation, event([]), annotation=True)) == 12.0


def test_a_time_goes_to_the_part_of_its_operation(stream):
    """A clock that gives one second to one kind of operation alone."""
    transformer = stream.generator.model.transformer

    def seconds_of(chosen):
        def cost(function, *args, **kwargs):
            return function(*args, **kwargs), float(function._schema.name == chosen)

        parts = Parts(transformer, cost)
        with stream.watched(parts.phase), parts:
            stream.step(Control())
        found = {name: value for name, value in parts.seconds.items() if name != "copy"}
        return {name: value for name, value in found.items() if value}

    assert seconds_of("aapt::cached_attention") == {"attention": 3}
    assert seconds_of("aapt::kv_append") == {"fused": 3}
    assert set(seconds_of("aapt::causal_conv3d")) == {"decode"}
    linear = seconds_of("aten::linear")
    assert linear["products"] == 3 * 4  # qkv, out, up, down
    assert linear["patchify"] >= 2 and set(linear) == {"products", "patchify"}
    assert set(seconds_of("aten::log")) == {"noise"}
    assert seconds_of("aapt::bias_gelu") == {"fused": 3}


class Slow(PaperRanks):
    """Two ranks of which the other sends nothing until a clock has moved by 10 seconds."""

    def __init__(self, clock):
        super().__init__(2)
        self.clock = clock

    def _exchange(self, pieces, shapes):
        with self._section():
            self.clock.now += 10
            return super()._exchange(pieces, shapes)


def test_the_wait_for_other_ranks_is_in_the_exchange(stream, monkeypatch):
    """Two exchanges per block and one at the end, which nothing else is given for."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(breakdown.time, "perf_counter", lambda: clock.now)
    slow = Slow(clock)
    stream.generator.share_tokens(slow)
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    with stream.generator.open(picture, "ab") as shared:
        slow.exchanges = 0
        found = breakdown.timed_step(shared, Control())
        assert found.seconds == dict.fromkeys(PARTS, 0.0) | {"exchange": 10.0 * 7}
        assert slow.exchanges == 2 * 3 + 1
        shared.step(Control())
        assert found.seconds["exchange"] == 70.0  # nobody watches any more


def test_views_and_empty_memory_are_no_kernels():
    for function, expected in [
        (OPS.view.default, False),
        (OPS.t.default, False),
        (OPS.empty.memory_format, False),
        (OPS.add.Tensor, True),
        (OPS.copy_.default, True),
        (torch.ops.aapt.kv_append.default, True),
    ]:
        assert has_kernel(function) == expected, function


def test_a_prediction_is_the_larger_of_arithmetic_and_traffic():
    cost = predicted_on(ROUND)
    x, weight = (torch.empty(*size, device="meta") for size in ((2, 3, 8), (5, 8)))
    out, seconds = cost(OPS.linear.default, x, weight)
    assert out.shape == (2, 3, 5) and seconds == 2 * 2 * 3 * 8 * 5 / 1e6
    moved = 4 * (2 * 3 * 8 + 5 * 8 + 2 * 3 * 5)
    slow = predicted_on(dataclasses.replace(ROUND, memory=1e3))
    assert slow(OPS.linear.default, x, weight)[1] == moved / 1e3
    assert cost(OPS.view.default, x, [48])[1] == 0.0
    assert cost(OPS.add.Tensor, x, x)[1] == 3 * x.nbytes / 1e9


def test_a_prediction_follows_the_model(on_paper, monkeypatch):
    monkeypatch.setitem(GPUS, "round", ROUND)
    found, config = predict_parts(on_paper, "round"), on_paper.model.config
    assert found.how == "predicted for round" and list(found.parts) == list(PARTS)
    tokens, width, ratio = (HEIGHT // 16) * (WIDTH // 16), config.width, config.mlp_ratio
    products = 3 * 2 * tokens * width**2 * (4 + 2 * ratio)
    assert found.parts["products"] == pytest.approx(1e3 * products / 1e6)
    keys = config.text_tokens + (1 + config.window_frames + 1) * tokens
    attention = 3 * 4 * tokens * keys * width
    assert found.parts["attention"] == pytest.approx(1e3 * attention / 1e6)
    works = decoder_work(on_paper.vae.config, HEIGHT, WIDTH)
    decode = sum(max(work.folded_flops / 1e6, work.bytes / 1e9) for work in works)
    assert found.parts["decode"] == pytest.approx(1e3 * decode)
    assert found.parts["copy"] == pytest.approx(1e3 * 4 * 3 * HEIGHT * WIDTH / 1e6)
    beside = sum(found.parts.values()) - found.parts["copy"]
    assert found.idle == 0 and found.step == pytest.approx(beside)
    monkeypatch.setitem(GPUS, "round", dataclasses.replace(ROUND, gap=1.0))
    gaps = predict_parts(on_paper, "round")
    assert gaps.idle == 1e3 * (found.kernels + len(works))
    assert gaps.step == pytest.approx(beside + gaps.idle)
    assert found.text > 0 and found.kernels > 3 * 10


def test_products_in_8_bits_are_predicted_as_they_run(monkeypatch):
    """One more launch per block, which reads 2 bytes and writes 1 and a scale for 128 of what
    attention returns; norms and GELU write that instead of 2 bytes."""
    monkeypatch.setitem(GPUS, "round", ROUND)
    generator = random_generator("aapt-small", "meta", torch.bfloat16)
    config, tokens = generator.model.config, 160
    plain = predict_parts(generator, "round")
    quantise_blocks(generator.model.transformer)
    found = predict_parts(generator, "round", float8_attention=True)
    products = 2 * tokens * config.depth * 12 * config.width**2
    assert plain.parts["products"] == pytest.approx(1e3 * products / ROUND.products)
    assert found.parts["products"] == pytest.approx(1e3 * products / ROUND.float8_products)
    ratio = ROUND.attention / ROUND.float8_attention
    assert found.parts["attention"] == pytest.approx(ratio * plain.parts["attention"])
    assert found.kernels == plain.kernels + config.depth
    numbers = config.depth * tokens * config.width
    moved = numbers * ((2 + 1 + 4 / 128) + (1 + 1 + 4) * (1 + 4 / 128 - 2))
    assert found.parts["fused"] - plain.parts["fused"] == pytest.approx(1e3 * moved / ROUND.memory)
    assert set(found.assumptions) == {*PARTS, "idle", "text"} == set(plain.assumptions)
    assert "BF16" in plain.assumptions["products"] and "e4m3" in found.assumptions["products"]


def test_ranks_divide_products_and_attention_and_exchange_the_rest(monkeypatch):
    """Two GPUs: half the tokens in products, half the heads in attention, two exchanges a block."""
    monkeypatch.setitem(GPUS, "round", ROUND)
    one, two = (
        predict_parts(random_generator("aapt-small", "meta", torch.bfloat16), "round", ranks=ranks)
        for ranks in (1, 2)
    )
    for part in ("products", "attention"):
        assert two.parts[part] == pytest.approx(one.parts[part] / 2), part
    assert two.parts["decode"] == one.parts["decode"] and "exchange" not in one.parts
    # Of a rank's 80 tokens: q, k and v, then what was attended to; last 64 numbers of all tokens
    sent = 4 * 2 * 80 * (3 * 128 + 128) + 2 * 80 * 64
    expected = sent / ROUND.peers + (2 * 4 + 1) * ROUND.exchange
    assert two.parts["exchange"] == pytest.approx(1e3 * expected)
    assert "9 exchanges" in two.assumptions["exchange"]
    with pytest.raises(ValueError, match="^context: expected a divisor of the model's 2 heads, "):
        predict_parts(random_generator("aapt-small", "meta", torch.bfloat16), "round", ranks=3)


def test_other_devices_and_gpus_are_refused(stream, on_paper):
    with pytest.raises(ValueError, match="^predict: expected one of h100, h200, got h300$"):
        predict_parts(on_paper, "h300")
    on_paper.sampling = SamplingConfig(steps=4, shift=1.0, guidance=2.0)
    with pytest.raises(ValueError, match="^predict: expected a model of one pass .* of 8 passes;"):
        predict_parts(on_paper, "h100")
    few_step = build_few_step(1, None, 1, 3)
    with pytest.raises(ValueError, match="^predict: .* of 3 passes; measure a few-step model with"):
        predict_parts(few_step, "h100")
    stream.generator.vae.to("meta")
    with pytest.raises(ValueError, match="^breakdown: expected a model on the CPU or a CUDA"):
        measure_parts(stream, Control(), 1)


def test_an_operation_takes_the_time_that_it_takes():
    out, seconds = timed(torch.add, torch.ones(2), 1)
    assert out.tolist() == [2, 2] and seconds > 0
