"""The figures of a results file beside the targets, and beside what the three models assume.

    python -m benchmarks.targets benchmarks/results/<gpu>/<commit>-first.jsonl

`tools/gpu.py` prints this last. A case that did not pass gives no figure.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from .shapes import TRAINING_CUDA

HOLDS = 0.1  # of a figure: as much worse than assumed still holds
CACHED = "bench_cached_attention.py::test_cached_attention[{}-torch.bfloat16]"
TRAINING = "bench_block_causal_attention.py::test_block_causal_attention[{}-torch.bfloat16-{}]"
APPEND = "bench_kv_append.py::test_kv_append[{}-torch.bfloat16]"
CONVOLUTION = "bench_vae_decoder.py::test_convolution[{}]"
DECODER = "bench_vae_decoder.py::test_steady_step_of_the_light_decoder[{}]"
STEP = "bench_stream.py::test_aapt_8b[{}]"
COPY, L2 = "bench_machine.py::test_copy", "bench_machine.py::test_copy_within_l2"
LAUNCHES = "bench_machine.py::test_launches_of_a_graph"
PRODUCT, HOT_PRODUCT = (f"bench_machine.py::test_bf16_product[{times}]" for times in (1, 50))
TRAINED = "31 x 1196, window 30"
HEADS_24, HEADS_3 = (f"1196 q x 32 frames, {heads} heads" for heads in (24, 3))
LONG = "3600 q x 17 frames, 24 heads"
FRAMES = 4  # video frames of a step


class Missing(Exception):
    """A case that a figure needs has not passed."""


class Figures:
    """The measured results of a file, by a case's id without its folder; none of a dry run."""

    def __init__(self, path: Path):
        self.rows = {}
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # its writer was killed
            if row.get("note", {}).get("dry_run"):
                break
            if row.get("outcome") == "passed" and "result" in row:
                self.rows[row["case"].rsplit("/", 1)[-1]] = row

    def result(self, case: str) -> dict:
        if case not in self.rows:
            raise Missing(case)
        return self.rows[case]["result"]

    def seconds(self, case: str) -> float:
        return 1e-6 * self.result(case)["ours"]["us"]

    def tflops(self, case: str) -> float:
        return self.result(case)["ours"]["tflops"]

    def tb_per_s(self, case: str) -> float:
        return 1e-3 * self.result(case)["ours"]["gb_per_s"]

    def peer_seconds(self, case: str, kind: str, name: str) -> float:
        peers = self.result(case)[kind]
        if "us" not in peers.get(name, {}):
            raise Missing(f"{name} of {case}")
        return 1e-6 * peers[name]["us"]


@dataclass(frozen=True)
class Target:
    """goal, moonshot: in `unit`; a smaller figure is better if `smaller`. figure: None if no case
    measures it yet."""

    what: str
    unit: str
    goal: float
    moonshot: float
    figure: Callable[[Figures], float] | None = None
    smaller: bool = False

    @property
    def sign(self) -> int:
        return -1 if self.smaller else 1


def rate(case: str) -> Callable[[Figures], float]:
    return lambda figures: figures.tflops(case)


def milliseconds(case: str) -> Callable[[Figures], float]:
    return lambda figures: 1e3 * figures.seconds(case)


def share_of_copy(case: str) -> Callable[[Figures], float]:
    """The rate, as a share of the rate of a plain copy of as many bytes."""

    def share(figures: Figures) -> float:
        copy = figures.peer_seconds(case, "ceilings", "a copy of as many bytes")
        return copy / figures.seconds(case)

    return share


def outside(size: str) -> Callable[[Figures], float]:
    """Device milliseconds of a step of aapt-8b outside products and attention."""

    def rest(figures: Figures) -> float:
        phases = figures.result(STEP.format(size))["phases_ms"]
        return sum(phases.values()) - phases["products"] - phases["attention"]

    return rest


def with_decoder(size: str) -> Callable[[Figures], float]:
    """Video frames a second of aapt-8b, its step as a graph if it could be captured."""

    def fps(figures: Figures) -> float:
        step = figures.result(STEP.format(size))
        best = min(step["eager_ms"], step.get("graph_ms", step["eager_ms"]))
        return FRAMES / (1e-3 * best + figures.seconds(DECODER.format(size)))

    return fps


SMALL, LARGE = "416-736", "720-1280"  # height and width, as the cases name them
TFLOPS, COPIED = "TFLOP/s", "of a copy's rate"
TRAINED_FORWARD, TRAINED_BACKWARD = (
    TRAINING.format(TRAINED, direction) for direction in ("forward", "backward")
)
TARGETS = (
    Target(f"cached attention, {HEADS_24}", TFLOPS, 700, 740, rate(CACHED.format(HEADS_24))),
    Target(f"cached attention, {LONG}", TFLOPS, 700, 740, rate(CACHED.format(LONG))),
    Target(f"cached attention, {HEADS_3}", TFLOPS, 640, 700, rate(CACHED.format(HEADS_3))),
    Target("cached attention FP8, 24 heads", TFLOPS, 950, 1100),
    Target("cached attention FP8, 3 to 9 heads", TFLOPS, 800, 1100),
    Target("block-causal attention, forward", TFLOPS, 650, 720, rate(TRAINED_FORWARD)),
    Target("block-causal attention, backward", TFLOPS, 520, 600, rate(TRAINED_BACKWARD)),
    Target(f"kv_append, {HEADS_24}", COPIED, 0.75, 0.9, share_of_copy(APPEND.format(HEADS_24))),
    Target(f"kv_append, {HEADS_3}", COPIED, 0.75, 0.9, share_of_copy(APPEND.format(HEADS_3))),
    Target("light decoder, 736x416", "ms", 8.3, 4.2, milliseconds(DECODER.format(SMALL)), True),
    Target("light decoder, 1280x720", "ms", 26, 13, milliseconds(DECODER.format(LARGE)), True),
    Target("step outside products and attention, 736x416", "ms", 1.5, 1, outside(SMALL), True),
    Target("step outside products and attention, 1280x720", "ms", 3.5, 2, outside(LARGE), True),
    Target("aapt-8b with its decoder, 736x416", "fps", 60, 80, with_decoder(SMALL)),
    Target("aapt-8b with its decoder, 1280x720", "fps", 24, 30, with_decoder(LARGE)),
    Target("aapt-2b, 1280x720", "fps", 60, 90),
    Target("Wan-1.3B's size, 832x480, transformer alone", "fps", 150, 200),
    Target("key to pixel at 24 fps, p50", "ms", 120, 70, smaller=True),
)


@dataclass(frozen=True)
class Assumption:
    """A number that a model assumes or predicts, and the measured one, both in `unit`."""

    model: str
    what: str
    unit: str
    assumed: float
    measured: Callable[[Figures], float]
    smaller: bool = False  # than assumed: the better


def assumptions_of_training() -> Iterator[Assumption]:
    from . import training_model as model

    shape = TRAINING_CUDA[TRAINED]
    predicted = model.predict(shape)
    of_training = partial(Assumption, "training_model")

    def loop(case: str, seconds: float, assumed: float) -> Callable[[Figures], float]:
        """The rate of the inner loop that explains the measured time."""
        return lambda figures: assumed / 1e12 * seconds / figures.seconds(case)

    yield of_training(
        "inner loop of the forward",
        "TFLOP/s",
        model.FORWARD_FLOPS / 1e12,
        loop(TRAINED_FORWARD, predicted.forward.seconds, model.FORWARD_FLOPS),
    )
    yield of_training(
        "inner loop of the backward",
        "TFLOP/s",
        model.BACKWARD_FLOPS / 1e12,
        loop(TRAINED_BACKWARD, predicted.backward_seconds, model.BACKWARD_FLOPS),
    )
    yield of_training(
        "time of the deterministic backward, in backwards",
        "",
        predicted.deterministic / predicted.backward_seconds,
        lambda figures: (
            figures.peer_seconds(TRAINED_BACKWARD, "peers", "ours, deterministic")
            / figures.seconds(TRAINED_BACKWARD)
        ),
        smaller=True,
    )
    yield of_training(
        "bytes around the backward",
        "TB/s",
        model.COPY_RATE * model.PEAK_BYTES / 1e12,
        lambda figures: figures.tb_per_s(COPY),
    )


def assumptions_of_schedule() -> Iterator[Assumption]:
    from . import schedule_model as model

    of_schedule = partial(Assumption, "schedule_model")
    many, few = (model.Shape(1196, (512 + 32 * 1196,), heads) for heads in (24, 3))
    of_many, of_few = model.predict(many), model.predict(few)

    def main_loop(figures: Figures) -> float:
        """FLOP/s of the inner loop at 24 heads, the model's overheads taken off."""
        left = figures.seconds(CACHED.format(HEADS_24)) - of_many.overhead
        return many.flops / (left * of_many.stream_k)

    def overhead(figures: Figures) -> float:
        """Microseconds at 3 heads beyond an inner loop as fast as that at 24."""
        loop = few.flops / (main_loop(figures) * of_few.stream_k)
        return 1e6 * (figures.seconds(CACHED.format(HEADS_3)) - loop)

    yield of_schedule("L2", "TB/s", model.L2_BYTES / 1e12, lambda figures: figures.tb_per_s(L2))
    yield of_schedule(
        f"inner loop at 24 heads, for {model.TARGET_FLOPS / 1e12:.0f} TFLOP/s in all",
        "TFLOP/s",
        of_many.main_loop_flops / 1e12,
        lambda figures: main_loop(figures) / 1e12,
    )
    yield of_schedule(
        "pieces and meetings at 3 heads", "us", 1e6 * of_few.overhead, overhead, smaller=True
    )


def assumptions_of_decoder() -> Iterator[Assumption]:
    from aapt.vae import light

    from . import bench_machine, bench_vae_decoder
    from . import decoder_model as model

    of_decoder = partial(Assumption, "decoder_model")

    def loop(figures: Figures) -> float:
        """The median share of PEAK_FLOPS in the tiles of the plain convolutions."""
        shares = []
        for name in ("128 -> 128", "256 -> 256", "512 -> 512"):
            case = bench_vae_decoder.CONVOLUTIONS[name]
            predicted = predict_convolution(model, case)
            left = figures.seconds(CONVOLUTION.format(name)) - predicted.extra
            shares.append(predicted.flops_floor / (predicted.tiles * left))
        return median(shares)

    def clock(figures: Figures) -> float:
        figures.result(HOT_PRODUCT)
        clocks = figures.rows[HOT_PRODUCT].get("clocks", {}).get("clocks.sm")
        if not clocks:
            raise Missing("nvidia-smi")
        return 1e-3 * clocks[1]

    yield of_decoder(
        "large products",
        "TFLOP/s",
        model.PEAK_FLOPS / 1e12,
        lambda figures: figures.tflops(PRODUCT),
    )
    yield of_decoder(
        "device memory", "TB/s", model.PEAK_BYTES / 1e12, lambda figures: figures.tb_per_s(COPY)
    )
    yield of_decoder("clock under products", "GHz", model.CLOCK / 1e9, clock)
    yield of_decoder(
        "between kernels of a graph",
        "us",
        1e6 * model.LAUNCH_SECONDS,
        lambda figures: 1e6 * figures.seconds(LAUNCHES) / bench_machine.LAUNCHES,
        smaller=True,
    )
    yield of_decoder("inner loop, of large products", "", model.MAIN_LOOP, loop)
    for name, what in (
        ("64 -> 64, normed for the next", "convolution 64 -> 64 with the next norm"),
        ("64 -> 3", "convolution 64 -> 3, taps in the rows"),
    ):
        predicted = predict_convolution(model, bench_vae_decoder.CONVOLUTIONS[name])
        case = CONVOLUTION.format(name)
        yield of_decoder(what, "ms", 1e3 * predicted.seconds, milliseconds(case), smaller=True)
    for name, size in (("736x416", SMALL), ("1280x720", LARGE)):
        height, width = map(int, size.split("-"))
        seconds = sum(m.seconds for _, m in model.predictions(light(), height, width))
        case = DECODER.format(size)
        yield of_decoder(
            f"light decoder, {name}", "ms", 1e3 * seconds, milliseconds(case), smaller=True
        )


def predict_convolution(model, case):
    """The decoder model's prediction for a case of bench_vae_decoder.py without upsampling."""
    import torch

    from aapt.vae import Work
    from aapt.vae.layers import CausalConv3d

    frames, height, width = case.size
    channels, outputs = case.channels
    with torch.device("meta"):
        conv = CausalConv3d(channels, outputs, case.kernel, norm=case.norm, silu=case.silu)
    pixels = frames * height * width
    flops = 2 * conv.weight.numel() * pixels
    past = (case.kernel[0] - 1) * height * width
    moved = 2 * (channels * (pixels + past) + outputs * pixels * (1 + case.residual))
    work = Work("", flops, flops, moved + 2 * conv.weight.numel(), 0, 0)
    written = (not case.next_norm, case.next_norm)
    return model.predict(work, conv, *case.size, outputs=written)


def format_targets(figures: Figures) -> str:
    lines = ["Targets: at least, hoped for, measured"]
    for each in TARGETS:
        line = f"  {each.what}: {each.goal:g}, {each.moonshot:g} {each.unit}, "
        if each.figure is None:
            lines.append(line + "no case yet")
            continue
        number, words = measure(each.figure, figures)
        if number is not None:
            words += ": met" if number * each.sign >= each.goal * each.sign else ": missed"
        lines.append(line + words)
    return "\n".join(lines)


def format_assumptions(figures: Figures) -> str:
    lines = ["Assumptions: assumed, measured"]
    for source in (assumptions_of_training, assumptions_of_schedule, assumptions_of_decoder):
        try:
            assumptions = list(source())
        except Exception as error:  # a broken model must not hide the others
            lines.append(f"  {source.__name__}: {type(error).__name__}: {error}")
            continue
        for each in assumptions:
            line = f"  {each.model}, {each.what}: {each.assumed:.3g} {each.unit}".rstrip() + ", "
            number, words = measure(each.measured, figures)
            if number is not None:
                ratio = each.assumed / number if each.smaller else number / each.assumed
                words += ": holds" if ratio >= 1 - HOLDS else ": does not hold"
            lines.append(line + words)
    return "\n".join(lines)


def measure(figure: Callable[[Figures], float], figures: Figures) -> tuple[float | None, str]:
    """The number, if there is one, and its words, else why there is none."""
    try:
        number = figure(figures)
    except Missing:
        return None, "not measured"
    except Exception as error:  # a result of another form must not hide the others
        return None, f"{type(error).__name__}: {error}"
    return number, f"{number:.3g}"


def main(path: str) -> str:
    figures = Figures(Path(path))
    return f"{format_targets(figures)}\n\n{format_assumptions(figures)}"


if __name__ == "__main__":
    print(main(sys.argv[1]))
