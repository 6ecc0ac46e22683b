"""Steps of several streams in one pass, which reads the weights once for all of them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from ..model.caches import loss_is_said
from ..model.conditioning import Control
from ..model.pose import Pose
from ..model.transformer import clean
from .stream import Stream
from .student import StudentRollout


@torch.inference_mode()
def step_together(
    streams: Sequence[Stream], controls: Sequence[Control | Pose | Tensor | None]
) -> list[Callable[[], np.ndarray]]:
    """Makes the next step of different streams of one generator in one pass. Returns one call per
    stream, which waits for its pixels as `Stream.submit` does.

    The products of the weights are shared. Cache, attention, noise, rotation and decoder stay those
    of each stream, so the streams may be at different steps and have different prompts. Pixels are
    near those of `Stream.step`, not bit for bit: the products sum in another order. On a CUDA
    device the pass runs without a graph.

    ValueError for streams of different generators or of a few-step model, for one that is given
    twice, and for a control as `StreamingGenerator.check_control`; RuntimeError for a stream that
    is closed or used by another thread. After these, and after a pass that fails, every stream is
    as it was. A stream that fails after the pass raises in its own call alone.
    """
    if not streams:
        raise ValueError("streams: expected at least one, got none")
    generator = streams[0].generator
    if any(stream.generator is not generator for stream in streams):
        raise ValueError("streams: expected streams of one generator, got some of another")
    if len(set(map(id, streams))) < len(streams):
        raise ValueError("streams: expected each stream once, got one of them twice")
    if generator.few_step:
        raise ValueError(
            "streams: expected those of a model of one pass per frame, got a few-step model; "
            "call step() of each"
        )
    for control in controls:
        generator.check_control(control)
    with ExitStack() as held:
        for stream in streams:
            held.enter_context(stream._held())
        memories = [stream._memory for stream in streams]
        each = [memory.prepare(control) for memory, control in zip(memories, controls, strict=True)]
        noise, recycled, condition = (
            None if parts[0] is None else torch.cat(parts) for parts in zip(*each, strict=True)
        )
        with loss_is_said():
            latents = _infer([memory.rollout for memory in memories], noise, recycled, condition)
        return list(map(_finish, streams, latents.split(1)))


def _infer(
    rollouts: Sequence[StudentRollout], noise: Tensor, recycled: Tensor, condition: Tensor | None
) -> Tensor:
    """Runs `StudentRollout.infer` for rollouts of one clip each; no cache advances."""
    first, clips = rollouts[0], len(rollouts)
    time, constants = first.time.expand(clips), first.constants.expand(clips)
    caches = [rollout.cache for rollout in rollouts]
    inputs = (noise, recycled, condition)
    output = first.model.step(*inputs, time, caches, constants, advance=False).to(noise.dtype)
    return clean(first.model.config, output, noise, recycled, time).to(noise.dtype)


def _finish(stream: Stream, latent: Tensor) -> Callable[[], np.ndarray]:
    """Ends a stream's step. What fails is raised by the call that is returned."""
    try:
        with stream._halfway():
            pixels = stream._memory.finish(latent)
            stream.steps += 1
        return pixels
    except Exception as error:
        failure = error

    def fail() -> np.ndarray:
        raise failure

    return fail
