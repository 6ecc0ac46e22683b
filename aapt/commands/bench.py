"""`aapt bench`: measure speed on this machine."""

import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from .bench_methods import bench_methods
from .shared import (
    MAX_GPUS,
    MODEL,
    Cache,
    Device,
    Dtype,
    InputError,
    Json,
    Model,
    Size,
    Threads,
    bad_input,
    environment_rows,
    missing_extra,
    prompt_of,
    table,
)
from .sized import Fp8, load_to_predict, load_to_time, ranks_of_torchrun

STEPS = 60
bench = typer.Typer(help="Measure speed on this machine.")
bench.command("methods")(bench_methods)


@bench.command("stream")
def bench_stream(
    model: Model = MODEL,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Timed steps.", show_default=str(STEPS)),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    size: Size = None,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Also time the parts of a step.")
    ] = False,
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="GPU", help="Only predict the parts of a step on h100 or h200, in bfloat16."
        ),
    ] = None,
    fp8: Fp8 = False,
    cache: Cache = "model",
    context: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=MAX_GPUS,
            help="GPUs that share each frame, under torchrun; with --predict on paper.",
        ),
    ] = 1,
    graph: Annotated[
        Path | None,
        typer.Option(metavar="FILE.dot", help="On a GPU: also write the captured step."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
):
    """Time a stream of the model: first frames, steps, frames per second, memory.

    Decoding to pixels is timed, encoding to a file is not. 12 untimed steps come first.

    --breakdown divides a step into condition, noise, patchify, products, attention, fused
    (everything else in the blocks), decode and copy. On a GPU these are times of kernels, of a step
    without its graph in a profiler, beside the whole step as one graph. With --context they are
    those of the first rank, and exchange is what it sends, receives and waits for.
    --predict needs no GPU, times nothing, and says what each line assumes. --graph needs
    cuda-python (pip install 'aapt[cuda]'). aapt-8b, aapt-2b and aapt-small have random weights.

    \b
    Examples:
      aapt bench stream
      aapt bench stream --threads 2 --steps 240 --json > result.json
      aapt bench stream --model runs/mine/mine --device cuda --size 736x416
      aapt bench stream --breakdown
      aapt bench stream --device cuda --breakdown
      aapt bench stream --model aapt-2b --predict h100
      aapt bench stream --model aapt-8b --size 1280x720 --predict h100 --fp8
      aapt bench stream --device cuda --graph step.dot
      torchrun --nproc-per-node 8 -m aapt bench stream --model aapt-8b --size 1280x720 \\
        --context 8 --breakdown
    """
    import numpy as np
    import torch

    from ..environment import environment
    from ..evaluate import breakdown as parts
    from ..evaluate import speed
    from ..media.image import fit_image, load_image
    from ..model.presets import PRESETS

    if threads:
        torch.set_num_threads(threads)
    if predict:
        given = {"device": device, "dtype": dtype, "graph": graph, "cache": cache != "model"}
        given["steps"] = steps
        generator = load_to_predict(model, size, fp8, **given)
        with bad_input():
            predicted = parts.predict_parts(generator, predict, fp8, context).as_json()
        precision = "bfloat16 with linear layers and attention in e4m3" if fp8 else "bfloat16"
        precision += f", {context} GPUs" if context > 1 else ""
        shown = f"{model}: {generator.width} x {generator.height}, {precision}"
        if as_json:
            print(json.dumps({"model": shown, "breakdown": predicted}, indent=2))
        else:
            table([("model", shown), *breakdown_rows(predicted)])
        return
    steps = steps or STEPS
    parallel = None
    if context > 1:
        parallel = ranks_of_torchrun(context, device=device, graph=graph)
        device = str(parallel.device)
    started = time.perf_counter()
    generator = load_to_time(model, device, dtype, size, fp8, cache)
    load_seconds = time.perf_counter() - started
    if parallel:
        with bad_input():
            generator.share_tokens(parallel.context)
    first_frame = None
    if model in PRESETS:
        first_frame = np.zeros((generator.height, generator.width, 3), np.uint8)
    elif not generator.few_step:
        with bad_input():
            image = load_image(generator.sample_image())
        first_frame, _ = fit_image(image, generator.height, generator.width)
    prompt, extras = prompt_of(generator, None), {}
    with bad_input():
        result = speed.bench_stream(generator, first_frame, prompt, steps)  # cold: before others
    if breakdown or graph:
        with bad_input(), generator.open(first_frame, prompt) as stream:
            if graph:
                extras["graph"] = speed.describe_graph(stream, graph)
            if breakdown:
                control = generator.still()
                for _ in range(speed.WARMUP_STEPS):
                    stream.step(control)
                extras["breakdown"] = parts.measure_parts(stream, control, steps).as_json()
    if parallel:
        parallel.wait()
        parallel.close()
        if not parallel.main:
            return
    facts = {"model": model, "context": context, "load_seconds": load_seconds}
    facts |= {**result, **extras, **environment()}
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    first, step, memory = result["first_frame_ms"], result["step_ms"], result["peak_memory_bytes"]
    rows = [
        (
            "model",
            f"{model}: {result['width']} x {result['height']}, {result['dtype']} on "
            f"{result['device']}"
            + (f" and {context - 1} others" if context > 1 else "")
            + (f", cache {cache}" if cache != "model" else ""),
        ),
        ("first frames", f"{first['cold']:.0f} ms cold, {first['warm']:.0f} ms warm"),
        ("step", f"p50 {step['p50']:.1f} ms, p99 {step['p99']:.1f} ms, max {step['max']:.1f} ms"),
        ("rate", f"{result['fps']:.1f} fps, {result['real_time']:.2f} x real time"),
        ("timed", f"{steps} steps of {result['frames_per_step']} frames, decoding included"),
        ("warm-up", f"{result['warmup_steps']} steps"),
        ("peak memory", f"{memory['process'] / 2**20:.0f} MiB resident"),
    ]
    if memory["cuda"] is not None:
        rows.append(("peak CUDA memory", f"{memory['cuda'] / 2**20:.0f} MiB allocated"))
    if "graph" in extras:
        nodes = ", ".join(f"{count} {kind}" for kind, count in extras["graph"]["nodes"].items())
        size = f"{extras['graph']['bytes'] / 2**20:.0f} MiB"
        rows.append(("graph", f"{nodes}; {size}; {extras['graph']['dot']}"))
    if "breakdown" in extras:
        rows += breakdown_rows(extras["breakdown"])
    table(rows + environment_rows(facts))


def breakdown_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows of a table for the fields of a `Breakdown`."""
    step, blocks, predicted = found["step"], found["blocks"], found["how"].startswith("predicted")
    rows = [("parts of a step", found["how"] + (": nothing was measured" if predicted else ""))]
    for name, value in found["parts"].items():
        words = f"{value:.3f} ms, {value / step:.0%}"
        if name in ("products", "attention", "fused"):
            words += f", {value / blocks:.3f} ms for each of {blocks} blocks"
        if name == "exchange" and not predicted:
            words += ", the wait for other ranks included"
        if name == "copy" and predicted:
            words = f"{value:.3f} ms beside the next step"
        rows.append((f"  {name}", words + _assumed(found, name)))
    on_cpu = found["how"] == "measured on cpu"
    why = "the host between operations" if on_cpu else "between kernels"
    if found["idle"] < 0:
        why = "the steps that were taken apart were slower"
    rows += [
        (
            "  idle",
            f"{found['idle']:.3f} ms, {found['idle'] / step:.0%}: {why}{_assumed(found, 'idle')}",
        ),
        ("  sum", f"{found['sum_of_parts']:.3f} ms of a step of {step:.3f} ms"),
        ("  kernels", f"{found['kernels']} besides the decoder's"),
        ("  text", f"{found['text']:.3f} ms for each prompt, in no step"),
    ]
    return rows


def _assumed(found: dict[str, Any], name: str) -> str:
    """Return what a predicted part takes for granted, as the end of its row."""
    return f"; assumed {found['assumptions'][name]}" if name in found["assumptions"] else ""


@bench.command("play")
def bench_play(
    model: Model = MODEL,
    seconds: Annotated[
        float, typer.Option(metavar="S", min=1, help="Video played without and with redo, each.")
    ] = 60.0,
    url: Annotated[
        str | None,
        typer.Option(metavar="WS-URL", help="A running server.", show_default="one is started"),
    ] = None,
    browser: Annotated[
        bool, typer.Option("--browser", help="Play the page in headless Chromium, by Playwright.")
    ] = False,
    as_json: Json = False,
):
    """Time from a key to the first shown frame that honours it, as a client of aapt serve sees it.

    A client without a page presses keys at random times, decodes each frame and shows the four
    frames of a step evenly. A control is sampled once per step, unless redo makes a step again.
    A model that follows poses is given motions in place of keys.
    Three seconds of video are not timed. With --browser the page itself is played on this machine,
    and the figures are those that it shows: from the key event to the painted frame.

    \b
    Examples:
      aapt bench play
      aapt bench play --browser
      aapt bench play --seconds 20 --url ws://127.0.0.1:8000/ws --json > result.json
    """
    from ..environment import environment

    try:
        from ..serve.latency import measure

        if browser:
            from ..serve.browser import measure_in_browser
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None
    given_url, server = url, None if url else _start_server(model)
    try:
        url = url or _address(server)
        if browser:
            parts = urlsplit(url)
            page = parts._replace(scheme=parts.scheme.replace("ws", "http"), path="/")
            results = measure_in_browser(page.geturl(), seconds)
        else:
            results = asyncio.run(measure(url, seconds))
    except OSError as error:
        raise InputError(f"url: cannot connect to {url}: {error}") from None
    except RuntimeError as error:  # no browser, or no world
        raise InputError(str(error)) from None
    finally:
        if server:
            server.terminate()
            server.wait()
    played = {"server": url} if given_url else {"model": model}
    facts = {**played, "seconds": seconds, "browser": browser, "play": results}
    facts |= environment()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    rows = [*played.items(), ("client", "page in Chromium" if browser else "without a page")]
    for result in results:
        key, step, period = result["key_to_pixel_ms"], result["step_ms"], result["period_ms"]
        name = "with redo" if result["redo"] else "without redo"
        rows += [
            (name, f"{result['fps']:.1f} fps, {result['keys']} keys, {result['redone']} redone"),
            ("  key to pixel", f"p50 {key['p50']:.0f} ms, p99 {key['p99']:.0f} ms"),
            (
                "  step",
                f"p50 {step['p50']:.0f} ms, p99 {step['p99']:.0f} ms, "
                f"{step['p50'] / period:.0%} of the period of {period:.0f} ms",
            ),
        ]
    table(rows + environment_rows(facts))


def _start_server(model: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "aapt", "serve", "--port", "0", "--model", model]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _address(server: subprocess.Popen) -> str:
    """Wait for a server's address; InputError with its last words if it ends."""
    said = ""
    for line in server.stderr:
        if found := re.search(r"Play at http://(\S+?)/", line):
            return f"ws://{found[1]}/ws"
        said = line.strip() or said
    raise InputError(said.removeprefix("aapt: ") or "serve: expected an address, got none")
