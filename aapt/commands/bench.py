"""`aapt bench`: measure speed on this machine."""

import json
import time
from typing import Annotated

import typer

from .shared import (
    MODEL,
    Json,
    Model,
    Threads,
    bad_input,
    environment_rows,
    load,
    prompt_of,
    table,
)

bench = typer.Typer(help="Measure speed on this machine.")


@bench.command("stream")
def bench_stream(
    model: Model = MODEL,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Timed steps.")] = 60,
    threads: Threads = None,
    as_json: Json = False,
):
    """Time a stream of the model: first frames, steps, frames per second, memory.

    Decoding to pixels is timed, encoding to a file is not. 12 untimed steps come first.

    \b
    Examples:
      aapt bench stream
      aapt bench stream --threads 2 --steps 240 --json > result.json
    """
    import torch

    from ..environment import environment
    from ..evaluate import speed
    from ..media.image import fit_image, load_image

    if threads:
        torch.set_num_threads(threads)
    started = time.perf_counter()
    generator = load(model)
    load_seconds = time.perf_counter() - started
    with bad_input():
        image = load_image(generator.sample_image())
    first_frame, _ = fit_image(image, generator.height, generator.width)
    result = speed.bench_stream(generator, first_frame, prompt_of(generator, None), steps)
    facts = {"model": model, "load_seconds": load_seconds, **result, **environment()}
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    first, step, memory = result["first_frame_ms"], result["step_ms"], result["peak_memory_bytes"]
    rows = [
        ("model", f"{model}: {result['width']} x {result['height']} on {result['device']}"),
        ("first frames", f"{first['cold']:.0f} ms cold, {first['warm']:.0f} ms warm"),
        ("step", f"p50 {step['p50']:.1f} ms, p99 {step['p99']:.1f} ms, max {step['max']:.1f} ms"),
        ("rate", f"{result['fps']:.1f} fps, {result['real_time']:.2f} x real time"),
        ("timed", f"{steps} steps of {result['frames_per_step']} frames, decoding included"),
        ("warm-up", f"{result['warmup_steps']} steps"),
        ("peak memory", f"{memory['process'] / 2**20:.0f} MiB resident"),
    ]
    if memory["cuda"] is not None:
        rows.append(("peak CUDA memory", f"{memory['cuda'] / 2**20:.0f} MiB allocated"))
    table(rows + environment_rows(facts))
