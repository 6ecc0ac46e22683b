"""Speed of a stream: latency of the first frames and of steps, rate, and memory."""

import itertools
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cuda_driver import graph_nodes, write_dot
from ..streaming.controls import load_controls
from ..streaming.generator import StreamingGenerator
from ..streaming.stream import Stream

WARMUP_STEPS = 12  # past the window of any bundled model, so that its ring has wrapped


def bench_stream(
    generator: StreamingGenerator, first_frame: np.ndarray | None, prompt: str, steps: int
) -> dict[str, Any]:
    """Time one stream with decoding to pixels and without encoding to a file.

    The latency of the first frames is from `open` to those of a step in host memory, for the first
    stream of the process and for the next. `steps` steps are timed after WARMUP_STEPS others.
    """
    controls = itertools.repeat(generator.still())
    if generator.driven_by == "camera":
        controls = iter(load_controls("walk", generator.frames_per_step / generator.fps))
    on_gpu = generator.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(generator.device)

    first = []
    for _ in range(2):
        started = time.perf_counter()
        stream = generator.open(first_frame, prompt=prompt, seed=0)
        stream.step(next(controls))
        first.append(time.perf_counter() - started)
        if len(first) == 1:
            stream.close()  # the next takes its memory over
    for _ in range(WARMUP_STEPS):
        stream.step(next(controls))

    latencies = []
    begun = time.perf_counter()
    for _ in range(steps):
        started = time.perf_counter()
        stream.step(next(controls))  # frames come back in host memory: the step is complete
        latencies.append(time.perf_counter() - started)
    elapsed = time.perf_counter() - begun

    fps = steps * generator.frames_per_step / elapsed
    p50, p99 = np.percentile(latencies, (50, 99))
    return {
        "device": str(generator.device),
        "dtype": str(generator.vae.latent_mean.dtype).removeprefix("torch."),
        "cache": generator.cache,
        "height": generator.height,
        "width": generator.width,
        "warmup_steps": WARMUP_STEPS,
        "steps": steps,
        "frames_per_step": generator.frames_per_step,
        "first_frame_ms": {"cold": 1e3 * first[0], "warm": 1e3 * first[1]},
        "step_ms": {"p50": 1e3 * p50, "p99": 1e3 * p99, "max": 1e3 * max(latencies)},
        "fps": fps,
        "real_time": fps / generator.fps,
        "peak_memory_bytes": {
            "process": _peak_resident_bytes(),
            "cuda": torch.cuda.max_memory_allocated(generator.device) if on_gpu else None,
        },
    }


def describe_graph(stream: Stream, path: Path) -> dict[str, Any]:
    """Write the captured step of a stream as a DOT file.

    Returns the number of its nodes by kind, and the bytes of its memory, which streams of one
    generator do not share. ValueError on a device without graphs, DriverError without cuda-python.
    """
    graph = stream.graph
    if graph is None:
        raise ValueError(
            f"graph: expected a CUDA device, where a step is one graph, got "
            f"{stream.generator.device}; pass --device cuda"
        )
    raw = graph.raw_cuda_graph()
    write_dot(raw, path)
    segments = torch.cuda.memory_snapshot(graph.pool())
    return {
        "dot": str(path),
        "nodes": graph_nodes(raw),
        "bytes": sum(segment["total_size"] for segment in segments),
    }


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB
