"""The page of targets and assumptions, on results worked out by hand."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def targets(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.targets")


@pytest.fixture
def page(targets, tmp_path):
    """page({case: result}): the lines of the page, by what they are about."""

    def make(results: dict, **facts) -> dict[str, str]:
        path = tmp_path / "results.jsonl"
        rows = [
            {"case": f"benchmarks/{case}", "outcome": "passed", "result": result, **facts}
            for case, result in results.items()
        ]
        path.write_text("\n".join(map(json.dumps, rows)) + '\n{"case": "cut sho')
        lines = targets.main(str(path)).splitlines()
        return dict(line.strip().split(": ", 1) for line in lines if line.startswith("  "))

    return make


def timed(us, **rates):
    return {"ours": {"us": us, **rates}, "peers": {}, "ceilings": {}}


def test_a_rate_is_held_against_its_target(targets, page):
    case = targets.CACHED.format(targets.HEADS_24)
    what = f"cached attention, {targets.HEADS_24}"
    assert page({case: timed(900, tflops=702.4)})[what] == "700, 740 TFLOP/s, 702: met"
    assert page({case: timed(900, tflops=699)})[what] == "700, 740 TFLOP/s, 699: missed"
    assert page({})[what] == "700, 740 TFLOP/s, not measured"


def test_a_time_is_held_against_its_target(targets, page):
    case = targets.DECODER.format(targets.SMALL)
    assert page({case: timed(8200)})["light decoder, 736x416"] == "8.3, 4.2 ms, 8.2: met"
    assert page({case: timed(8400)})["light decoder, 736x416"] == "8.3, 4.2 ms, 8.4: missed"


def test_a_share_of_the_copy(targets, page):
    result = timed(20) | {"ceilings": {"a copy of as many bytes": {"us": 16.0}}}
    line = page({targets.APPEND.format(targets.HEADS_3): result})[f"kv_append, {targets.HEADS_3}"]
    assert line == "0.75, 0.9 of a copy's rate, 0.8: met"


def test_a_step_with_its_decoder(targets, page):
    """50 ms as a graph and 10 ms of decoding are four frames in 60 ms."""
    phases = {"attention": 20.0, "kv_append": 0.5, "products": 28.0, "the rest": 1.5}
    step = {"eager_ms": 70.0, "graph_ms": 50.0, "phases_ms": phases}
    lines = page(
        {
            targets.STEP.format(targets.SMALL): step,
            targets.DECODER.format(targets.SMALL): timed(10_000),
        }
    )
    assert lines["aapt-8b with its decoder, 736x416"] == "60, 80 fps, 66.7: met"
    assert lines["step outside products and attention, 736x416"] == "1.5, 1 ms, 2: missed"
    assert lines["aapt-8b with its decoder, 1280x720"] == "24, 30 fps, not measured"


def test_a_case_that_failed_gives_no_figure(targets, page):
    lines = page({targets.PRODUCT: timed(1, tflops=800)}, outcome="failed")
    assert lines["decoder_model, large products"] == "790 TFLOP/s, not measured"


def test_an_assumption_holds_within_a_tenth(targets, page):
    def line(tb_per_s):
        results = {targets.COPY: timed(1, gb_per_s=1e3 * tb_per_s)}
        return page(results)["decoder_model, device memory"]

    assert line(3.9) == "4.3 TB/s, 3.9: holds"
    assert line(5.0) == "4.3 TB/s, 5: holds"
    assert line(3.0) == "4.3 TB/s, 3: does not hold"


def test_the_clock_is_that_of_the_long_product(targets, page):
    facts = {"clocks": {"clocks.sm": [345.0, 1410.0]}}
    lines = page({targets.HOT_PRODUCT: timed(1, tflops=700)}, **facts)
    assert lines["decoder_model, clock under products"] == "1.5 GHz, 1.41: holds"
    lines = page({targets.HOT_PRODUCT: timed(1, tflops=700)})
    assert lines["decoder_model, clock under products"] == "1.5 GHz, not measured"


def test_what_the_models_predict_is_what_they_assume(targets, page, monkeypatch):
    """A device that does exactly as predicted meets every assumption behind the prediction."""
    training = import_module("benchmarks.training_model").predict(
        targets.TRAINING_CUDA[targets.TRAINED]
    )
    schedule = import_module("benchmarks.schedule_model")
    decoder = import_module("benchmarks.decoder_model")
    cases = import_module("benchmarks.bench_vae_decoder").CONVOLUTIONS
    backward = timed(1e6 * training.backward_seconds)
    backward["peers"]["ours, deterministic"] = {"us": 1e6 * training.deterministic}
    results = {
        targets.TRAINED_FORWARD: timed(1e6 * training.forward.seconds),
        targets.TRAINED_BACKWARD: backward,
    }
    shapes = {heads: schedule.Shape(1196, (512 + 32 * 1196,), heads) for heads in (24, 3)}
    loop_flops = schedule.predict(shapes[24]).main_loop_flops
    for name, heads in ((targets.HEADS_24, 24), (targets.HEADS_3, 3)):
        shape = shapes[heads]
        model = schedule.predict(shape)
        seconds = shape.flops / (loop_flops * model.stream_k) + model.overhead
        results[targets.CACHED.format(name)] = timed(1e6 * seconds, tflops=1)
    for name, case in cases.items():
        if case.upsample == (1, 1):
            seconds = targets.predict_convolution(decoder, case).seconds
            results[targets.CONVOLUTION.format(name)] = timed(1e6 * seconds)
    lines = page(results)
    for assumption in (
        "training_model, inner loop of the forward",
        "training_model, inner loop of the backward",
        "training_model, time of the deterministic backward, in backwards",
        "schedule_model, inner loop at 24 heads, for 620 TFLOP/s in all",
        "schedule_model, pieces and meetings at 3 heads",
        "decoder_model, inner loop, of large products",
        "decoder_model, convolution 64 -> 3, taps in the rows",
    ):
        assert re.fullmatch(r"([\d.]+)( \S+)?, \1: holds", lines[assumption]), lines[assumption]


def test_a_broken_model_does_not_hide_the_others(targets, page, monkeypatch):
    def broken():
        raise ImportError("no model")

    monkeypatch.setattr(targets, "assumptions_of_schedule", broken)
    lines = page({})
    assert lines["broken"] == "ImportError: no model"
    assert lines["decoder_model, large products"] == "790 TFLOP/s, not measured"


def test_a_convolution_costs_what_the_layer_of_the_decoder_costs(targets):
    """`predict_convolution` against the decoder's own layers: 128 to 128 channels, two frames."""
    from aapt.vae import light

    decoder = import_module("benchmarks.decoder_model")
    case = import_module("benchmarks.bench_vae_decoder").CONVOLUTIONS["512 -> 512"]
    predicted = targets.predict_convolution(decoder, case)
    layers = {
        round(model.kernel, 9)
        for work, model in decoder.predictions(light(), 416, 736)
        if work.flops == 2 * 512 * 512 * 27 * 52 * 92
    }
    assert round(predicted.kernel, 9) in layers
