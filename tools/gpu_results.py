"""A results file: JSON lines, appended as soon as anything is known; and the words made of it.

A run on rented or shared hardware may end at any moment, and what it has learnt by then must stay.
The first line holds the facts about the machine. Every later line has one of four keys: `plan`, the
cases to come; `begin`, a case that starts; `case`, one that has ended; `note`, further facts.
"""

import json
import os
import re
import subprocess
from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOST_CONTEXT = 75  # pytest's exit status after which the other cases need a new process
LOSSES = 2  # cases of a test function that hang or lose the device before the others are left out
MAX_ERROR = 2000  # characters, from the end
MAX_FAILURES = 20  # test functions named in a summary
PACKAGES = ("torch", "triton", "numpy", "flash_attn", "flash_attn_interface", "pytest")
SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)
GOOD = {"passed", "skipped"}


class Results:
    """The content of a results file. Every change is appended at once, in a single write."""

    def __init__(self, path: Path | str, facts: dict[str, Any] | None = None):
        """Start a new file with these facts, or read the existing one if there are none."""
        self.path = Path(path)
        self.facts: dict[str, Any] = {}
        self.planned: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.running: dict[str, Any] | None = None  # the case that has begun and not ended
        self._separator = ""
        if facts is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")
            self._append({"note": facts})
            return
        text = self.path.read_text()
        for line in text.splitlines():
            try:
                self._apply(json.loads(line))
            except json.JSONDecodeError:
                continue  # its writer was killed
        if not text.endswith("\n"):
            self._separator = "\n"

    @property
    def finished(self) -> set[str]:
        return {row["case"] for row in self.rows}

    @property
    def not_run(self) -> list[str]:
        return [case for case in self.planned if case not in self.finished]

    @property
    def given_up(self) -> set[str]:
        """Test functions of which LOSSES cases have hung, crashed or lost the device."""
        losses = Counter(function_of(row["case"]) for row in self.rows if row.get("lost"))
        return {name for name, count in losses.items() if count >= LOSSES}

    def plan(self, cases: list[str]) -> None:
        known = set(self.planned)
        self._append({"plan": [case for case in cases if case not in known]})

    def begin(self, case: str, patience: float = 0.0) -> None:
        """patience: seconds that the case may take, if more than its group allows."""
        self._append({"begin": case, "patience": patience})

    def end(self, case: str, outcome: str, **facts: Any) -> None:
        if "error" in facts:
            facts["error"] = facts["error"][-MAX_ERROR:]
        self._append({"case": case, "outcome": outcome, **facts})

    def note(self, **facts: Any) -> None:
        self._append({"note": facts})

    def _apply(self, line: dict[str, Any]) -> None:
        if "case" in line:
            self.rows.append(line)
            self.running = None
        elif "begin" in line:
            self.running = {"case": line["begin"], "patience": line["patience"]}
        elif "plan" in line:
            self.planned += line["plan"]
        else:
            self.facts |= line["note"]

    def _append(self, line: dict[str, Any]) -> None:
        self._apply(line)
        with open(self.path, "a") as file:
            file.write(self._separator + json.dumps(line) + "\n")
        self._separator = ""


def function_of(case: str) -> str:
    """A case's id without its parameters."""
    return case.split("[")[0]


def slug(name: str) -> str:
    """A device's name as a folder: NVIDIA H200 is h200."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word != "nvidia") or "unknown"


def output_of(*command: str) -> str | None:
    """The output of a command; None if the command does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> tuple[str, bool | None]:
    """This checkout's commit, shortened, and whether its files differ from it.

    The variable COMMIT names the commit of a copy without history; nobody knows then what differs.
    """
    head = output_of("git", "rev-parse", "--short=9", "HEAD")
    if head is None:
        return os.environ.get("COMMIT", "unknown"), None
    return head, bool(output_of("git", "status", "--porcelain", "--untracked-files=no"))


def smi_query(*options: str) -> tuple[str, ...]:
    """The nvidia-smi command that asks for SMI_FIELDS of the first visible device."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = f"--query-gpu={','.join(SMI_FIELDS)}"
    return ("nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={index}", *options)


def smi() -> dict[str, str]:
    """Clocks (MHz), power (W) and temperature (C) by the driver; empty without nvidia-smi."""
    found = output_of(*smi_query())
    return {} if not found else dict(zip(SMI_FIELDS, found.splitlines()[0].split(", ")))


def machine(device: str) -> dict[str, Any]:
    """Collect every fact that a figure must come with. `device`: cuda, or cpu for a dry run."""
    import torch

    head, dirty = commit()
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": head,
        "dirty": dirty,
        "versions": {package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "nvcc": (output_of("nvcc", "--version") or "").splitlines()[-1:],
        "nvidia_smi": smi(),
    }
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        facts["device"] = {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": found.L2_cache_size,
        }
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def format_figures(rows: list[dict[str, Any]]) -> str:
    """A line per measured case: outcome, time and rate of ours, the best peer."""
    lines = []
    for row in rows:
        result = row.get("result", {})
        line = f"{row['outcome']:8} {short(row['case'])}"
        if ours := result.get("ours"):
            line += f": {ours['us']:.1f} us{_rate(ours)}"
            peers = {name: peer for name, peer in result["peers"].items() if "us" in peer}
            if peers:
                best = min(peers, key=lambda name: peers[name]["us"])
                line += f"; best peer {best} {peers[best]['us']:.1f} us{_rate(peers[best])}"
        elif "summary" in result:
            line += f": {result['summary']}"
        else:
            continue
        lines.append(line)
    return "\n".join(lines)


def format_summary(results: Results) -> str:
    """Formats how the cases of every group ended, then what went wrong, by test function."""
    lines = ["What ran"]
    for group in dict.fromkeys(row.get("group", "") for row in results.rows):
        outcomes = Counter(row["outcome"] for row in results.rows if row.get("group", "") == group)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        lines.append(f"  {group or 'cases'}: {counts}")
    if results.not_run:
        lines.append(f"  not run, out of time: {len(results.not_run)}")
    wrong: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        if row["outcome"] not in GOOD:
            place = function_of(short(row["case"])), row["outcome"]
            wrong.setdefault(place, []).append(gist(row.get("error", "")))
    lines += ["", "What failed"] if wrong else ["", "Nothing failed"]
    for (name, outcome), errors in list(wrong.items())[:MAX_FAILURES]:
        lines.append(f"  {name}: {len(errors)} {outcome}" + f": {errors[0]}" * bool(errors[0]))
    if len(wrong) > MAX_FAILURES:
        lines.append(f"  and {len(wrong) - MAX_FAILURES} more test functions")
    return "\n".join(lines)


def gist(error: str) -> str:
    """The first line that says what went wrong; in pytest's reports it begins with an E."""
    lines = error.strip().splitlines()
    lines = [line[1:].strip() for line in lines if line.startswith("E ")] or lines
    return lines[0][:120] if lines else ""


def _rate(facts: dict[str, float]) -> str:
    if "tflops" in facts:
        return f" ({facts['tflops']:.0f} TFLOP/s)"
    return f" ({facts['gb_per_s']:.0f} GB/s)" if "gb_per_s" in facts else ""


def short(case: str) -> str:
    """A case's id without its folders and its constant part."""
    return case.rsplit("/", 1)[-1].replace("-torch.bfloat16", "")
