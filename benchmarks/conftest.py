"""`against` times a function and its rivals alternately in one process, and prints the ratios.

    pytest benchmarks                                        # the CPU backends
    pytest benchmarks/bench_cached_attention.py --device cuda
    pytest benchmarks/bench_cached_attention.py --device dry    # the GPU's cases, cut down to a CPU
    pytest benchmarks --device cuda --quick     # ten rounds, no peer that has to be compiled

Tests that take `shape` and `dtype` get those of `shapes.py` for the device.
"""

import time
from typing import NamedTuple

import pytest
import torch

from aapt_kernels.testing import time_by_turns

from .peers import Compiled, attempt
from .shapes import dtypes_for, shapes_for

LARGEST_DIFFERENCE = 2e-2  # between ours and a rival, relative L2


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda", "dry"), default="cpu")
    parser.addoption("--quick", action="store_true", help="ten rounds, no compiled peers")


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("device")
    if {"shape", "dtype"} <= set(metafunc.fixturenames):
        shapes = shapes_for(device)
        metafunc.parametrize("shape", shapes.values(), ids=shapes)
        metafunc.parametrize("dtype", dtypes_for(device), ids=str)


@pytest.fixture
def mode(request) -> str:
    """cpu, cuda or dry."""
    return request.config.getoption("device")


@pytest.fixture
def device(mode) -> torch.device:
    return torch.device("cuda" if mode == "cuda" else "cpu")


@pytest.fixture(autouse=True)
def random_numbers():
    torch.manual_seed(0)


class Work(NamedTuple):
    """The least work of a function: floating-point operations and bytes, padding not counted."""

    flops: float = 0
    bytes: float = 0

    def rates(self, seconds: float) -> dict[str, float]:
        rates = {}
        if self.flops:
            rates["tflops"] = self.flops / seconds / 1e12
        if self.bytes:
            rates["gb_per_s"] = self.bytes / seconds / 1e9
        return rates


@pytest.fixture
def against(request, benchmark, capsys, mode, device, record_property):
    """against(ours, {name: rival}, rounds, iterations, work, ceilings): compare `ours` with others.

    On the CPU pytest-benchmark times `ours`; before each of its rounds every rival runs once, so
    that all of them meet the same machine. The printed ratio, also in extra_info, is the rival's
    best time over ours: above 1 we are faster. On a GPU all are timed there (`time_by_turns`), with
    medians, and pytest-benchmark shows what a call costs the host. A rival that fails is recorded
    with its words; so is the relative L2 difference of its output, if any, from ours. `ceilings` do
    less than ours, as fast as the machine can.
    """
    quick = request.config.getoption("quick")

    def on_cpu(ours, rivals, rounds=10, iterations=1, work=None, ceilings=None):
        del work
        rivals = rivals | (ceilings or {})
        times = {name: [] for name in rivals}

        def rivals_once():
            for name, rival in rivals.items():
                start = time.perf_counter()
                for _ in range(iterations):
                    rival()
                times[name].append((time.perf_counter() - start) / iterations)

        def several():
            for _ in range(iterations):
                ours()

        benchmark.pedantic(several, setup=rivals_once, rounds=rounds, warmup_rounds=2)
        if not benchmark.enabled:
            return
        best = benchmark.stats.stats.min / iterations
        with capsys.disabled():
            print(f"\n{benchmark.name}: {1e3 * best:.3f} ms")
            for name, measured in times.items():
                ratio = min(measured) / best
                benchmark.extra_info[name] = ratio
                print(f"  {ratio:5.2f}x as fast as {name} ({1e3 * min(measured):.3f} ms)")

    def on_gpu(ours, rivals, rounds=10, iterations=1, work=None, ceilings=None):
        del rounds, iterations  # of the CPU
        turns = 1 if mode == "dry" else 10 if quick else 30
        ceilings = ceilings or {}
        rivals = {
            name: attempt(rival.build) if isinstance(rival, Compiled) else rival
            for name, rival in rivals.items()
            if not (quick and isinstance(rival, Compiled))
        }
        result = compare(ours, rivals | ceilings, device, turns, work or Work())
        result["ceilings"] = {name: result["peers"].pop(name) for name in ceilings}

        def finish_another():  # so that a launch meets an empty queue
            wait_for(ours, device)

        benchmark.pedantic(ours, setup=finish_another, rounds=5, iterations=1, warmup_rounds=1)
        if benchmark.enabled:
            result["ours"]["host_us"] = 1e6 * benchmark.stats.stats.median
        record_property("result", result)
        with capsys.disabled():
            print(f"\n{benchmark.name}\n{format_comparison(result)}", flush=True)
        for name, peer in result["peers"].items():
            difference = peer.get("difference", 0.0)
            # NOTE: written so that NaN fails.
            assert difference <= LARGEST_DIFFERENCE, f"ours and {name} differ by {difference:.3g}"

    return on_cpu if mode == "cpu" else on_gpu


def wait_for(function, device):
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result


def compare(ours, rivals, device, rounds, work) -> dict:
    """Times in microseconds, rates and differences of ours and of every rival that runs."""
    wanted = wait_for(ours, device)  # ours must run: its failure is the test's
    running, peers = {"ours": ours}, {}
    for name, rival in rivals.items():
        try:
            if isinstance(rival, Exception):
                raise rival
            got = wait_for(rival, device)
        except Exception as error:
            peers[name] = {"error": f"{type(error).__name__}: {error}".strip()[:500]}
            continue
        running[name] = rival
        peers[name] = {}
        if got is not None:
            peers[name]["difference"] = relative_difference(wanted, got)
        del got
    del wanted
    turns = time_by_turns({"nothing": lambda: None, **running}, device, rounds)
    nothing = turns.pop("nothing")
    facts = {
        name: {
            **{key: 1e6 * value for key, value in zip(("us", "us_p20", "us_p80"), times)},
            **work.rates(times.median),
        }
        for name, times in turns.items()
    }
    ours = facts.pop("ours")
    for name, fact in facts.items():
        peers[name] |= fact | {"times_ours": fact["us"] / ours["us"]}
    return {
        "ours": ours,
        "peers": peers,
        "work": work._asdict(),
        "nothing_us": 1e6 * nothing.median,
    }


def relative_difference(wanted, got) -> float:
    """The relative L2 difference, in float64; the largest if there are several outputs."""
    if isinstance(wanted, tuple):
        return max(map(relative_difference, wanted, got))
    wanted, got = wanted.double(), got.double()
    return float((wanted - got).norm() / got.norm())


def format_comparison(result: dict) -> str:
    rows = []
    peers = result["peers"] | result["ceilings"]
    for name, facts in (("ours", result["ours"]), *peers.items()):
        if "error" in facts:
            rows.append(f"  {name:24} failed: {facts['error'].splitlines()[0][:90]}")
            continue
        row = f"  {name:24} {facts['us']:10.1f} us ({facts['us_p20']:.1f}-{facts['us_p80']:.1f})"
        if "tflops" in facts:
            row += f"  {facts['tflops']:6.1f} TFLOP/s"
        elif "gb_per_s" in facts:
            row += f"  {facts['gb_per_s']:6.0f} GB/s"
        if "times_ours" in facts:
            row += f"  {facts['times_ours']:5.2f} x the time of ours"
        rows.append(row)
    return "\n".join(rows)
