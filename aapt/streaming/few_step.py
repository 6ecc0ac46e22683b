"""Few-step models, chunk after chunk: several passes over a chunk's own slot of the cache
(docs/method.md#15)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.config import FewStepConfig, ModelConfig
from ..model.transformer import KVCache, StepConstants, VideoTransformer, clean
from .solvers import NewNoise, UniPC
from .student import Past

SOLVERS = {"noise": NewNoise, "unipc": UniPC}


class Moment(NamedTuple):
    """A time of a schedule, (B,) or (B, n) float64, the time that the network is told, for each row
    of its batch, and the constants of every pass at that time."""

    time: Tensor
    told: Tensor
    constants: StepConstants


class FewStepRollout:
    """A batch of B streams of latents of `size` = (height, width), rolled out chunk after chunk.

    A chunk begins as noise at the first of its times. Each pass estimates the clean chunk, from
    which the solver makes the chunk at the next time. Each pass also replaces the keys and values
    that the pass before wrote. With `refresh` one more pass, over the clean chunk, writes the keys
    and values that stay. With guidance the network's batch and the cache have 2 B rows: B under the
    prompts, then B under the negative prompts.

    Args:
        text, text_lens: Embeddings of the prompts, (B, L, text_width), and lengths (B,). With
            guidance the B negative prompts follow.
        recache: New prompts also change the past.

    ValueError for a model whose text keys depend on the time, for one with recycled channels, for
    prompts without their negative ones, and for `recache` without a refresh pass.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: VideoTransformer,
        text: Tensor,
        text_lens: Tensor,
        size: Sequence[int],
        sampling: FewStepConfig,
        recache: bool = False,
    ):
        check_few_step(model.config, sampling)
        self.branches = 1 + len(sampling.negatives)
        if len(text) % self.branches:
            raise ValueError(
                "text: expected as many negative prompts as prompts for guidance, got "
                f"{len(text)} in all"
            )
        self.model, self.sampling, self.size = model, sampling, size
        like = model.video_in.weight
        self.cache = self._new_cache(len(text), like.dtype)
        self.moments: dict[tuple[float, ...], Moment] = {}  # by the times of their frames

        def at(times: tuple[float, ...]) -> Moment:
            if times in self.moments:
                return self.moments[times]
            t = torch.tensor(times, dtype=torch.float64, device=like.device).repeat(len(text), 1)
            t = t[:, 0] if len(times) == 1 else t
            # The published sampler of UniPC cuts the network's time to whole thousandths
            told = (1000 * t).floor() / 1000 if sampling.solver == "unipc" else t
            constants = model.step_constants(told, size)
            self.moments[times] = Moment(t[: len(t) // self.branches], told, constants)
            return self.moments[times]

        self.times = [at(times) for times in self._passes(sampling.times)]
        self.opening_times = [at(times) for times in self._passes(sampling.opening_times)]
        self.refresh = None if sampling.refresh is None else at((sampling.refresh,))
        self.picture_times = []
        if sampling.picture_in_chunk:
            others = model.config.opening_frames - 1
            self.picture_times = [at((0.0, *[t] * others)) for t in sampling.opening_times]
        self.start = at((0.0,))
        self.chunks = 0  # made so far, without given ones
        self.past = self.new_past() if recache else None
        self.set_text(text, text_lens)

    def _new_cache(self, rows: int, dtype: torch.dtype) -> KVCache:
        return self.model.new_cache(rows, self.size, dtype=dtype)

    def _caches(self) -> tuple[KVCache, ...]:
        return (self.cache,)

    def _passes(self, times: tuple[float, ...]) -> list[tuple[float, ...]]:
        """Returns the times of the frames of each pass; a single time is that of all frames."""
        return [(time,) for time in times]

    def new_past(self) -> Past:
        """Returns an empty memory of the chunks that the cache remembers. ValueError without a
        refresh pass."""
        if self.refresh is None:
            raise ValueError(
                "recache: expected False for a model without a refresh pass, whose past is not "
                "made from clean chunks, got True; open the stream without recache"
            )
        config, chunk = self.model.config, self.model.config.chunk
        later = max(0, config.sink_frames - config.opening_frames)  # of the sink
        seen = self.cache.window_frames + 1 - chunk  # by the next chunk, besides the sink
        sink = min(1, config.sink_frames) + math.ceil(later / chunk)
        return Past(math.ceil(seen / chunk), sink)

    @torch.no_grad()
    def set_text(self, text: Tensor, text_lens: Tensor) -> None:
        """Changes the prompts from the next chunk on; the past keeps what made it.

        With `recache` the sink and the window are computed again from their clean chunks. Frames
        are then counted from the start of that window, see `StudentRollout.set_text`.
        """
        for moment in self.moments.values():  # weights may differ from those of the stream before
            moment.constants.copy_(self.model.step_constants(moment.told, self.size))
        for layer, pair in enumerate(self.model.encode_text(text, text_lens, self.start.told)):
            for cache in self._caches():
                cache.write_text(layer, *pair)
        if self.past:
            self.cache.reset()
            for inputs in self.past:
                self.model.step(*inputs, self.cache)

    @torch.no_grad()
    def give(self, latent: Tensor, condition: Tensor | None = None) -> None:
        """Appends clean frames (B, C, n, H, W) that nobody made, such as the user's picture."""
        self.append(latent, condition)
        if self.past is not None:
            self.past.append(self.inputs(latent, condition, given=True))

    @torch.no_grad()
    def append(self, latent: Tensor, condition: Tensor | None) -> None:
        """The tensor operations of `give`, which a CUDA graph can hold."""
        _, told, constants = self.start
        given = self._rows(latent), None, self._rows(condition)
        self.model.step(*given, told, self.cache, constants)

    @torch.no_grad()
    def step(
        self, noise: Tensor, condition: Tensor | None = None, picture: Tensor | None = None
    ) -> Tensor:
        """Makes the next chunk (B, C, n, H, W) from noise (draws, B, C, n, H, W), in passes at
        `opening_times` for the first chunk that is made, then at `times`. picture: (B, C, 1, H, W),
        the first frame of the first chunk (`FewStepConfig.picture_in_chunk`).

        ValueError unless there are `FewStepConfig.draws`, and for a picture elsewhere.
        """
        opening = self.chunks == 0
        if picture is not None and not (opening and self.picture_times):
            raise ValueError(
                "picture: expected None after the first chunk, and in a model whose pictures come "
                "before it, got a picture; `give` it"
            )
        draws = self.sampling.draws(opening)
        if len(noise) != draws:
            raise ValueError(
                f"noise: expected {draws} draws, as this chunk takes them, got {len(noise)}"
            )
        latent = self.infer(noise, condition, opening, picture)
        if self.past is not None:
            self.past.append(self.inputs(latent, condition))
        self.chunks += 1
        return latent

    @torch.no_grad()
    def infer(
        self,
        noise: Tensor,
        condition: Tensor | None,
        opening: bool,
        picture: Tensor | None = None,
    ) -> Tensor:
        """The tensor operations of a step, which a CUDA graph can hold: the cache advances, and the
        next chunk is returned."""
        sampling, model, x = self.sampling, self.model, noise[0]
        driven = self._rows(condition)
        times = sampling.opening_times if opening else sampling.times
        moments = self.opening_times if opening else self.times
        moments = moments if picture is None else self.picture_times
        solver, last = SOLVERS[sampling.solver](times, noise), len(times) - 1
        for index, (time, told, constants) in enumerate(moments):
            stays = index == last and self.refresh is None
            if picture is not None:
                x = torch.cat([picture, x[:, :, 1:]], dim=2)
            given = self._rows(x), None, driven, told
            output = model.step(*given, self.cache, constants, advance=stays)
            v, *negative = output.chunk(self.branches)
            if negative:
                v = negative[0] + sampling.guidance * (v - negative[0])
            latent = clean(model.config, v, x, None, time)
            if index < last:
                x = solver.next(latent).to(noise.dtype)
        latent = latent.to(noise.dtype)
        if self.refresh is not None:
            _, told, constants = self.refresh
            model.step(self._rows(latent), None, driven, told, self.cache, constants)
        return latent

    def _rows(self, x: Tensor | None) -> Tensor | None:
        """Returns x (B, ...) for every row of the network's batch."""
        return x if x is None or self.branches == 1 else x.repeat(self.branches, 1, 1, 1, 1)

    def inputs(self, latent: Tensor, condition: Tensor | None, given: bool = False) -> tuple:
        """Returns the inputs of the pass whose keys and values stay: over a clean chunk that was
        made, or `given`."""
        told = (self.start if given else self.refresh).told
        return self._rows(latent), None, self._rows(condition), told

    @property
    def constants_bytes(self) -> int:
        """Memory of the constants of all times."""
        return sum(x.nbytes for each in self.moments.values() for x in each.constants.tensors())


def check_few_step(config: ModelConfig, sampling: FewStepConfig) -> None:
    """ValueError unless a model of this configuration can make a chunk in several passes, with
    frames after the picture in the first one."""
    if config.block != "wan":
        raise ValueError(
            "sampling: expected a model of block 'wan' for few steps, because text keys must be "
            f"those of every time, got {config.block!r}"
        )
    if config.recycled_channels:
        raise ValueError(
            "sampling: expected a model without recycled channels for few steps, got recycle=True"
        )
    if sampling.rolling and config.condition_channels:
        raise ValueError(
            "rolling: expected False in a model with conditions, which a step takes for one chunk, "
            "got True"
        )
    if sampling.picture_in_chunk and config.opening_frames == 1:
        raise ValueError(
            "picture_in_chunk: expected False for a first chunk of one frame, which a picture "
            "fills, got True"
        )
