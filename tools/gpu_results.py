"""One file of results: facts about the machine, then a row per case, on disk as soon as known.

A run on rented or shared hardware may end at any moment; what it has learnt by then must stay.
"""

import json
import os
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOST_CONTEXT = 75  # pytest's exit status after which the rest has to run in a new process
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


class Results:
    """The content of one results file. Every change is written at once, whole or not at all."""

    def __init__(self, path: Path | str, facts: dict[str, Any] | None = None):
        """Start a new file with these facts, or without any go on with the one that is there."""
        self.path = Path(path)
        if facts is None:
            self.content = json.loads(self.path.read_text())
        else:
            self.content = {**facts, "running": None, "planned": [], "rows": []}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    @property
    def running(self) -> str | None:
        """The case that has begun and not ended."""
        return self.content["running"]

    @property
    def finished(self) -> set[str]:
        return {row["case"] for row in self.rows}

    @property
    def not_run(self) -> list[str]:
        return [case for case in self.content["planned"] if case not in self.finished]

    def plan(self, cases: list[str]) -> None:
        known = set(self.content["planned"])
        self.content["planned"] += [case for case in cases if case not in known]
        self._write()

    def begin(self, case: str) -> None:
        self.content["running"] = case
        self._write()

    def end(self, case: str, outcome: str, **facts: Any) -> None:
        self.rows.append({"case": case, "outcome": outcome, **facts})
        self.content["running"] = None
        self._write()

    def note(self, **facts: Any) -> None:
        self.content |= facts
        self._write()

    def _write(self) -> None:
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(whole, self.path)


def slug(name: str) -> str:
    """A device's name as a folder: NVIDIA H200 is h200."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word != "nvidia") or "unknown"


def output_of(*command: str) -> str | None:
    """What a command prints, None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> tuple[str, bool | None]:
    """Of this checkout, short, and whether files differ. A copy without its history is told by the
    variable COMMIT; nobody knows then what differs."""
    head = output_of("git", "rev-parse", "--short=9", "HEAD")
    if head is None:
        return os.environ.get("COMMIT", "unknown"), None
    return head, bool(output_of("git", "status", "--porcelain", "--untracked-files=no"))


def smi() -> dict[str, str]:
    """The driver's word on clocks and power, empty without nvidia-smi."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ("nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader")
    found = output_of(*query, f"--id={index}")
    return {} if not found else dict(zip(SMI_FIELDS, found.splitlines()[0].split(", ")))


def machine(device: str) -> dict[str, Any]:
    """Everything a figure must come with; `device`: cuda, or cpu for a dry run."""
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


def format_table(rows: list[dict[str, Any]]) -> str:
    """A line per case: outcome, time and rate of ours, the best peer; then what went wrong."""
    lines, wrong = [], []
    for row in rows:
        result = row.get("result", {})
        line = f"{row['outcome']:8} {short(row['case'])}"
        if ours := result.get("ours"):
            line += f": {ours['us']:.1f} us{_rate(ours)}"
            peers = {name: peer for name, peer in result["peers"].items() if "us" in peer}
            if peers:
                best = min(peers, key=lambda name: peers[name]["us"])
                line += f"; best peer {best} {peers[best]['us']:.1f} us{_rate(peers[best])}"
        if "summary" in result:
            line += f": {result['summary']}"
        lines.append(line)
        if "error" in row:
            wrong.append(f"{short(row['case'])}\n    {row['error'].splitlines()[-1][:200]}")
    return "\n".join(lines + ([""] + wrong if wrong else []))


def _rate(facts: dict[str, float]) -> str:
    if "tflops" in facts:
        return f" ({facts['tflops']:.0f} TFLOP/s)"
    return f" ({facts['gb_per_s']:.0f} GB/s)" if "gb_per_s" in facts else ""


def short(case: str) -> str:
    """A test's id without its folders and its constant part."""
    return case.rsplit("/", 1)[-1].replace("-torch.bfloat16", "")
