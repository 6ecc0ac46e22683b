"""The tensors of one stream at fixed addresses, and its step captured over them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..model.caches import MODEL, check_same, fit_scales, name_of, set_self_check
from ..model.conditioning import Control, control_rays
from ..model.config import FewStepConfig
from ..model.pose import Pose
from ..model.world_model import WorldModel
from ..vae import CausalVAE
from ..vae.stream import Captured, DecoderStates, capture
from .few_step import FewStepRollout
from .noise import Noise
from .pixel_reader import PixelReader
from .rolling import RollingRollout
from .skeletons import NOBODY, SkeletonEncoder, copied
from .snapshot import Snapshot
from .student import StudentRollout

try:
    import nvtx
except ImportError:  # only a profiler misses it
    nvtx = None


class Chunk:
    """The noise and the latents of a step that makes `frames` frames from `draws` draws of noise.

    A draw has `noise_frames` frames, as many as the step unless given. The first `given` frames of
    the step are a picture that the decoder has seen.

    Attributes:
        latent: The frames of the last step, (1, C, frames, h, w), in the model's precision.
        drawn: The noise of the last step, (draws, 1, C, noise_frames, h, w).
        encoded: The frames of `latent` after the given ones, in the precision of the autoencoder.
    """

    def __init__(
        self,
        model: WorldModel,
        vae: CausalVAE,
        size: Sequence[int],
        draws: int,
        frames: int,
        given: int = 0,
        noise_frames: int | None = None,
    ):
        like, self.given = model.transformer.video_in.weight, given
        channels = model.config.latent_channels
        self.latent = like.new_zeros((1, channels, frames, *size))
        self.drawn = like.new_zeros((draws, 1, channels, noise_frames or frames, *size))
        self.encoded = vae.latent_mean.new_zeros(self.made.shape)
        self.noise = Noise(0, self.drawn.shape, like.device)

    @property
    def made(self) -> Tensor:
        """The frames of `latent` after the given ones."""
        return self.latent[:, :, self.given :]

    @property
    def bytes(self) -> int:
        """Memory of the tensors, without the addresses of the noise."""
        return self.latent.nbytes + self.drawn.nbytes + self.encoded.nbytes


class StreamMemory:
    """Everything that a step of one stream reads and writes, for latents of `size` = (height,
    width), of a model that makes a frame in one pass.

    A step is noise, condition, transformer, decoder and pixels. On a CUDA device it is one CUDA
    graph, captured at construction together with the first decode; nothing is compiled or allocated
    later. A graph holds addresses, so a memory serves one stream at a time. The next stream takes
    it over (`start`). The weights must neither change nor move.

    Poses are drawn and encoded before the graph runs, which is then not the whole step.

    A graph cannot check what a float8 cache loses (docs/method.md#16). So the first steps of each
    stream with one, up to the first that sees a frame of the window, are launched without a graph.

    Attributes:
        phase: Called with the name of each part of a step; the part runs in the context that it
            returns.
        skeletons: The encoder of poses, if the model follows them (`poses`).
    """

    @torch.no_grad()
    def __init__(
        self, model: WorldModel, vae: CausalVAE, size: tuple[int, int], poses: bool = False
    ):
        self.model, self.size, self.phase = model, size, nvtx_range
        config, like = model.config, model.transformer.video_in.weight
        device, channels = like.device, config.condition_channels
        on_gpu = device.type == "cuda"
        with torch.inference_mode(False), torch.no_grad():
            self.condition = like.new_zeros((1, channels, 1, *size)) if channels else None
            self.control = torch.zeros((1, 1, 2), device=device) if model.camera else None
            self._staged = [torch.zeros(1, 1, 2, pin_memory=on_gpu) for _ in range(2)]
            self.step = torch.zeros((), dtype=torch.int64, device=device)
            self.chunks = self._new_chunks(vae)
            self.rollout = self._new_rollout()
            self.picture = vae.latent_mean.new_zeros((1, config.latent_channels, 1, *size))
            self.decoder = DecoderStates(vae, self.picture)
            pool = torch.cuda.graph_pool_handle() if on_gpu else None
            # Steps of a capture have no prompt and no picture: what they lose says nothing
            set_self_check(self.rollout.cache, False)
            self._show = capture(self._show_picture, device, pool)
            self._runs = {
                name: capture(partial(self._run, name), device, pool) for name in self.chunks
            }
            self._reader = PixelReader(device)
        set_self_check(self.rollout.cache, model.transformer.cache_choice.self_check)
        self._unchecked = False  # until a step without a graph has seen a frame of the window
        self.recheck()
        height, width = (side * vae.config.space_factor for side in size)
        self.skeletons = SkeletonEncoder(vae, height, width) if poses else None
        self._encoded: tuple[Tensor, ...] = ()  # by `skeletons` for the step under way

    def _new_chunks(self, vae: CausalVAE) -> dict[str, Chunk]:
        """Returns the kinds of steps by name."""
        return {"steady": Chunk(self.model, vae, self.size, 1, 1)}

    def _new_rollout(self) -> StudentRollout | FewStepRollout:
        """Returns the rollout, without a prompt until `start`."""
        return StudentRollout(self.model.transformer, None, None, self.latent)

    @property
    def latent(self) -> Tensor:
        """The frames of the last step after the first one, (1, C, chunk, h, w); the next step of a
        model of one pass recycles them."""
        return self.chunks["steady"].latent

    @property
    def graph(self) -> torch.cuda.CUDAGraph | None:
        """The captured steady step; None on a device without graphs."""
        steady = self._runs["steady"]
        return steady.graph if isinstance(steady, Captured) else None

    @property
    def bytes(self) -> int:
        """Memory of the tensors; that of a captured graph is not known."""
        own = (self.picture, self.condition)
        tensors = sum(x.nbytes for x in own if x is not None)
        tensors += sum(chunk.bytes for chunk in self.chunks.values())
        if self.skeletons is not None:
            tensors += sum(part.nbytes for part in self.skeletons.state)
        past = self.rollout.past.bytes if self.rollout.past else 0
        tensors += self.rollout.constants_bytes
        return tensors + past + self.rollout.cache.bytes + self.decoder.bytes

    def recheck(self) -> None:
        """Checks a float8 cache again in the next steps, unless its checks are off."""
        cache = self.rollout.cache
        if name_of(cache) != MODEL and cache.self_check:
            cache.recheck()
            self._unchecked = True

    @contextmanager
    def watched(self, phase: Callable[[str], AbstractContextManager]) -> Iterator[None]:
        """Runs the steps made inside without a graph, each part in the context `phase(name)`."""
        before = self.phase, self._runs
        self.phase = phase
        self._runs = {name: partial(self._run, name) for name in self.chunks}
        try:
            yield
        finally:
            self.phase, self._runs = before

    @torch.no_grad()
    def start(
        self,
        latent: Tensor | None,
        text: tuple[Tensor, Tensor],
        seed: int,
        recache: bool,
        pose: Pose | None = None,
    ) -> np.ndarray:
        """Begins a stream at its encoded first frame (1, C, 1, h, w), or without one. Returns that
        frame as pixels, uint8 (1, H, W, 3), or (0, H, W, 3).

        text: embeddings and length of the prompt. pose: of the first frame, see
        `StreamingGenerator.open`.
        """
        if self.skeletons is not None:
            self.skeletons.start(pose or NOBODY)
        self.step.zero_()
        self.decoder.frames = 0
        self._reseed(seed)
        rollout = self.rollout
        rollout.cache.reset()
        if name_of(rollout.cache) != MODEL:
            # The stream before may have restored other scales, or had other weights
            transformer = self.model.transformer
            fit_scales(rollout.cache, transformer.blocks, transformer.context)
        self.recheck()
        rollout.past = rollout.new_past() if recache else None
        rollout.set_text(*text)
        if latent is None:
            factor = self.decoder.vae.config.space_factor
            return np.zeros((0, *(side * factor for side in self.size), 3), np.uint8)
        self.picture.copy_(latent)
        pixels = self._reader.read(self._show())
        self.decoder.frames = 1
        return pixels()

    def _reseed(self, seed: int) -> None:
        for chunk in self.chunks.values():
            chunk.noise.reseed(seed)

    def _show_picture(self) -> Tensor:
        """The tensor operations that begin a stream at its first frame. Returns its pixels."""
        self.latent.copy_(self.picture)
        return self.decoder.first(self.picture)

    def _run(self, name: str) -> Tensor:
        """The tensor operations of one step. Returns its pixels, uint8 (1, 3, F, H, W)."""
        chunk = self.chunks[name]
        self._draw(chunk)
        with self.phase("generate"):
            chunk.latent.copy_(self._generate(name))
        return self._decode(name)

    def _draw(self, chunk: Chunk) -> None:
        """Makes the condition and the noise of the next step."""
        with self.phase("condition"):
            if self.control is not None:
                rays = control_rays(self.control, self.model.camera, *self.size)
                self.condition.copy_(rays)
        with self.phase("noise"):
            chunk.drawn.copy_(chunk.noise(self.step))

    def _decode(self, name: str) -> Tensor:
        """Ends a step whose latents are made. Returns its pixels, uint8 (1, 3, F, H, W)."""
        chunk = self.chunks[name]
        self.step.add_(1)
        with self.phase("decode"):
            chunk.encoded.copy_(chunk.made)
            decode = self.decoder.first if name == "opening" else self.decoder.next
            return decode(chunk.encoded)

    def _generate(self, name: str) -> Tensor:
        """The latents of a step of a kind, made from the noise in its chunk."""
        return self.rollout.infer(self.chunks[name].drawn[0], self.latent, self.condition)

    def _kind(self, first: bool) -> str:
        """The kind of the next step."""
        return "steady"

    def _inputs(self, chunk: Chunk, before: Tensor, condition: Tensor | None) -> tuple:
        """Returns the inputs of the last step for `recache`. before: the latents before it."""
        return chunk.drawn[0].clone(), before, condition

    @torch.no_grad()
    def advance(
        self, control: Control | Pose | Tensor | None, steps: int
    ) -> Callable[[], np.ndarray]:
        """Enqueues one step. Returns the call that waits for its pixels, uint8 (F, H, W, 3).

        control: a `Control`, a `Pose`, the channels (C', h, w) of one frame, or None, as the model
            takes it.
        steps: Steps that the stream has made before.
        On a CUDA device the next step may be enqueued before the pixels of this one are taken;
        those of the step before must have been.
        """
        self._take(control)
        name, before = self._kind(first=steps == 0), self._before()
        if not self._unchecked:
            return self._end(name, before, self._runs[name]())
        made = self._run(name)
        self._unchecked = steps <= self.model.config.sink_frames
        return self._end(name, before, made)

    @torch.no_grad()
    def prepare(
        self, control: Control | Pose | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the inputs of the next step of a model of one pass, for a pass that streams
        share: noise, recycled latent frame and condition channels, (1, C, 1, h, w) each.

        The stream is as it was until `finish`; another call replaces this one.
        """
        self._take(control)
        chunk = self.chunks["steady"]
        self._draw(chunk)
        return chunk.drawn[0], self.latent, self.condition

    @torch.no_grad()
    def finish(self, latent: Tensor) -> Callable[[], np.ndarray]:
        """Ends a step with the latent frame (1, C, 1, h, w) of a shared pass, which has appended to
        the cache. Returns a call as `advance` does."""
        before = self._before()
        self.rollout.cache.advance()
        self.latent.copy_(latent)
        return self._end("steady", before, self._decode("steady"))

    def _take(self, control: Control | Pose | Tensor | None) -> None:
        """Enqueues the copy of a step's control to where the step reads it."""
        if self.control is not None:
            self._staged.reverse()  # the other one may still be on its way
            self._staged[0][0, 0, 0], self._staged[0][0, 0, 1] = control.yaw, control.forward
            self.control.copy_(self._staged[0], non_blocking=True)
        elif isinstance(control, Pose):
            channels, self._encoded = self.skeletons.encode(control)
            self.condition.copy_(channels)
        elif self.condition is not None:
            self.condition.copy_(control[None, :, None], non_blocking=True)
            if self.skeletons is not None:  # ready channels, which no encoder has seen
                self._encoded = self.skeletons.state

    def _before(self) -> Tensor | None:
        """The latents before a step, if `recache` needs them."""
        return None if self.rollout.past is None else self.latent.clone()

    def _end(self, name: str, before: Tensor | None, made: Tensor) -> Callable[[], np.ndarray]:
        """Starts to read the pixels of a step, and records its inputs for `recache`."""
        chunk, past = self.chunks[name], self.rollout.past
        with self.phase("copy"):
            pixels = self._reader.read(made)
        self.decoder.frames += chunk.made.shape[2]
        if self.skeletons is not None:
            self.skeletons.state = self._encoded
        if past is not None:
            condition = None if self.condition is None else self.condition.clone()
            past.append(self._inputs(chunk, before, condition))
        return pixels

    @torch.no_grad()
    def snapshot(self, seed: int, steps: int, prompt: str) -> Snapshot:
        """A copy of the state between two steps."""
        with torch.inference_mode(False):
            past = self.rollout.past
            return Snapshot(
                seed,
                steps,
                prompt,
                self.latent.clone(),
                self.rollout.cache.clone(),
                past and past.copy(),
                self.decoder.snapshot(),
                () if self.skeletons is None else copied(self.skeletons.state),
            )

    def check(self, snapshot: Snapshot) -> None:
        """ValueError unless the snapshot is of a stream of this model, size and cache."""
        ours, theirs = name_of(self.rollout.cache), name_of(snapshot.cache)
        mend = f"restore it in a stream of cache {theirs}, see StreamingGenerator.use_cache"
        check_same("snapshot", ours, theirs, mend)
        self.rollout.cache.check_twin(snapshot.cache)
        self.decoder.check(snapshot.decoder)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Returns to a snapshot, at the addresses that this memory has. ValueError as `check`."""
        self.check(snapshot)
        self._reseed(snapshot.seed)
        self.step.fill_(snapshot.steps)
        self.latent.copy_(snapshot.latent)
        self.rollout.cache.load(snapshot.cache)
        self.rollout.past = snapshot.past and snapshot.past.copy()
        self.decoder.restore(snapshot.decoder)
        if self.skeletons is not None:
            self.skeletons.state = copied(snapshot.skeleton)


class FewStepMemory(StreamMemory):
    """`StreamMemory` of a few-step model, with three graphs: of the first chunk ("opening"), of the
    first chunk after a picture or with it ("second"), and of every other ("steady")."""

    def __init__(
        self, model: WorldModel, vae: CausalVAE, size: tuple[int, int], sampling: FewStepConfig
    ):
        self.sampling = sampling
        super().__init__(model, vae, size)

    def _new_chunks(self, vae: CausalVAE) -> dict[str, Chunk]:
        config, draws = self.model.config, self.sampling.draws
        opening = (draws(opening=True), config.opening_frames)
        second = (*opening, 1) if self.sampling.picture_in_chunk else (opening[0], config.chunk)
        sizes = {
            "steady": (draws(opening=False), config.chunk),
            "opening": opening,
            "second": second,
        }
        return {name: self._new_chunk(vae, *each) for name, each in sizes.items()}

    def _new_chunk(self, vae: CausalVAE, draws: int, frames: int, given: int = 0) -> Chunk:
        noise_frames = self.sampling.noise_frames(frames)
        return Chunk(self.model, vae, self.size, draws, frames, given, noise_frames)

    def _new_rollout(self) -> FewStepRollout:
        config, latent = self.model.config, self.latent
        # The rollout takes batch and dtype from a text; an encoder of text may be large
        rows = 1 + len(self.sampling.negatives)
        text = latent.new_zeros((rows, config.text_tokens, config.text_width))
        lens = torch.ones(rows, dtype=torch.int64, device=latent.device)
        kind = RollingRollout if self.sampling.rolling else FewStepRollout
        return kind(self.model.transformer, text, lens, self.size, self.sampling)

    @torch.no_grad()
    def start(
        self,
        latent: Tensor | None,
        text: tuple[Tensor, Tensor],
        seed: int,
        recache: bool,
        pose: Pose | None = None,
    ) -> np.ndarray:
        """Begins a stream, see `StreamMemory.start`; records the first frame for `recache` too, if
        it is a chunk of its own."""
        if self.condition is not None:
            self.condition.zero_()  # nothing drives a picture
        pixels = super().start(latent, text, seed, recache, pose)
        alone = latent is not None and not self.sampling.picture_in_chunk
        if alone and self.rollout.past is not None:
            condition = None if self.condition is None else self.condition.clone()
            clean = self.picture.to(self.latent.dtype, copy=True)
            self.rollout.past.append(self.rollout.inputs(clean, condition, given=True))
        return pixels

    def _show_picture(self) -> Tensor:
        if self.sampling.picture_in_chunk:
            self.latent[:, :, :1].copy_(self.picture)  # where a snapshot holds it
        else:
            self.rollout.append(self.picture.to(self.latent.dtype), self.condition)
        return self.decoder.first(self.picture)

    def _generate(self, name: str) -> Tensor:
        drawn, opening = self.chunks[name].drawn, name != "steady"
        picture = self.latent[:, :, :1] if self.chunks[name].given else None
        return self.rollout.infer(drawn, self.condition, opening, picture)

    def _kind(self, first: bool) -> str:
        if not first:
            return "steady"
        return "second" if self.decoder.frames else "opening"

    def _inputs(self, chunk: Chunk, before: Tensor, condition: Tensor | None) -> tuple:
        return self.rollout.inputs(chunk.latent.clone(), condition)


def nvtx_range(name: str) -> AbstractContextManager:
    """A range of a step by which a profiler names its work; empty without the package nvtx."""
    return nullcontext() if nvtx is None else nvtx.annotate(name)
