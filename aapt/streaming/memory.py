"""The tensors of one stream at fixed addresses, and its step captured over them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from ..model.conditioning import Control, control_rays
from ..model.world_model import WorldModel
from ..vae import CausalVAE
from ..vae.stream import DecoderStates, capture
from .noise import Noise
from .pixel_reader import PixelReader
from .snapshot import Snapshot
from .student import Past, StudentRollout

try:
    import nvtx
except ImportError:  # only a profiler misses it
    nvtx = None


class StreamMemory:
    """Everything that a step of one stream reads and writes, for latents of `size` = (height,
    width).

    A step is noise, condition, transformer, decoder and pixels. On a CUDA device it is one CUDA
    graph, captured at construction together with the first decode; nothing is compiled or allocated
    later. A graph holds addresses, so a memory serves one stream at a time. The next stream takes
    it over (`start`). The weights must neither change nor move.
    """

    @torch.no_grad()
    def __init__(self, model: WorldModel, vae: CausalVAE, size: tuple[int, int]):
        self.model, self.size = model, size
        transformer = model.transformer
        like, channels = transformer.video_in.weight, model.config.condition_channels
        shape = (1, model.config.latent_channels, 1, *size)
        with torch.inference_mode(False), torch.no_grad():
            self.latent = like.new_zeros(shape)  # the last frame, recycled by the next step
            self.drawn = torch.zeros_like(self.latent)  # the noise of the last step
            self.condition = like.new_zeros((1, channels, 1, *size)) if channels else None
            self.control = torch.zeros((1, 1, 2), device=like.device) if model.camera else None
            on_gpu = like.device.type == "cuda"
            self._staged = [torch.zeros(1, 1, 2, pin_memory=on_gpu) for _ in range(2)]
            self.step = torch.zeros((), dtype=torch.int64, device=like.device)
            self.noise = Noise(0, shape, like.device)
            self.rollout = StudentRollout(transformer, *model.text_encoder([""]), self.latent)
            latent = vae.latent_mean.new_zeros(shape)
            self.decoder, self.encoded = DecoderStates(vae, latent), latent
            pool = torch.cuda.graph_pool_handle() if on_gpu else None
            self._first = capture(lambda: self.decoder.first(self.encoded), like.device, pool)
            self._step = capture(self._run, like.device, pool)
            self._reader = PixelReader(like.device)

    @property
    def bytes(self) -> int:
        """Memory of the tensors; that of a captured graph is not known."""
        own = (self.latent, self.drawn, self.encoded, self.condition)
        tensors = sum(x.nbytes for x in own if x is not None)
        past = self.rollout.past.bytes if self.rollout.past else 0
        constants = sum(x.nbytes for x in self.rollout.constants.tensors())
        return tensors + past + constants + self.rollout.cache.bytes + self.decoder.bytes

    @torch.no_grad()
    def start(self, latent: Tensor, seed: int, recache: bool) -> np.ndarray:
        """Begins a stream at its encoded first frame (1, C, 1, h, w). Returns that frame as pixels,
        uint8 (1, H, W, 3)."""
        self.step.zero_()
        self.noise.reseed(seed)
        cache = self.rollout.cache
        cache.reset()
        self.rollout.past = Past(cache.window_frames) if recache else None
        self.latent.copy_(latent)
        self.encoded.copy_(latent)
        pixels = self._reader.read(self._first())
        self.decoder.frames = 1
        return pixels()

    def _run(self) -> Tensor:
        """The tensor operations of one step. Returns its pixels, uint8 (1, 3, F, H, W)."""
        with phase("condition"):
            if self.control is not None:
                rays = control_rays(self.control, self.model.camera, *self.size)
                self.condition.copy_(rays)
        with phase("noise"):
            self.drawn.copy_(self.noise(self.step))
        with phase("generate"):
            self.latent.copy_(self.rollout.infer(self.drawn, self.latent, self.condition))
        self.step.add_(1)
        with phase("decode"):
            self.encoded.copy_(self.latent)
            return self.decoder.next(self.encoded)

    @torch.no_grad()
    def advance(self, control: Control | Tensor | None) -> Callable[[], np.ndarray]:
        """Enqueues one step. Returns the call that waits for its pixels, uint8 (F, H, W, 3).

        control: a `Control`, the channels (C', h, w) of one frame, or None, as the model takes it.
        On a CUDA device the next step may be enqueued before the pixels of this one are taken;
        those of the step before must have been.
        """
        if self.control is not None:
            self._staged.reverse()  # the other one may still be on its way
            self._staged[0][0, 0, 0], self._staged[0][0, 0, 1] = control.yaw, control.forward
            self.control.copy_(self._staged[0], non_blocking=True)
        elif self.condition is not None:
            self.condition.copy_(control[None, :, None], non_blocking=True)
        past = self.rollout.past
        recycled = self.latent.clone() if past is not None else None
        pixels = self._reader.read(self._step())
        self.decoder.frames += 1
        if past is not None:
            condition = None if self.condition is None else self.condition.clone()
            past.append((self.drawn.clone(), recycled, condition))
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
            )

    def check(self, snapshot: Snapshot) -> None:
        """ValueError unless the snapshot is of a stream of this model and size."""
        self.rollout.cache.check_twin(snapshot.cache)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Returns to a snapshot, at the addresses that this memory has. ValueError as `check`."""
        self.check(snapshot)
        self.noise.reseed(snapshot.seed)
        self.step.fill_(snapshot.steps)
        self.latent.copy_(snapshot.latent)
        self.rollout.cache.load(snapshot.cache)
        self.rollout.past = snapshot.past and snapshot.past.copy()
        self.decoder.restore(snapshot.decoder)


def phase(name: str) -> AbstractContextManager:
    """A range of a step by which a profiler names its work; empty without the package nvtx."""
    return nullcontext() if nvtx is None else nvtx.annotate(name)
