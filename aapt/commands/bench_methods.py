"""`aapt bench methods`: compare ways to make video with one network."""

import dataclasses
import json
from typing import Annotated, Any

import typer

from .shared import (
    Cache,
    Device,
    Dtype,
    Json,
    Model,
    Size,
    Threads,
    bad_input,
    environment_rows,
    table,
)
from .sized import Fp8, load_to_predict, load_to_time

ROUNDS = 5


def bench_methods(
    model: Model = "aapt-small",
    rounds: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Timed rounds.", show_default=str(ROUNDS)),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    size: Size = None,
    fp8: Fp8 = False,
    cache: Cache = "model",
    predict: Annotated[
        str | None,
        typer.Option(metavar="GPU", help="Only predict for h100 or h200, in bfloat16."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
):
    """Compare ways to make video with one network: passes, caches and decoders of several systems.

    AAPT's step, one-step diffusion forcing, one and four steps with a refresh pass, a cache that is
    shifted, and a context that is computed again for each chunk run in turns against a full cache,
    and with them a light and an original decoder. Ratios are of times per latent frame, which is
    four video frames. The last lines are published figures and what each leaves out.

    The default is a network of random weights with the proportions of the paper's, small enough for
    a CPU. aapt-8b and aapt-2b have their full sizes.

    \b
    Examples:
      aapt bench methods
      aapt bench methods --threads 1 --rounds 20 --json > methods.json
      aapt bench methods --model aapt-8b --size 1280x720 --predict h100
      aapt bench methods --model aapt-8b --device cuda
    """
    import torch

    from ..environment import environment
    from ..evaluate.methods import measure_methods, predict_methods
    from ..evaluate.published import PUBLISHED

    if threads:
        torch.set_num_threads(threads)
    if predict:
        given = {"device": device, "dtype": dtype, "cache": cache != "model", "rounds": rounds}
        generator = load_to_predict(model, size, fp8, **given)
    else:
        generator = load_to_time(model, device, dtype, size, fp8, cache)
    with bad_input():
        decoders = generator, _original(model, generator)
        if predict:
            found = predict_methods(*decoders, predict, fp8)
        else:
            found = measure_methods(*decoders, rounds or ROUNDS)
    facts = {
        "model": model,
        "width": generator.width,
        "height": generator.height,
        "fp8": fp8,
        "cache": cache,
        **found,
        "published": [dataclasses.asdict(each) for each in PUBLISHED],
        **environment(),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table(_rows(facts) + ([] if predict else environment_rows(facts)))


def _original(model: str, generator):
    """Return the original decoder of a preset or of a checkpoint, where the generator has its
    own."""
    from ..evaluate.random_weights import original_decoder
    from ..model.presets import PRESETS
    from ..vae.folder import ORIGINAL, load_vae

    if model in PRESETS:
        return original_decoder(model, generator.vae)
    like = generator.vae.latent_mean
    return load_vae(model, ORIGINAL, like.device, like.dtype)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of a table: methods, decoders, published figures."""
    precision = ""
    if facts["fp8"]:
        predicted = facts["how"].startswith("predicted")
        precision = f", linear layers{' and attention' if predicted else ''} in e4m3"
    if facts["cache"] != "model":
        precision += f", cache {facts['cache']}"
    rows = [
        ("model", f"{facts['model']}: {facts['width']} x {facts['height']}{precision}"),
        ("times", f"{facts['how']}; a latent frame is four video frames"),
        ("not counted", facts["not_counted"]),
    ]
    for row in facts["methods"]:
        ratios = ", ".join(
            f"{row[f'ratio{key}']:.2f} x {words}"
            for key, words in (
                ("", "alone"),
                ("_with_light", "with the light decoder"),
                ("_with_original", "with the original one"),
            )
        )
        rows += [
            (row["name"], row["counts"]),
            (
                "",
                f"{row['frame_ms']:.1f} ms per latent frame, {row['chunk_ms']:.1f} ms per step of "
                f"{row['frames']}",
            ),
            ("", ratios),
        ]
    for name, value in facts["decoder_ms"].items():
        rows.append((f"{name} decoder", f"{value:.1f} ms per latent frame"))
    rows.append(("published", "figures of other systems, and what they leave out"))
    for each in facts["published"]:
        rows.append((each["system"], f"{each['figure']}. Left out or not said:"))
        rows.append(("", f"{each['leaves_out']} ({each['source']})"))
    return rows
