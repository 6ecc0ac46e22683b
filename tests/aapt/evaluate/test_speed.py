"""The captured step, described; a stand-in takes the place of graph and driver."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aapt import StreamingGenerator
from aapt.cuda_driver import DriverError
from aapt.evaluate import speed
from aapt.streaming import memory
from aapt.vae.stream import Captured

from ..streaming.test_generator import HEIGHT, WIDTH, build


class Graph:
    """A graph that calls a function for a replay."""

    def __init__(self, function, out):
        self.function, self.out = function, out

    def replay(self):
        self.out.copy_(self.function())

    def raw_cuda_graph(self):
        return 1234

    def pool(self):
        return (0, 7)


def capture(function, device, pool=None):
    out = function()
    return Captured(Graph(function, out), out)


def open_stream():
    model, vae = build()
    generator = StreamingGenerator(model, vae, height=HEIGHT, width=WIDTH, prompts=["ab"])
    return generator.open(np.zeros((HEIGHT, WIDTH, 3), np.uint8), "ab")


def test_one_stream_is_open_while_its_memory_is_measured():
    """The second takes over what the first has left, as a next visitor's does."""
    generator = open_stream().generator
    made, opened = generator.open, []

    def open_one(*arguments, **options):
        assert all(stream.bytes == 0 for stream in opened)
        opened.append(made(*arguments, **options))
        return opened[-1]

    generator.open = open_one
    found = speed.bench_stream(generator, np.zeros((HEIGHT, WIDTH, 3), np.uint8), "ab", steps=2)
    assert len(opened) == 2 and set(found["first_frame_ms"]) == {"cold", "warm"}


def test_a_captured_step_is_described(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "capture", capture)
    monkeypatch.setattr(speed, "graph_nodes", lambda raw: {"kernel": raw})
    monkeypatch.setattr(speed, "write_dot", lambda raw, path: path.write_text(f"digraph {raw}"))
    pools = {(0, 7): [{"total_size": 5}, {"total_size": 6}]}
    monkeypatch.setattr(torch.cuda, "memory_snapshot", pools.get)
    stream, path = open_stream(), tmp_path / "step.dot"
    assert speed.describe_graph(stream, path) == {
        "dot": str(path),
        "nodes": {"kernel": 1234},
        "bytes": 11,
    }
    assert path.read_text() == "digraph 1234"
    stream.close()
    assert stream.graph is None


def test_without_a_graph_or_cuda_python_the_error_says_what_to_do(monkeypatch, tmp_path):
    stream = open_stream()
    assert stream.graph is None
    words = "^graph: expected a CUDA device, where a step is one graph, got cpu; pass --device cuda"
    with pytest.raises(ValueError, match=words):
        speed.describe_graph(stream, tmp_path / "step.dot")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    captured = SimpleNamespace(graph=Graph(None, None), generator=stream.generator)
    with pytest.raises(DriverError, match=r"pip install 'aapt\[cuda\]'"):
        speed.describe_graph(captured, tmp_path / "step.dot")
    assert not (tmp_path / "step.dot").exists()
