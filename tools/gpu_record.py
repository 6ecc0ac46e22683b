"""The pytest plugin behind `make gpu`: writes every case to the results file as it ends, leaves out
those that have ended before, and stops a process whose CUDA context is lost.

    python -m pytest -p gpu_record --record results.json ...        # with tools/ on PYTHONPATH
"""

import re

import pytest
from gpu_results import LOST_CONTEXT, Results, smi

STICKY = re.compile(
    r"CUDA error|cudaError|illegal memory access|illegal instruction|misaligned address"
    r"|unspecified launch failure|device-side assert",
    re.IGNORECASE,
)
MAX_ERROR = 2000  # characters, from the end


def pytest_addoption(parser):
    parser.addoption("--record", required=True, help="the results file, which exists")


def pytest_configure(config):
    config.pluginmanager.register(Recorder(Results(config.getoption("record"))), "gpu recorder")


class Recorder:
    def __init__(self, results: Results):
        self.results = results
        self.reports: list[pytest.TestReport] = []

    @pytest.hookimpl(trylast=True)  # after -k has had its say
    def pytest_collection_modifyitems(self, config, items):
        done = [item for item in items if item.nodeid in self.results.finished]
        items[:] = [item for item in items if item.nodeid not in self.results.finished]
        config.hook.pytest_deselected(items=done)
        self.results.plan([item.nodeid for item in items])

    def pytest_collectreport(self, report):
        if report.outcome == "skipped":
            self.results.end(report.nodeid, "skipped", error=str(report.longrepr[-1]))
        elif report.failed:
            self.results.end(report.nodeid, "error", error=report.longreprtext[-MAX_ERROR:])

    def pytest_runtest_logstart(self, nodeid):
        self.reports = []
        self.results.begin(nodeid)

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid):
        facts = {"seconds": round(sum(report.duration for report in self.reports), 3)}
        facts |= {key: value for report in self.reports for key, value in report.user_properties}
        worst = next((report for report in self.reports if report.outcome != "passed"), None)
        if worst is not None:
            words = worst.longrepr[-1] if worst.skipped else worst.longreprtext[-MAX_ERROR:]
            facts["error"] = str(words)
        if clocks := smi():
            facts["nvidia_smi"] = clocks
        self.results.end(nodeid, worst.outcome if worst else "passed", **facts)
        if worst is not None and worst.failed and STICKY.search(facts["error"]):
            pytest.exit("the CUDA context is lost", returncode=LOST_CONTEXT)
