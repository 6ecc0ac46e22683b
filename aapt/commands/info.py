"""`aapt info`: show the model, the backend of each op, devices and versions."""

import dataclasses
import json
from typing import Any

from .shared import MODEL, Json, Model, environment_rows, load, table


def info(model: Model = MODEL, as_json: Json = False):
    """Show the model, the backend that each op runs on, devices and versions.

    \b
    Examples:
      aapt info
      aapt info --json > environment.json
    """
    from aapt_kernels import backends

    from ..environment import environment

    generator = load(model)
    facts = {
        "model": _model_facts(model, generator),
        "ops": [choice._asdict() for choice in backends()],
        **environment(),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    size = facts["model"]
    parameters = {name: f"{count / 1e6:.2f} M" for name, count in size["parameters"].items()}
    table(
        [
            ("model", f"{model}: {size['width']} x {size['height']} at {size['fps']} fps"),
            ("parameters", ", ".join(f"{name} {count}" for name, count in parameters.items())),
            ("step", f"{size['frames_per_step']} frames, {size['tokens_per_step']} tokens"),
            (
                "window",
                f"the first {size['sink_frames']} and {size['window_frames']} latent frames",
            ),
            ("prompts", "; ".join(size["prompts"])),
        ]
        + [
            (row["op"], f"{row['backend']} on {row['device']}  {row['reason']}".rstrip())
            for row in facts["ops"]
        ]
        + environment_rows(facts)
    )


def _model_facts(name: str, generator) -> dict[str, Any]:
    """Return what `aapt info` says about a generator."""
    config = generator.model.config
    rows, columns = config.token_grid(*generator.latent_size)
    parts = {"model": generator.model, "vae": generator.vae}
    return {
        "name": name,
        "parameters": {
            part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()
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
