"""`against`: time a function and its rivals by turns, in one process, and print the ratios."""

import time

import pytest


@pytest.fixture
def against(benchmark, capsys):
    """against(ours, {name: rival}, rounds): pytest-benchmark times `ours`; before each of its
    rounds every rival runs once, so that all of them meet the same machine. The printed ratio,
    also in extra_info, is the rival's best time over ours: above 1 we are faster."""

    def run(ours, rivals, rounds=10, iterations=1):
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

    return run
