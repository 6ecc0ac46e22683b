"""The streaming generator: a first frame and controls in, four video frames per step out."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import (
    check_digest,
    check_generator,
    find_checkpoint,
    load_config,
    load_meta_module,
    reading_config,
    tuples,
)
from ..clock import FPS
from ..device import usable_device, usable_dtype
from ..model.caches import MODEL, CacheChoice, check_cache, check_name
from ..model.conditioning import Control
from ..model.config import (
    CameraConfig,
    FewStepConfig,
    ModelConfig,
    SamplingConfig,
    sampling_config,
)
from ..model.float8 import quantise_blocks
from ..model.pose import Pose
from ..model.transformer import share_tokens
from ..model.ulysses import Ulysses
from ..model.umt5 import UMT5TextEncoder, UMT5Weights
from ..model.world_model import WorldModel
from ..vae import CausalVAE
from ..vae.float8 import round_decoder
from ..vae.folder import LIGHT, check_autoencoder, load_vae
from .few_step import check_few_step
from .memory import FewStepMemory, StreamMemory
from .stream import Stream


class StreamingGenerator:
    """A world model with its autoencoder, which opens streams of `height` x `width` pixels.

    The model decides what drives a stream: controls of a camera, poses of a figure, condition
    channels (a skeleton's latents), or the prompt alone. `poses` says if it follows poses, whose
    skeletons it draws and encodes.

    >>> generator = StreamingGenerator.from_pretrained("tiny-world")
    >>> stream = generator.open(first_frame, prompt="green meadow at noon", seed=0)
    >>> frames = stream.step(Control(forward=1.0))  # uint8 (4, H, W, 3)

    A few-step model has a `FewStepConfig` as `sampling` (docs/method.md#15). Its step makes a chunk
    of one latent frame or more, and a stream of it may open without a picture.

    >>> stream = generator.open(None, prompt="a fox in snow")
    >>> frames = stream.step()  # the first chunk, uint8 (1 + 4 (chunk - 1), H, W, 3)

    A diffusion model needs many passes per frame and has a `SamplingConfig`. It opens no streams;
    `aapt eval` measures it.
    """

    def __init__(
        self,
        model: WorldModel,
        vae: CausalVAE,
        *,
        height: int,
        width: int,
        fps: int = FPS,
        prompts: Sequence[str] = (),
        sample: tuple[Path, str] | None = None,
        sampling: SamplingConfig | FewStepConfig | None = None,
        poses: bool = False,
    ):
        self.model = model.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.fps = fps
        self.themes = tuple(prompts)
        self._sample = sample
        self.sampling, self.poses = sampling, poses
        self._idle: list[StreamMemory] = []
        self._resize(height, width)
        for name, ours, vaes in (
            ("latent_channels", model.config.latent_channels, vae.config.latent_channels),
            ("camera.frames", model.camera and model.camera.frames, vae.config.time_factor),
        ):
            if ours is None:
                continue
            if ours != vaes:
                raise ValueError(f"{name}: expected {vaes}, as the VAE has it, got {ours}")
        config = model.config
        if config.condition_channels and (config.chunk, config.opening_frames) != (1, 1):
            raise ValueError(
                "chunk: expected 1 in a model with conditions, which a step takes for one frame, "
                f"got {config.chunk} after {config.opening_frames}"
            )
        channels = None if model.camera else config.condition_channels
        if poses and (self.few_step or channels != config.latent_channels):
            raise ValueError(
                "poses: expected a model of one pass per frame, without a camera and with "
                f"{config.latent_channels} condition channels, those of a skeleton's latents, got "
                f"one with {config.condition_channels}"
            )
        if self.few_step:
            check_few_step(config, self.sampling)
        elif config.chunk > 1:
            raise ValueError(
                "chunk: expected 1 without few-step sampling, where each frame is made from the "
                f"one before, got {config.chunk}; pass a FewStepConfig as sampling"
            )

    def _resize(self, height: int, width: int) -> None:
        """Streams have this size from now on. ValueError if tokens do not fill it."""
        factor = self.vae.config.space_factor
        rows, columns = (factor * pixels for pixels in self.model.config.patch_shape)
        if min(height, width) < 1 or height % rows or width % columns:
            multiples = " and ".join(map(str, dict.fromkeys((rows, columns))))
            raise ValueError(
                f"height, width: expected multiples of {multiples}, got {height} x {width}; "
                f"{_nearest(height, rows)} x {_nearest(width, columns)} is near"
            )
        self.height, self.width = height, width
        self.latent_size = (height // factor, width // factor)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        size: tuple[int, int] | None = None,
        decoder: str = LIGHT,
        text_device: torch.device | str | None = None,
        cache: str = MODEL,
        decoder_dtype: str | None = None,
    ) -> "StreamingGenerator":
        """Loads a bundled model by name, or a checkpoint folder.

        Weights go from the file to the device one tensor at a time. Those in 8 bits, of `aapt
        quantise`, stay so, after their file's digest was checked.

        Args:
            device: Where the networks run; None for the CPU.
            dtype: Their precision; None for bfloat16 on a CUDA device that has it, float32
                elsewhere.
            size: (height, width) in pixels; None for the checkpoint's own. Positions stretch to
                another size (docs/method.md#4).
            decoder: LIGHT or ORIGINAL, see `aapt.vae.folder.load_vae`.
            text_device: Where UMT5 runs, if the model reads it, see `read_text`.
            cache: Of streams: "model", "float8" or "float8-past", see `use_cache`.
            decoder_dtype: "float8" for a decoder whose inner convolutions are in 8 bits, see
                `aapt.vae.float8.round_decoder`; None for the precision `dtype`.

        CheckpointError says what was expected and what was found, ValueError why the device, the
        precision, the size or the cache cannot be used, and what can; also for the `text_device` of
        a model that reads no UMT5.
        """
        check_name(cache)
        if decoder_dtype not in (None, "float8"):
            raise ValueError(f"decoder_dtype: expected float8 or None, got {decoder_dtype!r}")
        folder = find_checkpoint(name)
        config = load_config(folder)
        device = usable_device(device or "cpu")
        dtype = usable_dtype(dtype, device)
        check_generator(folder, config)
        check_autoencoder(folder, config)
        with reading_config(folder):
            camera = config["camera"]
            with torch.device("meta"):
                model = WorldModel(
                    ModelConfig(**tuples(config["model"])),
                    CameraConfig(**camera) if camera else None,
                )
            weights = folder / "model.safetensors"
            if quantised := config.get("quantised"):
                quantise_blocks(model.transformer)
                if device.type != "meta":
                    check_digest(weights, quantised["sha256"])
            load_meta_module(weights, model, device, dtype)
            picture = {key: config[key] for key in ("height", "width", "fps", "prompts")}
            if sample := config.get("sample"):
                picture["sample"] = (folder / Path(sample["image"]).name, sample["prompt"])
            if sampling := config.get("sampling"):
                picture["sampling"] = sampling_config(tuples(sampling))
            picture["poses"] = config.get("poses", False)
            generator = cls(model, load_vae(folder, decoder, device, dtype), **picture)
        if size is not None:
            generator._resize(*size)
        generator.use_cache(cache)
        if decoder_dtype == "float8":
            round_decoder(generator.vae)
        if "text" in config:
            generator.read_text(folder / config["text"], text_device)
        elif text_device is not None:
            raise ValueError(
                f"text_device: expected none for a model that reads no UMT5, got {text_device}"
            )
        return generator

    def share_tokens(self, context: Ulysses) -> None:
        """Shares the transformer's work on every frame among the ranks of a group
        (docs/method.md#11).

        Every rank has all weights, and opens and steps the streams that the others do, with equal
        images, prompts, seeds and controls. Each returns all frames, since each decodes for itself.
        Streams that were opened before are no longer stepped. ValueError unless the number of ranks
        divides the heads.
        """
        share_tokens(self.model, context)
        self._idle = []

    def use_cache(self, name: str, self_check: bool = True) -> None:
        """Chooses the cache of the streams that are opened from now on (docs/method.md#16).

        name: "model" for keys and values in the model's precision; "float8" for all of them in
        e4m3; "float8-past" for the window in e4m3, while text, first and newest frame stay in the
        model's precision. Open streams keep theirs, and cannot be forked if it is another.

        self_check: True to check a float8 cache in the first steps of a stream; a CacheError then
        says what the cache loses, if that is too much.

        CacheError as `check_cache`.
        """
        self.check_cache(name)
        self.model.transformer.cache_choice = CacheChoice(name, self_check)
        self._idle = []  # what open streams give back goes to the list before

    def check_cache(self, name: str, device: torch.device | None = None) -> None:
        """CacheError for a name that no cache has, and for a model or a device that cannot have
        this cache. device: that of the networks unless given."""
        config = self.model.config
        window = config.window(config.token_grid(*self.latent_size))
        frames = max(config.chunk, config.opening_frames)
        rolling = self.few_step and self.sampling.rolling
        check_cache(name, config, window, device or self.device, frames, rolling)

    @property
    def cache(self) -> str:
        """The name of the cache of new streams, see `use_cache`."""
        return self.model.transformer.cache_choice.name

    def read_text(self, source: str | Path, text_device: torch.device | str | None = None) -> None:
        """Reads prompts with the UMT5 of a folder (`aapt.model.umt5`) from now on.

        text_device: Where UMT5 stays. None: it runs on the model's device, and is dropped after
        every new prompt, since it may be larger than the model. ValueError for a model that reads
        its prompts itself, and for a device that cannot be used; CheckpointError for a folder
        without UMT5.
        """
        encoder = self.model.text_encoder
        if not isinstance(encoder, UMT5TextEncoder):
            raise ValueError(
                f"text: expected a model that reads UMT5, got one with {type(encoder).__name__}; "
                "leave UMT5 away"
            )
        place = usable_device(text_device or self.device)
        weights = UMT5Weights(source, place, tokens=encoder.tokens, keep=text_device is not None)
        encoder.source = weights.embed

    def sample_image(self) -> Path:
        """The path of the image that ships with the model, to start from. ValueError if none
        does."""
        if self._sample is None:
            raise ValueError("image: expected a file, this model comes without a sample image")
        return self._sample[0]

    @property
    def sample_prompt(self) -> str:
        """The prompt of the sample image, else the first theme, else an empty one."""
        return self._sample[1] if self._sample else next(iter(self.themes), "")

    @property
    def few_step(self) -> bool:
        """True for a few-step model."""
        return isinstance(self.sampling, FewStepConfig)

    @property
    def takes_picture(self) -> bool:
        """True if a stream may begin with a picture: the first step makes one latent frame, which
        a picture can replace, or takes a picture as the first of its frames. A rolling model takes
        none."""
        config = self.model.config
        return self.sampling.takes_picture(config) if self.few_step else config.opening_frames == 1

    @property
    def _picture_in_chunk(self) -> bool:
        return self.few_step and self.sampling.picture_in_chunk

    @property
    def frames_per_step(self) -> int:
        """Video frames per step; the first step of a stream makes fewer without a picture, and with
        one that is part of its chunk."""
        return self.vae.config.time_factor * self.model.config.chunk

    def video_frames(self, steps: int, picture: bool) -> int:
        """Returns the video frames of a stream after a number of steps, with those of its
        picture."""
        config, factor = self.model.config, self.vae.config.time_factor
        if not steps:
            return int(picture)
        alone = picture and not self._picture_in_chunk
        opening = 1 if alone else config.opening_frames
        later = steps if alone else steps - 1
        return 1 + factor * (opening - 1 + later * config.chunk)

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return self.vae.latent_mean.device

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> Tensor:
        """Encodes images: uint8 (1 + 4 n, H, W, 3) to latents (channels, 1 + n, h, w).

        Latents 1 to n of drawn skeletons are the condition channels of n steps
        (docs/method.md#10).
        """
        video = torch.from_numpy(pixels.copy()).to(self.device)
        video = video.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        return self.vae.encode(video.to(self.vae.latent_mean.dtype))[0]

    def check_control(self, control: Control | Pose | Tensor | None) -> None:
        """ValueError unless `control` drives a step of this model: a `Control` for a model with a
        camera, the channels (condition_channels, h, w) of one latent frame for a model that has
        some without a camera, else None. A model that follows `poses` also takes the `Pose` of a
        step's video frames."""
        if self.driven_by == "camera":
            if not isinstance(control, Control):
                raise ValueError(f"control: expected a Control, got {control!r}")
        elif self.driven_by == "prompt":
            if control is not None:
                raise ValueError(
                    f"control: expected None, the prompt alone drives this model, got {control!r}"
                )
        elif self.poses and isinstance(control, Pose):
            self._check_pose(control, self.frames_per_step)
        else:
            shape = (self.model.config.condition_channels, *self.latent_size)
            if not isinstance(control, Tensor) or control.shape != shape:
                got = tuple(control.shape) if isinstance(control, Tensor) else repr(control)
                known = "a Pose or " if self.poses else ""
                raise ValueError(f"control: expected {known}condition channels {shape}, got {got}")

    def check_first_pose(self, pose: Pose | None) -> None:
        """ValueError unless a stream of this model may begin with `pose`, see `open`."""
        if pose is None:
            return
        if not self.poses:
            raise ValueError("pose: expected None, this model follows no poses, got a pose")
        self._check_pose(pose, 1)

    def _check_pose(self, pose: Pose, frames: int) -> None:
        if len(pose.points) != frames:
            raise ValueError(
                f"pose: expected {frames} video frames, got {len(pose.points)}; pass the points of "
                "each"
            )

    @property
    def driven_by(self) -> Literal["camera", "channels", "prompt"]:
        """The kind of control that a step takes, see `check_control`."""
        if self.model.camera:
            return "camera"
        return "channels" if self.model.config.condition_channels else "prompt"

    def still(self) -> Control | Tensor | None:
        """The control of a step without motion."""
        channels = torch.zeros(self.model.config.condition_channels, *self.latent_size)
        return {"camera": Control(), "channels": channels, "prompt": None}[self.driven_by]

    def open(
        self,
        first_frame: np.ndarray | None,
        prompt: str,
        seed: int = 0,
        recache: bool = False,
        pose: Pose | None = None,
    ) -> Stream:
        """Starts a stream from an image, or, with a few-step model, from the prompt alone.

        first_frame: uint8 (height, width, 3), exactly the model's size; None for a few-step model
        to make its first chunk itself. recache: a new prompt also rewrites the past, see
        `Stream.prompt`. pose: of the one video frame `first_frame`, if the model follows poses;
        None for a skeleton without a visible point.

        ValueError for another size, for a pose of a model that follows none, for an image unless
        the model `takes_picture`, for `recache` in a model that is rolling or has no refresh pass,
        and as `check_streams`.
        """
        self.check_streams()
        self.check_first_frame(first_frame)
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {seed!r}")
        self.check_first_pose(pose)
        return Stream(self, first_frame, prompt, seed, recache, pose)

    def check_streams(self) -> None:
        """ValueError for a diffusion model, and for a model whose rays are relative to the first
        frame: neither can stream."""
        if isinstance(self.sampling, SamplingConfig):
            raise ValueError(
                f"model: expected one forward pass per frame to stream, got a diffusion model of "
                f"{self.sampling.passes}; `aapt eval` rolls it out"
            )
        if self.model.camera and self.model.camera.relative_to_first:
            raise ValueError(
                "model: expected rays relative to the frame before, got relative to the first, "
                "whose values grow without bound; `aapt eval` rolls it out"
            )

    def check_first_frame(self, first_frame: np.ndarray | None) -> None:
        """ValueError unless a stream of this model may begin with `first_frame`, see `open`."""
        if first_frame is None and self.few_step:
            return
        expected = (self.height, self.width, 3)
        if first_frame is None:
            raise ValueError(f"first_frame: expected uint8 {expected}, got None")
        if not self.takes_picture:
            raise ValueError(
                "first_frame: expected None for a model whose first chunk has "
                f"{self.model.config.opening_frames} frames, got a picture; pass None to start "
                "from the prompt"
            )
        first_frame = np.asarray(first_frame)
        if first_frame.shape != expected or first_frame.dtype != np.uint8:
            raise ValueError(
                f"first_frame: expected uint8 {expected}, "
                f"got {first_frame.dtype} {first_frame.shape}"
            )

    def _borrow_memory(self, stream: Stream) -> tuple[StreamMemory, Callable[[], object]]:
        """Memory for as long as `stream` lives, and the call that gives it back earlier.

        One that an earlier stream has left is taken first, because a new one captures CUDA graphs.
        """
        memory = self._idle.pop() if self._idle else None
        if memory is None:
            parts = self.model, self.vae, self.latent_size
            if self.few_step:
                memory = FewStepMemory(*parts, self.sampling)
            else:
                memory = StreamMemory(*parts, self.poses)
        give_back = weakref.finalize(stream, self._idle.append, memory)
        give_back.atexit = False
        return memory, give_back


def _nearest(length: int, multiple: int) -> int:
    return max(1, round(length / multiple)) * multiple
