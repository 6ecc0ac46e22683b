"""Checkpoints: round trips, and every way a file can be wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from aapt import checkpoint
from aapt.checkpoint import CheckpointError, load_config, load_module, save_config, save_module


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.second = nn.Linear(width, 2)
        self.register_buffer("count", torch.tensor(7))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_module(path, Net(), torch.bfloat16)
    return path


def test_round_trip(tmp_path):
    path, net, other = tmp_path / "a" / "net.safetensors", Net(), Net()
    save_module(path, net)
    load_module(path, other)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["net.safetensors"]


def test_half_precision_on_disk_float_in_memory(saved):
    net = Net()
    load_module(saved, net)
    assert net.first.weight.dtype == torch.float32 and net.count.dtype == torch.int64


def test_truncation_names_the_tensor(saved):
    whole = saved.read_bytes()
    net = Net()
    before = [p.clone() for p in net.parameters()]
    saved.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=r"second.weight: expected \d+ bytes up to its end"):
        load_module(saved, net)
    for a, b in zip(before, net.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"PK\x03\x04" + b"0" * 100])
def test_foreign_files(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="expected a safetensors header, got"):
        load_module(path, Net())


@pytest.mark.parametrize(
    "header",
    [[], {"w": {}}, {"w": 5}, {"w": {"data_offsets": ["a", "b"]}}, {"w": {"data_offsets": [0, 0]}}],
)
def test_malformed_headers(tmp_path, header):
    path = tmp_path / "x.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="expected a safetensors header, got"):
        load_module(path, Net())


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="which is missing"):
        load_module(tmp_path / "no.safetensors", Net())


def test_mismatch_names_the_tensor(saved):
    with pytest.raises(CheckpointError, match=r"first.weight: expected \(5, 3\), got \(4, 3\)"):
        load_module(saved, Net(width=5))
    extended = Net()
    extended.third = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match="expected tensor third.weight, which is missing"):
        load_module(saved, extended)
    reduced = Net()
    del reduced.second
    with pytest.raises(CheckpointError, match="tensor second.* belongs to no parameter"):
        load_module(saved, reduced)


def test_config_versions(tmp_path):
    save_config(tmp_path, {"a": [1, 2]})
    assert load_config(tmp_path) == {"a": [1, 2]}
    (tmp_path / "config.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(CheckpointError, match="expected format_version 1, got 99"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"format')
    with pytest.raises(CheckpointError, match="expected JSON"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError, match="expected a checkpoint folder with config.json"):
        load_config(tmp_path / "nowhere")


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    def fail(*_):
        raise checkpoint.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="cannot be written: .*No space left on device"):
        checkpoint.save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


# Prints by how many bytes the resident memory grows beyond the weights while they are loaded
LOAD = """
import re, sys
from pathlib import Path
import torch
from aapt.checkpoint import load_meta_module

def resident(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def load(depth, path):
    with torch.device("meta"):
        layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in range(depth))
    load_meta_module(path, layers, "cpu", torch.float32)
    return sum(x.nbytes for x in layers.state_dict().values()), layers

load(1, Path(sys.argv[1]))  # imports what is imported late
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
weights, layers = load(24, Path(sys.argv[2]))
print(resident("VmHWM") - before - weights)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_holds_the_weights_and_a_few_tensors(tmp_path):
    paths = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    for depth, path in zip((1, 24), paths):
        save_module(path, nn.ModuleList(nn.Linear(1024, 1024) for _ in range(depth)))
    words = [sys.executable, "-c", LOAD, *paths]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 * 4 * 1024**2  # four layers, of the file's 24
