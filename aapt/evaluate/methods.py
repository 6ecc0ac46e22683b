"""Ways to make the next frames with one network, timed side by side in one process.

Every method runs the network's own step against a full cache. Speed does not depend on weights, so
a network that was trained for one method can be timed under all.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.caches import FLOAT8, FLOAT8_PAST, MODEL, CacheError, loss_is_said
from ..model.flow import interpolate
from ..model.transformer import StepConstants, VideoTransformer, clean
from ..streaming.few_step import Moment
from ..streaming.generator import StreamingGenerator
from ..vae import CausalVAE
from ..vae.cost import decoder_work
from ..vae.stream import DecoderStates, capture
from .breakdown import GENERATE, Parts, decode_seconds, gpu_named, predicted_on

TIMES = (1.0, 0.9375, 0.8333, 0.625)  # of the four-step models (docs/method.md#15)
CHUNK = 3  # latent frames that they make together
CONTEXT = 3  # latent frames that Krea's model computes again for each chunk
WARMUP_ROUNDS = 2
NOT_COUNTED = "text, controls, noise, an encoder, the copy of pixels to the host"


class Network:
    """A transformer with one full cache for latents of `size` = (height, width), and inputs for at
    most CHUNK frames."""

    @torch.no_grad()
    def __init__(self, model: VideoTransformer, size: Sequence[int]):
        like, config = model.video_in.weight, model.config
        self.model = model
        self.cache = model.new_cache(1, size, dtype=like.dtype)
        for x in (self.cache.k, self.cache.v):
            for layer in x:  # one at a time, because float8 draws no numbers itself
                layer.copy_(torch.randn_like(layer, dtype=like.dtype))
        self.cache.text_lens.fill_(config.text_tokens)
        self.cache.step.fill_(3 * self.cache.ring_frames)

        def frames(channels: int) -> Tensor:
            return torch.randn(1, channels, CHUNK, *size, dtype=like.dtype, device=like.device)

        def at(time: float) -> Moment:
            t = torch.full((1,), time, dtype=torch.float64, device=like.device)
            return Moment(t, t, model.step_constants(t, size))

        self.noise, self.clean = frames(config.latent_channels), frames(config.latent_channels)
        self.condition = frames(config.condition_channels) if config.condition_channels else None
        self.times = [at(time) for time in TIMES]
        self.start = at(0.0)

    @torch.no_grad()
    def run(self, x: Tensor, moment: Moment, advance: bool) -> Tensor:
        """Run one pass over frames (1, C, n, h, w); returns the clean estimate."""
        frames, (time, told, constants) = x.shape[2], moment
        recycled = self.clean[:, :, :frames]
        driven = None if self.condition is None else self.condition[:, :, :frames]
        with loss_is_said():
            output = self.model.step(x, recycled, driven, told, self.cache, constants, advance)
        return clean(self.model.config, output, x, recycled, time).to(x.dtype)

    def denoise(self, frames: int, steps: int) -> Tensor:
        """Make a chunk in several passes over its own slots, and leave the ring where it is."""
        noise, times = self.noise[:, :, :frames], self.times[:steps]
        x = noise
        for index, moment in enumerate(times):
            latent = self.run(x, moment, advance=False)
            if index + 1 < steps:
                x = interpolate(latent, noise, times[index + 1].time).to(x.dtype)
        return latent


def one_pass(network: Network) -> Tensor:
    """AAPT: one pass, whose keys and values stay (docs/method.md#2)."""
    return network.run(network.noise[:, :, :1], network.times[0], advance=True)


def diffusion_forcing(network: Network) -> Tensor:
    """One-step diffusion forcing: each pass has the last frame, clean, and the next, as noise.

    The clean frame's keys and values stay; those of the noise are replaced in the next pass (paper,
    Figure 2).
    """
    pair = torch.cat([network.clean[:, :, :1], network.noise[:, :, :1]], dim=2)
    latent = network.run(pair, paired(network.start, network.times[0]), advance=False)
    network.cache.advance()
    return latent[:, :, 1:]


def paired(first: Moment, second: Moment) -> Moment:
    """Join two times into constants of two frames, each at its own time."""

    def both(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.cat(pair, dim=1) for pair in zip(one, other, strict=True))

    one, other = first.constants, second.constants
    blocks = [both(*pair) for pair in zip(one.modulation, other.modulation, strict=True)]
    out = both(one.out_modulation, other.out_modulation)
    times = torch.stack([first.time, second.time], dim=1)
    # A step that is given constants asks for one time per clip, and does not use it
    return Moment(times, second.told, StepConstants(blocks, out, one.places))


def refreshed(network: Network, frames: int, steps: int) -> Tensor:
    """Make a chunk in `steps` passes, then run one more over the clean chunk for its keys."""
    latent = network.denoise(frames, steps)
    network.run(latent, network.start, advance=True)
    return latent


def shift_ring(network: Network, frames: int) -> None:
    """Move every frame of the ring by `frames` slots through a copy, as a cache without a ring has
    to. The order of the slots makes no difference to the time of a step."""
    cache = network.cache
    begin = cache.text_tokens + cache.sink_frames * cache.tokens_per_frame
    rows = frames * cache.tokens_per_frame
    for x in (cache.k, cache.v):
        for layer in x:
            ring = layer[:, begin:]
            ring[:, :-rows].copy_(ring[:, rows:].clone())


def one_pass_shifted(network: Network) -> Tensor:
    """AAPT's pass with a cache that is shifted."""
    shift_ring(network, 1)
    return one_pass(network)


def refreshed_shifted(network: Network) -> Tensor:
    """Self-Forcing's passes with a cache that is shifted once per chunk."""
    shift_ring(network, CHUNK)
    return refreshed(network, CHUNK, len(TIMES))


def rebuilt(network: Network) -> Tensor:
    """Krea: forget all frames, compute the context again, and make a chunk that sees it alone."""
    network.cache.step.zero_()
    network.run(network.clean[:, :, :CONTEXT], network.start, advance=True)
    return network.denoise(CHUNK, len(TIMES))


@dataclass(frozen=True)
class Method:
    """A way to make the next frames.

    Attributes:
        counts: What one run of it is.
        frames: Latent frames of a run.
        run: Runs it.
        sees_context: True if it sees CONTEXT frames of the past instead of the model's window.
    """

    name: str
    counts: str
    frames: int
    run: Callable[[Network], Tensor]
    sees_context: bool = False


AAPT = Method("AAPT", "1 pass of 1 frame", 1, one_pass)
METHODS = (
    AAPT,
    Method(
        "one-step diffusion forcing",
        "1 pass of 2 frames: the last one clean, the next one noise",
        1,
        diffusion_forcing,
    ),
    Method(
        "1 step and refresh",
        "2 passes of 1 frame (Causal-Forcing++, One-Forcing)",
        1,
        lambda network: refreshed(network, 1, 1),
    ),
    Method(
        "4 steps and refresh",
        f"5 passes of {CHUNK} frames (Self-Forcing) on a ring",
        CHUNK,
        lambda network: refreshed(network, CHUNK, len(TIMES)),
    ),
    Method(
        "4 steps and refresh, shifted",
        f"5 passes of {CHUNK} frames; the cache moved by clone once (Self-Forcing's own)",
        CHUNK,
        refreshed_shifted,
    ),
    Method(
        "4 steps, context rebuilt",
        f"4 passes of {CHUNK} frames and 1 over the {CONTEXT} frames that they see (Krea), "
        "without Krea's encoding of one frame",
        CHUNK,
        rebuilt,
        sees_context=True,
    ),
    Method("AAPT, shifted", "1 pass of 1 frame; the cache moved by clone", 1, one_pass_shifted),
)


def networks(generator: StreamingGenerator) -> dict[bool, Network]:
    """Return the network with the model's window, and the one that sees CONTEXT frames, by
    `Method.sees_context`. They share weights; ValueError for a window without room for a chunk, and
    for a cache that takes one frame per step."""
    model, size = generator.model.transformer, generator.latent_size
    if generator.cache == FLOAT8_PAST:
        raise CacheError(
            f"cache: expected {MODEL} or {FLOAT8} for methods of several frames per pass, got "
            f"{FLOAT8_PAST}, which takes one"
        )
    window = model.config.window(model.config.token_grid(*size))
    if window + 1 < CHUNK:
        raise ValueError(
            f"model: expected a window of {CHUNK - 1} frames or more, got {window}; "
            "pass another model or size"
        )
    narrow = copy.copy(model)
    seen = CONTEXT + CHUNK  # frame 0, a window, and the last frame
    narrow.config = replace(model.config, sink_frames=1, window_frames=seen - 2, grid_windows=())
    return {False: Network(model, size), True: Network(narrow, size)}


@torch.inference_mode()
def measure_methods(
    generator: StreamingGenerator, original: CausalVAE, rounds: int
) -> dict[str, Any]:
    """Time METHODS and both decoders in turns, `rounds` times; see `report` for the result.

    original: the decoder that the generator's replaces. Medians are taken; ratios are those of
    neighbours in time. On a CUDA device each is one CUDA graph.
    """
    device, made = generator.device, networks(generator)
    calls = [
        (lambda method=method: method.run(made[method.sees_context])) for method in METHODS
    ] + [_decode(vae, generator.latent_size) for vae in (generator.vae, original)]
    captured = [capture(call, device) for call in calls]
    taken = np.empty((rounds, len(captured)))
    for number in range(-WARMUP_ROUNDS, rounds):
        for place, call in enumerate(captured):
            _wait(device)
            begun = time.perf_counter()
            call()
            _wait(device)
            if number >= 0:
                taken[number, place] = time.perf_counter() - begun
    return report(f"measured on {device}, {rounds} rounds", taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _decode(vae: CausalVAE, size: Sequence[int]) -> Callable[[], Tensor]:
    """Return a call that decodes one later latent frame to pixels."""
    latent = vae.latent_mean.new_ones((1, vae.config.latent_channels, 1, *size))
    states = DecoderStates(vae, latent)
    states.first(latent)
    return lambda: states.next(latent)


def predict_methods(
    generator: StreamingGenerator, original: CausalVAE, name: str, float8_attention: bool = False
) -> dict[str, Any]:
    """Predict METHODS and both decoders on a GPU, see `predict_parts` for the way, the arguments
    and the errors.

    generator, original: on the meta device, in the precision of the GPU.
    """
    gpu, seconds = gpu_named(name, float8_attention), []
    with torch.inference_mode():
        made = networks(generator)
        for method in METHODS:
            parts = Parts(generator.model.transformer, predicted_on(gpu))
            with parts, parts.phase(GENERATE):
                method.run(made[method.sees_context])
            seconds.append(sum(parts.seconds.values()) + gpu.gap * parts.kernels)
    for vae in (generator.vae, original):
        works = decoder_work(vae.config, generator.height, generator.width)
        seconds.append(decode_seconds(works, gpu) + gpu.gap * len(works))
    return report(f"predicted for {name}", np.array([seconds]))


def report(how: str, seconds: np.ndarray) -> dict[str, Any]:
    """Return milliseconds and ratios by method.

    seconds: (rounds, methods + 2), of one run of each of METHODS and of the light and the original
    decoder for one latent frame. `chunk_ms` is one run; `frame_ms` one latent frame; `ratio` that
    of AAPT; `with_light` and `with_original` are frame times with a decoder, and their ratios.
    """
    per_frame = seconds[:, : len(METHODS)] / [method.frames for method in METHODS]
    decoders = dict(zip(("light", "original"), seconds[:, len(METHODS) :].T, strict=True))
    first = METHODS.index(AAPT)
    rows = []
    for place, method in enumerate(METHODS):
        row = {"name": method.name, "counts": method.counts, "frames": method.frames}
        row["chunk_ms"] = _median(seconds[:, place])
        for name, decode in (("", 0.0), *((f"_with_{n}", each) for n, each in decoders.items())):
            mine, ours = per_frame[:, place] + decode, per_frame[:, first] + decode
            row[f"frame_ms{name}"] = _median(mine)
            row[f"ratio{name}"] = float(np.median(mine / ours))
        rows.append(row)
    return {
        "how": how,
        "not_counted": NOT_COUNTED,
        "decoder_ms": {name: _median(taken) for name, taken in decoders.items()},
        "methods": rows,
    }


def _median(seconds: np.ndarray) -> float:
    return 1e3 * float(np.median(seconds))
