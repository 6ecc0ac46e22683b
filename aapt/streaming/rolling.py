"""Rolling few-step models: chunks at several times in one pass, one of which it finishes
(docs/method.md#15)."""

import torch
from torch import Tensor

from ..model.flow import interpolate
from ..model.transformer import KVCache, clean
from .few_step import FewStepRollout, Moment
from .student import Past


class RollingCache:
    """The past of a rolling stream, and its chunks that are not finished.

    Attributes:
        seen: What the passes over all chunks see: the sink, and a window that ends with the newest
            chunk.
        clean: What the passes over a finished chunk see: no sink, and a window as long as sink and
            window of `seen` together. Both caches hold keys and values that these passes made.
        pending: The unfinished chunks (B, C, n, H, W), the oldest first, each at its next time.
    """

    def __init__(self, seen: KVCache, clean: KVCache, pending: Tensor):
        self.seen, self.clean, self.pending = seen, clean, pending

    @property
    def parts(self) -> tuple[KVCache, KVCache]:
        """Both caches."""
        return self.seen, self.clean

    @property
    def step(self) -> Tensor:
        """Frames that are finished, () int64 on the device."""
        return self.clean.step

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of the state by name, not copied."""
        caches = {"seen": self.seen, "clean": self.clean}
        named = {f"{n}.{x}": t for n, cache in caches.items() for x, t in cache.tensors().items()}
        return named | {"pending": self.pending}

    @property
    def bytes(self) -> int:
        """Memory of the state."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def clone(self) -> "RollingCache":
        """Returns an independent copy."""
        return RollingCache(self.seen.clone(), self.clean.clone(), self.pending.clone())

    def check_twin(self, other: "RollingCache") -> None:
        """ValueError unless the other one has the sizes, dtypes and device of this one."""
        if not isinstance(other, RollingCache):
            raise ValueError(
                f"cache: expected the cache of a rolling model, got a {type(other).__name__}"
            )
        if other.pending.shape != self.pending.shape:
            raise ValueError(
                f"cache: expected unfinished chunks {tuple(self.pending.shape)}, got "
                f"{tuple(other.pending.shape)}"
            )
        for ours, theirs in zip(self.parts, other.parts, strict=True):
            ours.check_twin(theirs)

    def load(self, other: "RollingCache") -> None:
        """Copies the state of a twin. ValueError as `check_twin`."""
        self.check_twin(other)
        for ours, theirs in zip(self.parts, other.parts, strict=True):
            ours.load(theirs)
        self.pending.copy_(other.pending)

    def reset(self) -> None:
        """Forgets every frame. Text stays."""
        for cache in self.parts:
            cache.reset()
        self.pending.zero_()

    def advance(self, frames: int) -> None:
        """Copies the last `frames` frames of `clean`, which has advanced, to `seen`."""
        numbers = self.clean.step - frames + torch.arange(frames, device=self.pending.device)
        source, target = (_slots(cache, numbers) for cache in (self.clean, self.seen))
        for name in ("k", "v"):
            theirs, ours = (
                getattr(cache, name).unflatten(2, (-1, cache.tokens_per_frame))
                for cache in (self.clean, self.seen)
            )
            ours.index_copy_(2, target, theirs.index_select(2, source))
        self.seen.advance(frames)


def _slots(cache: KVCache, frames: Tensor) -> Tensor:
    """Returns where a cache without a text slot stores frames, see `KVCache`."""
    later = frames - cache.sink_frames
    return torch.where(later < 0, frames, cache.sink_frames + later % cache.ring_frames)


class RollingRollout(FewStepRollout):
    """A batch of streams of a rolling model (`FewStepConfig.rolling`).

    With k times, a step makes one pass over k chunks, the oldest at the last time and the newest,
    which is noise, at the first. The oldest is finished; all others are mixed with new noise for
    their next time. A pass at `refresh` over the finished chunk then makes the keys and values that
    stay. The first step has k passes, over 1 to k chunks.

    Arguments are those of `FewStepRollout`. ValueError also for a model without a sink, with a
    first chunk of another size, or with a window that does not hold k chunks, and for `recache`.
    """

    def _new_cache(self, rows: int, dtype: torch.dtype) -> RollingCache:
        model, config, chunks = self.model, self.model.config, len(self.sampling.times)
        window = config.window(config.token_grid(*self.size))
        frames = chunks * config.chunk
        if config.opening_frames != config.chunk or config.sink_frames < 1 or frames > window + 1:
            raise ValueError(
                f"rolling: expected chunks of one size, a sink, and a window of {frames} frames or "
                f"more for {chunks} chunks of {config.chunk}, got first_chunk "
                f"{config.first_chunk}, sink_frames {config.sink_frames} and {window + 1} frames"
            )
        caches = [
            model.new_cache(rows, self.size, dtype=dtype, pinned=pinned) for pinned in (True, False)
        ]
        shape = (rows, config.latent_channels, frames - config.chunk, *self.size)
        return RollingCache(*caches, torch.zeros(shape, dtype=dtype, device=caches[0].k.device))

    def _caches(self) -> tuple[KVCache, ...]:
        return self.cache.parts

    def _passes(self, times: tuple[float, ...]) -> list[tuple[float, ...]]:
        """Returns the times of the frames of a pass over 1 chunk, over 2, and so on."""
        chunk = self.model.config.chunk
        return [
            tuple(time for time in reversed(times[: count + 1]) for _ in range(chunk))
            for count in range(len(times))
        ]

    def new_past(self) -> Past:
        """ValueError: the unfinished chunks cannot be made again."""
        raise ValueError(
            "recache: expected False for a rolling model, whose next chunks are partly made, got "
            "True; open the stream without recache"
        )

    def append(self, latent: Tensor, condition: Tensor | None) -> None:
        """ValueError: a rolling stream begins with chunks of its own."""
        raise ValueError("latent: expected none in a rolling model, got frames; start without any")

    @torch.no_grad()
    def infer(
        self,
        noise: Tensor,
        condition: Tensor | None,
        opening: bool,
        picture: Tensor | None = None,
    ) -> Tensor:
        """The tensor operations of a step: the cache advances, and the next chunk is returned.

        noise: (draws, B, C, k n, H, W). Each draw has the newest chunk as its last n frames, and
        before them new noise for the unfinished chunks.
        """
        chunk, full = self.model.config.chunk, self.times[-1]
        moments = self.opening_times if opening else [full]
        for drawn, moment, after in zip(noise, moments, [*moments[1:], full], strict=True):
            estimate = self._pass(drawn, moment, after)
        latent = estimate[:, :, :chunk].to(noise.dtype)
        _, told, constants = self.refresh
        self.model.step(latent, None, None, told, self.cache.clean, constants)
        self.cache.advance(chunk)
        return latent

    def _pass(self, drawn: Tensor, moment: Moment, after: Moment) -> Tensor:
        """Runs one pass, mixes the unfinished chunks for the moment after it, and returns the
        estimates of all."""
        chunk, cache = self.model.config.chunk, self.cache
        _, told, constants = moment
        time, then = (each.time.view(len(drawn), -1) for each in (moment, after))
        older = time.shape[1] - chunk
        x = torch.cat([cache.pending[:, :, :older], drawn[:, :, -chunk:]], dim=2)
        output = self.model.step(x, None, None, told, cache.seen, constants, advance=False)
        estimate = clean(self.model.config, output, x, None, time)
        kept = min(time.shape[1], cache.pending.shape[2])
        mixed = interpolate(estimate[:, :, -kept:], drawn[:, :, :kept], then[:, :kept])
        cache.pending[:, :, :kept].copy_(mixed)
        return estimate
