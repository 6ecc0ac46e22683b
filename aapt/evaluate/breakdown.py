"""The parts of a stream's step: measured on a CPU or a GPU, or predicted for a GPU.

All see the operations of a step one by one and give each to a part. On a CPU an operation costs the
time that it takes. On a GPU it costs the time of the kernels that it launches, which a profiler
tells; a graph would hide which kernel is whose, so the step runs without one. A prediction runs the
step on the meta device, where nothing is computed, and takes the larger of arithmetic and memory
traffic.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import DeviceType, profile, record_function, supported_activities
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..model.ulysses import Ulysses
from ..streaming.generator import StreamingGenerator
from ..streaming.memory import StreamMemory
from ..streaming.stream import Stream
from ..vae.cost import Work, decoder_work

LINEAR = "aten::linear"  # whole, because inference mode does not take it apart
SCALED = "aten::_scaled_mm_v2"  # in 8 bits
PRODUCTS = (LINEAR, "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", SCALED)
ATTENTION, APPEND = "aapt::cached_attention", "aapt::kv_append"
WITHOUT_KERNEL = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::lift_fresh")
GENERATE = "generate"
RANGE = "aapt part: "  # of a profile, before the name of a part
PROFILED_STEPS = 10  # at most: a profile of a step takes longer than the step
# Of one step, in the order of their first operation. "fused" is norm, rotation, append, modulation,
# gates and activations, whether one kernel does them or several.
PARTS = ("condition", "noise", "patchify", "products", "attention", "fused", "decode", "copy")
EXCHANGE = "exchange"  # one more part, of ranks that share a frame


@dataclass(frozen=True)
class Gpu:
    """Rates that a kernel of a step reaches, per second; `gap`: seconds between two kernels of a
    graph; `link`: bytes per second to the host; `peers`: bytes per second that one GPU sends to the
    others of its machine, `exchange`: seconds before the first arrive.

    Nothing here was measured on a step: benchmarks/decoder_model.py, schedule_model.py and
    training_model.py say where the numbers come from.
    """

    products: float
    attention: float
    convolutions: float
    memory: float
    float8_products: float = 1200e12
    float8_attention: float = 1000e12
    link: float = 25e9
    gap: float = 2e-6
    peers: float = 300e9
    exchange: float = 20e-6


GPUS = {
    "h100": Gpu(products=700e12, attention=600e12, convolutions=630e12, memory=3.0e12),
    "h200": Gpu(products=700e12, attention=600e12, convolutions=630e12, memory=4.3e12),
}


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds of a step.

    Attributes:
        how: "measured on cpu", "measured on cuda", or "predicted for" a GPU.
        parts: By the names of PARTS, and of EXCHANGE if ranks share a frame; of the first rank.
        step: The whole step. Measured on its own; predicted, the parts that nothing overlaps, and
            `idle`.
        idle: Measured, the step without its parts: on a CPU the host between operations, below zero
            if the watched steps were slower; on a GPU the gaps between kernels and the wait for the
            pixels. Predicted, the gaps between kernels.
        text: A change of the prompt, which no step contains.
        blocks: Blocks of the transformer, whose sums `products`, `attention` and `fused` are.
        kernels: Operations that compute, in a step without its decoder.
        assumptions: Predicted, what each part, "idle" and "text" are computed from, by their names.
    """

    how: str
    parts: dict[str, float]
    step: float
    idle: float
    text: float
    blocks: int
    kernels: int
    assumptions: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the fields, and the sum of the parts."""
        return asdict(self) | {"sum_of_parts": sum(self.parts.values())}


class PaperRanks(Ulysses):
    """The first of `size` ranks that share a clip, alone: exchanges are counted, nothing is sent.

    For tensors on the meta device.

    Attributes:
        sent: Bytes that this rank has sent to others.
        exchanges: Number of exchanges.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size, self.sent, self.exchanges = size, 0, 0

    def _exchange(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        flat = torch.cat([piece.reshape(-1) for piece in pieces])  # as when it is sent
        self.sent += flat.nbytes - pieces[self.rank].nbytes
        self.exchanges += 1
        return [flat.new_empty(shape) for shape in shapes]


class Parts(TorchDispatchMode):
    """Give the cost of every operation to a part of the step.

    cost: a function of an operation and its arguments that runs it; returns the result and the
    seconds. label: returns a context in which an operation of a part runs.
    """

    def __init__(
        self,
        transformer: nn.Module,
        cost: Callable[..., tuple[Any, float]],
        label: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        super().__init__()
        self.cost, self.label = cost, label
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.kernels = 0
        self._phase, self._inside, self._exchanging = "", False, False
        self._owners = {
            parameter.untyped_storage()._cdata: name
            for name, parameter in transformer.state_dict(keep_vars=True).items()
        }

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Hold the name of what a stream does now, see `Stream.watched`."""
        self._phase, self._inside = name, False
        begun = time.perf_counter()
        yield
        if name == "copy":  # partly done by NumPy, which is not seen here
            self.seconds[name] += time.perf_counter() - begun
        self._phase = ""

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Give a whole exchange among ranks to EXCHANGE, the wait for the others included, see
        `Ulysses.watched`."""
        self._exchanging, begun = True, time.perf_counter()
        with self.label(EXCHANGE):
            yield
        passed = time.perf_counter() - begun
        self._exchanging = False
        self.seconds[EXCHANGE] = self.seconds.get(EXCHANGE, 0.0) + passed

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self._exchanging:
            self.kernels += has_kernel(function)
            return function(*args, **(kwargs or {}))
        part = self._phase if self._phase != GENERATE else self._part(function, args)
        with self.label(part) if part else nullcontext():
            out, seconds = self.cost(function, *args, **(kwargs or {}))
        if part in ("", "copy"):
            return out
        self.seconds[part] += seconds
        if has_kernel(function) and self._phase != "decode":
            self.kernels += 1
        return out

    def _part(self, function, args: tuple) -> str:
        """Return the part of an operation of the transformer.

        Operations between the product of the first block and that of the output are inside.
        """
        name = function._schema.name
        if name in PRODUCTS:
            owners = (self._owners.get(x.untyped_storage()._cdata) for x in tensors_of(args))
            owner = next((owner for owner in owners if owner), "blocks.")
            self._inside = owner.startswith(("blocks.", "video_in."))
            return "products" if owner.startswith("blocks.") else "patchify"
        if name == ATTENTION:
            return "attention"
        return "fused" if self._inside or name.startswith("aapt::") else "patchify"


def tensors_of(values: Any) -> list[Tensor]:
    """Return the tensors among arguments or results."""
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def has_kernel(function) -> bool:
    """Return whether an operation computes: it makes no view and does not only allocate."""
    schema = function._schema
    if schema.name.startswith(WITHOUT_KERNEL):
        return False
    aliases = [result.alias_info for result in schema.returns]
    return not any(alias is not None and not alias.is_write for alias in aliases)


def timed(function, *args, **kwargs) -> tuple[Any, float]:
    """Run an operation on the CPU; return its result and its seconds."""
    begun = time.perf_counter()
    out = function(*args, **kwargs)
    return out, time.perf_counter() - begun


def timed_step(stream: Stream, control: Any) -> Parts:
    """Make one step on the CPU and time its operations."""
    transformer = stream.generator.model.transformer
    parts = Parts(transformer, timed)
    with stream.watched(parts.phase), transformer.context.watched(parts.exchange), parts:
        stream.step(control)
    return parts


def untimed(function, *args, **kwargs) -> tuple[Any, float]:
    """Run an operation whose seconds a profile will tell."""
    return function(*args, **kwargs), 0.0


def profiled_step(stream: Stream, control: Any) -> Parts:
    """Make one step without a graph, in a profiler; count the kernels of each operation."""
    transformer = stream.generator.model.transformer
    parts = Parts(transformer, untimed, lambda name: record_function(RANGE + name))
    phases, exchanges = stream.watched(parts.phase), transformer.context.watched(parts.exchange)
    with profile(activities=supported_activities()) as found, phases, exchanges, parts:
        stream.step(control)
    # The host's time of the copy and of exchanges is none of the device
    parts.seconds = dict.fromkeys(parts.seconds, 0.0)
    for event in found.events():
        if event.name.startswith(RANGE) and event.device_type == DeviceType.CPU:
            parts.seconds[event.name.removeprefix(RANGE)] += kernel_microseconds(event) / 1e6
    return parts


def kernel_microseconds(event: FunctionEvent) -> float:
    """Return the device time of what an event of a profile and the events in it have launched.

    The device's twin of a range, which spans its kernels and the gaps between them, is left out.
    """
    own = 0.0 if event.is_user_annotation else sum(kernel.duration for kernel in event.kernels)
    return own + sum(kernel_microseconds(child) for child in event.cpu_children)


def measure_parts(stream: Stream, control: Any, steps: int) -> Breakdown:
    """Time the parts of a warm stream's step; figures are medians.

    Whole steps, `steps` of them, are timed as a stream makes them, until their pixels are there. On
    a CPU they alternate with as many steps whose operations are timed. On a CUDA device, where a
    whole step is one graph, at most PROFILED_STEPS steps without a graph come last, because a
    profiler may slow down what follows. All ranks that share a frame call it alike. ValueError on
    another device.
    """
    generator = stream.generator
    on = generator.device.type
    if on not in ("cpu", "cuda"):
        raise ValueError(f"breakdown: expected a model on the CPU or a CUDA device, got {on}")

    def seconds_of(action: Callable[[], Any]) -> float:
        begun = time.perf_counter()
        action()
        if on == "cuda":
            torch.cuda.synchronize(generator.device)
        return time.perf_counter() - begun

    watched, whole = [], []
    for _ in range(steps):
        if on == "cpu":
            watched.append(timed_step(stream, control))
        whole.append(seconds_of(lambda: stream.step(control)))
    text = seconds_of(lambda: setattr(stream, "prompt", stream.prompt))
    if on == "cuda":
        watched = [profiled_step(stream, control) for _ in range(min(steps, PROFILED_STEPS))]
    seconds = {
        name: float(np.median([parts.seconds[name] for parts in watched]))
        for name in watched[0].seconds
    }
    step = float(np.median(whole))
    return _breakdown(
        f"measured on {on}",
        seconds,
        step,
        step - sum(seconds.values()),
        text,
        generator,
        watched[-1].kernels,
    )


def predict_parts(
    generator: StreamingGenerator, name: str, float8_attention: bool = False, ranks: int = 1
) -> Breakdown:
    """Predict the parts of a step on a GPU, full ring, from the operations that the model runs.

    generator: on the meta device, in the precision of the GPU; name: of GPUS. float8_attention:
    attention at the rate of e4m3, whatever the cache has. ranks: GPUs that share the tokens from
    now on; the part EXCHANGE is then added. ValueError for another GPU, for a model of several
    passes per step, and for ranks that do not divide the heads.
    """
    if generator.sampling is not None:
        raise ValueError(
            "predict: expected a model of one pass per frame, got one of "
            f"{generator.sampling.passes} passes; measure a few-step model with --breakdown"
        )
    gpu, model, vae = gpu_named(name, float8_attention), generator.model, generator.vae
    paper = PaperRanks(ranks)
    generator.share_tokens(paper)
    memory = StreamMemory(model, vae, generator.latent_size)
    of_text, parts = (Parts(model.transformer, predicted_on(gpu)) for _ in range(2))
    config = model.config
    with torch.inference_mode():
        text = memory.latent.new_empty(1, config.text_tokens, config.text_width)
        lens = torch.empty(1, dtype=torch.int64, device="meta")
        with of_text, of_text.phase(GENERATE):
            memory.rollout.set_text(text, lens)
        memory.phase = parts.phase
        paper.sent = paper.exchanges = 0
        with parts:
            memory._run("steady")
    works = decoder_work(vae.config, generator.height, generator.width)
    seconds = parts.seconds | {
        "decode": decode_seconds(works, gpu),
        "copy": 3 * generator.frames_per_step * generator.height * generator.width / gpu.link,
    }
    if ranks > 1:
        seconds[EXCHANGE] = paper.sent / gpu.peers + paper.exchanges * gpu.exchange
    idle = gpu.gap * (parts.kernels + len(works))
    step = sum(seconds.values()) - seconds["copy"] + idle
    changed = sum(of_text.seconds.values()) + gpu.gap * of_text.kernels
    predicted = _breakdown(
        f"predicted for {name}", seconds, step, idle, changed, generator, parts.kernels
    )
    scaled = any(x.dtype == torch.float8_e4m3fn for x in model.transformer.buffers())
    assumed = assumptions(gpu, scaled, float8_attention)
    if ranks > 1:
        assumed[EXCHANGE] = (
            f"{paper.exchanges} exchanges that hide behind nothing, {gpu.peers / 1e9:.0f} GB/s to "
            f"{ranks - 1} others after {1e6 * gpu.exchange:.0f} us"
        )
    return replace(predicted, assumptions=assumed)


def gpu_named(name: str, float8_attention: bool = False) -> Gpu:
    """Return a GPU of GPUS, on request with attention at the rate of e4m3. ValueError for
    another."""
    if name not in GPUS:
        raise ValueError(f"predict: expected one of {', '.join(GPUS)}, got {name}")
    gpu = GPUS[name]
    return replace(gpu, attention=gpu.float8_attention) if float8_attention else gpu


def assumptions(gpu: Gpu, float8_products: bool, float8_attention: bool) -> dict[str, str]:
    """Return what a prediction takes for granted, by part."""
    moved = f"each tensor moved once at {gpu.memory / 1e12:.1f} TB/s"
    rate, attention = gpu.products, "the BF16 kernel of sm_90a, simulated only"
    if float8_products:
        rate = gpu.float8_products
    if float8_attention:
        attention = "the FP8 kernel of sm_90a, simulated only"
    return {
        **dict.fromkeys(("condition", "noise", "patchify"), moved),
        "products": f"{rate / 1e12:.0f} TFLOP/s in "
        + ("e4m3 through cuBLASLt, scales of 128" if float8_products else "BF16 through cuBLASLt"),
        "attention": f"{gpu.attention / 1e12:.0f} TFLOP/s by {attention}",
        "fused": moved
        + (", what attention returns rounded to e4m3 in a launch of its own" * float8_products),
        "decode": f"{gpu.convolutions / 1e12:.0f} TFLOP/s with folded upsampling, or "
        f"{gpu.memory / 1e12:.1f} TB/s",
        "copy": f"{gpu.link / 1e9:.0f} GB/s",
        "idle": f"{1e6 * gpu.gap:.0f} us between two kernels of a graph",
        "text": "as the parts above",
    }


def decode_seconds(works: list[Work], gpu: Gpu) -> float:
    """Return the predicted seconds of a decoder's kernels, without the gaps between them."""
    return sum(max(work.folded_flops / gpu.convolutions, work.bytes / gpu.memory) for work in works)


def predicted_on(gpu: Gpu) -> Callable[..., tuple[Any, float]]:
    """Return the cost of operations on the meta device: the larger of arithmetic at the GPU's rate
    and of reading each argument and writing each result once."""

    def cost(function, *args, **kwargs) -> tuple[Any, float]:
        out = function(*args, **kwargs)
        if not has_kernel(function):
            return out, 0.0
        moved = sum(x.nbytes for x in tensors_of((args, kwargs, out)))
        arithmetic = 0.0
        if function._schema.name == APPEND:  # of the cache, it writes as much as it is given
            moved = 2 * sum(x.nbytes for x in args[:3])
        if function._schema.name == ATTENTION:
            q, keys = args[0], args[1]
            arithmetic = 4 * q.numel() * keys.shape[1] / gpu.attention
        elif function._schema.name == SCALED:
            arithmetic = 2 * args[0].numel() * args[1].shape[1] / gpu.float8_products
        elif function._schema.name == LINEAR:
            arithmetic = 2 * args[0].numel() * len(args[1]) / gpu.products
        elif (count := flop_registry.get(function._overloadpacket)) is not None:
            arithmetic = count(*args, **kwargs, out_val=out) / gpu.products
        return out, max(arithmetic, moved / gpu.memory)

    return cost


def _breakdown(
    how: str,
    seconds: dict[str, float],
    step: float,
    idle: float,
    text: float,
    generator: StreamingGenerator,
    kernels: int,
) -> Breakdown:
    milliseconds = {name: 1e3 * value for name, value in seconds.items()}
    blocks = generator.model.config.depth
    return Breakdown(how, milliseconds, 1e3 * step, 1e3 * idle, 1e3 * text, blocks, kernels)
