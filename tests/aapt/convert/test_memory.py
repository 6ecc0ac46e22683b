"""A conversion's memory: a few tensors, however many the file has."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .plain_native import random_weights

# Prints by how many bytes the resident memory has grown at most
CONVERT = """
import re, sys
from pathlib import Path
from aapt.convert.job import convert

def resident(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

source, warm, out = map(Path, sys.argv[1:])
convert(warm, out.with_name("warm-out"), "one-forcing")  # imports what is imported late
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
convert(source, out, "one-forcing")
print(resident("VmHWM") - before)
"""
DEPTH = 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_memory_is_bounded_by_the_largest_tensor(tmp_path, suffix):
    from safetensors.torch import save_file

    def write(path: Path, depth: int) -> int:
        weights = random_weights(width=512, depth=1, hidden=2048)
        for index in range(1, depth):
            for name in [name for name in weights if name.startswith("blocks.0.")]:
                weights[name.replace("blocks.0.", f"blocks.{index}.")] = weights[name]
        weights = {name: x.float().clone() for name, x in weights.items()}
        torch.save({"generator": weights}, path) if suffix == ".pt" else save_file(weights, path)
        return max(x.nbytes for x in weights.values())

    source, warm = tmp_path / f"w{suffix}", tmp_path / f"warm{suffix}"
    largest = write(source, DEPTH)
    write(warm, 1)
    words = [sys.executable, "-c", CONVERT, source, warm, tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, file = int(done.stdout), source.stat().st_size
    assert file > 16 * largest
    assert grown < 4 * largest, f"grown by {grown / largest:.1f} of the largest tensor"
