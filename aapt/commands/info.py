"""`aapt info`: show the model, the backend of each op, devices and versions."""

import dataclasses
import json
from typing import Annotated, Any

from ..placement import placement
from .shared import (
    CACHE_OPTION,
    MODEL,
    Device,
    Dtype,
    Json,
    Model,
    Size,
    bad_input,
    environment_rows,
    load,
    table,
)


def info(
    model: Model = MODEL,
    device: Device = None,
    dtype: Dtype = None,
    size: Size = None,
    cache: Annotated[str | None, CACHE_OPTION] = None,
    as_json: Json = False,
):
    """Show the model, the backend that each op runs on and why none better, devices and versions.

    Without --device ops are shown for the CPU and, if any, the CUDA device. A CUDA device that is
    not there is no error: the table says what is missing. The line cache gives the memory of one
    stream's keys and values under every name of --cache, or under the given one alone.

    \b
    Examples:
      aapt info
      aapt info --device cuda --dtype float32
      aapt info --json > environment.json
    """
    from ..device import usable_device
    from ..environment import environment

    missing = None
    with bad_input():
        placed = placement(device, dtype, size)
        if device is not None:
            try:
                usable_device(device)
            except ValueError as error:
                if not device.startswith("cuda"):
                    raise
                missing = str(error)
    generator = load(model, None, None, size, cache=cache or "model")
    facts = {
        "model": _model_facts(model, generator),
        "cache_bytes": _cache_bytes(generator, cache, placed["device"], placed["dtype"]),
        "device": {"asked": device, "missing": missing},
        "driver": _driver(),
        "ops": _ops(generator, placed["device"], placed["dtype"]),
        **environment(),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    size = facts["model"]
    parameters = {name: f"{count / 1e6:.2f} M" for name, count in size["parameters"].items()}
    rows = [
        ("model", f"{model}: {size['width']} x {size['height']} at {size['fps']} fps"),
        ("parameters", ", ".join(f"{name} {count}" for name, count in parameters.items())),
        ("step", f"{size['frames_per_step']} frames, {size['tokens_per_step']} tokens"),
        ("window", f"the first {size['sink_frames']} and {size['window_frames']} latent frames"),
        ("prompts", "; ".join(size["prompts"])),
    ]
    caches = ", ".join(f"{x} {n / 2**20:.2f} MiB" for x, n in facts["cache_bytes"].items())
    rows.append(("cache", caches))
    if missing:
        rows.append(("missing", missing.removeprefix("device: ")))
    rows += [
        (
            row["op"],
            f"{row['backend'] or 'none'} on {row['device']} in {row['dtype']}  "
            f"{row['reason']}".rstrip(),
        )
        for row in facts["ops"]
    ]
    for number, found in enumerate(facts["driver"].get("devices", ())):
        megabytes = {name: found[f"{name}_bytes"] / 2**20 for name in ("l2", "persisting_l2")}
        words = f"driver for CUDA {facts['driver']['cuda']}, {found['clock_mhz']} MHz, "
        words += f"{found['bytes_per_second'] / 1e12:.2f} TB/s, L2 {megabytes['l2']:.0f} MiB, of "
        words += f"which {megabytes['persisting_l2']:.0f} MiB may persist"
        rows.append((f"cuda:{number}", words))
    if "missing" in facts["driver"]:
        rows.append(("driver", facts["driver"]["missing"].removeprefix("driver: ")))
    table(rows + environment_rows(facts))


def _driver() -> dict[str, Any]:
    """Return what the driver says of the CUDA devices, or what is missing to ask it; nothing
    without a device."""
    import torch

    from ..cuda_driver import DriverError, device_facts, driver_version

    count = torch.cuda.device_count()
    if not count:
        return {}
    try:
        return {"cuda": driver_version(), "devices": [device_facts(i) for i in range(count)]}
    except DriverError as error:
        return {"missing": str(error)}


def _ops(generator, device: str | None, dtype) -> list[dict[str, Any]]:
    """Return the choice for each op, in the precision that the model would have there."""
    import torch

    from aapt_kernels import backends

    from ..device import usable_dtype

    places = [device] if device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for place in map(torch.device, places):
        if dtype is not None:
            chosen = dtype
        elif place.type == "cuda" and not torch.cuda.is_available():
            chosen = torch.bfloat16
        else:
            chosen = usable_dtype(None, place)
        name = str(chosen).removeprefix("torch.")
        for choice in backends(place, chosen, generator.model.config.head_dim):
            rows.append(choice._asdict() | {"dtype": name})
    return sorted(rows, key=lambda row: row["op"])


def _cache_bytes(generator, name: str | None, device: str | None, dtype) -> dict[str, int]:
    """Return the bytes of one stream's cache by name, of all that the model can have on the device
    unless a name is given, in the precision that the model would have there."""
    import torch

    from ..device import usable_dtype
    from ..model.caches import CACHES, CacheError
    from ..streaming.cache_memory import cache_bytes

    place = torch.device(device or "cpu")
    if dtype is None:
        no_gpu = place.type == "cuda" and not torch.cuda.is_available()
        dtype = torch.bfloat16 if no_gpu else usable_dtype(None, place)
    if place.type == "cuda" and not torch.cuda.is_available():
        place = torch.device("cpu")  # of a device that is not there nothing is known
    if name is not None:
        with bad_input():
            generator.check_cache(name, place)
        return {name: cache_bytes(generator, name, dtype)}
    found = {}
    for each in CACHES:
        try:
            generator.check_cache(each, place)
        except CacheError:
            continue
        found[each] = cache_bytes(generator, each, dtype)
    return found


def _model_facts(name: str, generator) -> dict[str, Any]:
    """Return what `aapt info` says about a generator."""
    config = generator.model.config
    rows, columns = config.token_grid(*generator.latent_size)
    parts = {"model": generator.model, "vae": generator.vae}
    return {
        "name": name,
        "parameters": {
            part: sum(p.numel() for p in module.parameters())
            + sum(b.numel() for b in module.buffers() if b.itemsize == 1)  # weights in 8 bits
            for part, module in parts.items()
        },
        "height": generator.height,
        "width": generator.width,
        "fps": generator.fps,
        "frames_per_step": generator.frames_per_step,
        "tokens_per_step": rows * columns * config.chunk,
        "window_frames": config.window((rows, columns)),
        "sink_frames": config.sink_frames,
        "config": dataclasses.asdict(config),
        "prompts": list(generator.themes),
    }
