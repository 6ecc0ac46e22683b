"""The pytest plugin of `make gpu`: choose and order the cases, record each as it ends.

    python -m pytest -p gpu_record --record results.jsonl ...        # with tools/ on PYTHONPATH

Cases that have ended before are left out, and so are those of the simulator. The process ends as
soon as the CUDA context is lost.
"""

import gc
import re
import subprocess
import sys
from collections import Counter
from threading import Thread

import pytest
from gpu_results import LOSSES, LOST_CONTEXT, SMI_FIELDS, Results, function_of, smi_query

STICKY = re.compile(
    r"CUDA error|cudaError|illegal memory access|illegal instruction|misaligned address"
    r"|unspecified launch failure|device-side assert",
    re.IGNORECASE,
)


def pytest_addoption(parser):
    parser.addoption("--record", required=True, help="the results file, which exists")
    parser.addoption("--group", default="", help="the name of these cases in the results")
    parser.addoption("--case", action="append", default=[], help="the beginning of a case's id")
    parser.addoption("--turns", action="store_true", help="one case of every function in turn")


def pytest_configure(config):
    config.pluginmanager.register(Recorder(config), "gpu recorder")


class Recorder:
    def __init__(self, config: pytest.Config):
        self.results = Results(config.getoption("record"))
        self.group = config.getoption("group")
        self.wanted = config.getoption("case")
        self.turns = config.getoption("turns")
        self.collected: list[str] = []  # ids, before -k and -m
        self.uncollected: set[str] = set()
        self.patience: dict[str, float] = {}
        self.reports: list[pytest.TestReport] = []
        self.clocks = Clocks()

    def end(self, case: str, outcome: str, **facts) -> None:
        """Record how a case ended, once: a restarted process meets collection errors again."""
        if case not in self.results.finished:
            self.results.end(case, outcome, group=self.group, **facts)

    @pytest.hookimpl(trylast=True)  # after -k and -m have had their say
    def pytest_collection_modifyitems(self, config, items):
        given_up, finished = self.results.given_up, self.results.finished
        chosen = [item for item in self.choose(items) if item.nodeid not in finished]
        for item in chosen:
            if function_of(item.nodeid) in given_up:
                words = f"{LOSSES} cases of this function hung or lost the device"
                self.end(item.nodeid, "given up", error=words)
        chosen = [item for item in chosen if function_of(item.nodeid) not in given_up]
        for item in chosen:
            if marker := item.get_closest_marker("patience"):
                self.patience[item.nodeid] = marker.args[0]
        kept = {item.nodeid for item in chosen}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = chosen
        self.results.plan([item.nodeid for item in items])

    def choose(self, items: list[pytest.Item]) -> list[pytest.Item]:
        """The wanted items in order; a beginning that no id has is recorded as missing."""
        chosen = [item for item in items if not on_the_simulator(item)]
        if self.wanted:
            places = {}
            for item in chosen:
                beginnings = (i for i, w in enumerate(self.wanted) if item.nodeid.startswith(w))
                places[item.nodeid] = next(beginnings, None)
            chosen = [item for item in chosen if places[item.nodeid] is not None]
            chosen.sort(key=lambda item: places[item.nodeid])
            for beginning in self.wanted:
                readable = beginning.split("::")[0] not in self.uncollected
                if readable and not any(case.startswith(beginning) for case in self.collected):
                    self.end(beginning, "missing", error="no case has an id that begins so")
        if self.turns:
            seen, turn = Counter(), {}
            for item in chosen:
                turn[item.nodeid] = seen[function_of(item.nodeid)]
                seen[function_of(item.nodeid)] += 1
            chosen.sort(key=lambda item: turn[item.nodeid])
        return chosen

    def pytest_itemcollected(self, item):
        self.collected.append(item.nodeid)

    def pytest_collectreport(self, report):
        if report.outcome == "skipped":
            self.end(report.nodeid, "skipped", error=str(report.longrepr[-1]))
        elif report.failed:
            self.end(report.nodeid, "error", error=report.longreprtext)
        if report.outcome != "passed":
            self.uncollected.add(report.nodeid)

    def pytest_runtest_logstart(self, nodeid):
        self.reports = []
        self.clocks.take()
        self.results.begin(nodeid, self.patience.get(nodeid, 0.0))

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid):
        facts = {"seconds": round(sum(report.duration for report in self.reports), 3)}
        facts |= {key: value for report in self.reports for key, value in report.user_properties}
        worst = next((report for report in self.reports if report.outcome != "passed"), None)
        if worst is not None:
            facts["error"] = str(worst.longrepr[-1] if worst.skipped else worst.longreprtext)
        if "result" in facts and (clocks := self.clocks.take()):
            facts["clocks"] = clocks
        if worst is not None and worst.failed:
            release_failure()
        lost = worst is not None and worst.failed and STICKY.search(facts["error"]) is not None
        if lost:
            facts["lost"] = True
        self.end(nodeid, worst.outcome if worst else "passed", **facts)
        if lost:
            pytest.exit("the CUDA context is lost", returncode=LOST_CONTEXT)

    def pytest_sessionfinish(self):
        self.clocks.stop()


def release_failure() -> None:
    """Free the device memory that the tensors of a failed case hold.

    Python keeps the last error with its frames, and pytest does until the next one.
    """
    for name in ("last_exc", "last_value", "last_traceback", "last_type"):
        if hasattr(sys, name):
            delattr(sys, name)
    gc.collect()
    if "torch" in sys.modules and (cuda := sys.modules["torch"].cuda).is_initialized():
        cuda.empty_cache()


def on_the_simulator(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("kernel") == "sim"


class Clocks:
    """The driver's clocks (MHz), power (W) and temperature (C), asked for twice a second.

    A single nvidia-smi runs beside all cases: to start one costs up to half a second.
    """

    def __init__(self):
        self.samples: list[list[str]] = []
        try:
            self.process = subprocess.Popen(
                smi_query("--loop-ms=500"),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError:
            self.process = None
            return
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.samples.append(line.strip().split(", "))

    def take(self) -> dict[str, list[float]]:
        """The least and the largest value of every field since the last call, if any."""
        samples, self.samples = self.samples, []
        ranges = {}
        for field, *values in zip(SMI_FIELDS, *samples) if samples else ():
            try:
                numbers = [float(value) for value in values]
            except ValueError:
                continue  # a version, or not available
            ranges[field] = [min(numbers), max(numbers)]
        return ranges

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
