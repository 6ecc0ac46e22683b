"""The streaming generator: a first frame and controls in, four video frames per step out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import nvtx
import torch
from torch import Tensor

from .checkpoint import CheckpointError, load_config, load_module
from .conditioning import Control, control_rays
from .config import CameraConfig, ModelConfig
from .model import clean
from .vae import CausalVAE, VAEConfig
from .world_model import WorldModel

BUNDLED = Path(__file__).parent / "assets"


class StreamingGenerator:
    """A world model with its VAE, ready to open streams.

    >>> generator = StreamingGenerator.from_pretrained("tiny-world")
    >>> stream = generator.open(first_frame, prompt="green meadow at noon", seed=0)
    >>> frames = stream.step(Control(forward=1.0))  # uint8 (4, H, W, 3)
    """

    def __init__(
        self,
        model: WorldModel,
        vae: CausalVAE,
        *,
        height: int,
        width: int,
        fps: int = 24,
        prompts: Sequence[str] = (),
        sample: tuple[Path, str] | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.height, self.width, self.fps = height, width, fps
        self.themes = tuple(prompts)
        self._sample = sample
        factor = vae.config.space_factor
        self.latent_size = (height // factor, width // factor)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "StreamingGenerator":
        """Load a bundled model by name, or a checkpoint folder.

        Raises CheckpointError, naming what was expected and what is there.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = BUNDLED / str(name)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{name}: expected a checkpoint folder or one of {', '.join(bundled_models())}"
            )
        config = load_config(folder)
        try:
            model_config = ModelConfig(**_tuples(config["model"]))
            camera = CameraConfig(**_tuples(config["camera"]))
            vae_config = VAEConfig(**_tuples(config["vae"]))
            picture = {key: config[key] for key in ("height", "width", "fps", "prompts")}
            if sample := config.get("sample"):
                picture["sample"] = (folder / sample["image"], sample["prompt"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
        model, vae = WorldModel(model_config, camera), CausalVAE(vae_config)
        load_module(folder / "model.safetensors", model)
        load_module(folder / "vae.safetensors", vae)
        return cls(model, vae, **picture)

    def sample_image(self) -> Path:
        """A picture to start from that ships with the model. ValueError if none does."""
        if self._sample is None:
            raise ValueError("image: expected a file, this model comes without a sample picture")
        return self._sample[0]

    @property
    def sample_prompt(self) -> str:
        """The prompt that fits the sample picture, or the first theme."""
        return self._sample[1] if self._sample else self.themes[0]

    @property
    def frames_per_step(self) -> int:
        """Video frames of one step."""
        return self.vae.config.time_factor

    @property
    def device(self) -> torch.device:
        return self.vae.latent_mean.device

    def open(self, first_frame: np.ndarray, prompt: str, seed: int = 0) -> "Stream":
        """Start a stream from a picture: uint8 (height, width, 3), exactly the model's size."""
        expected = (self.height, self.width, 3)
        first_frame = np.asarray(first_frame)
        if first_frame.shape != expected or first_frame.dtype != np.uint8:
            raise ValueError(
                f"first_frame: expected uint8 {expected}, "
                f"got {first_frame.dtype} {first_frame.shape}"
            )
        return Stream(self, first_frame, prompt, seed)


class Stream:
    """One video being made. Streams of one generator share nothing but weights."""

    @torch.inference_mode()
    def __init__(
        self, generator: StreamingGenerator, first_frame: np.ndarray, prompt: str, seed: int
    ):
        self.generator = generator
        self.steps = 0
        self._random = torch.Generator(generator.device).manual_seed(seed)
        self._time = torch.ones(1, device=generator.device)
        transformer = generator.model.transformer
        self._cache = transformer.new_cache(1, generator.latent_size, dtype=torch.float32)
        pixels = torch.from_numpy(first_frame.copy()).to(generator.device)
        video = pixels.permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
        self._latent = generator.vae.encode(video)
        decoded, self._decoder = generator.vae.decode_frame(self._latent)
        self.first_frame = to_pixels(decoded)
        self.prompt = prompt

    @property
    def prompt(self) -> str:
        """The text in force. Setting it changes the next steps; the past keeps what made it."""
        return self._prompt

    @prompt.setter
    @torch.inference_mode()
    def prompt(self, prompt: str) -> None:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt: expected a string, got {prompt!r}")
        model = self.generator.model
        text, text_lens = model.text_encoder([prompt])
        keys_values = model.transformer.encode_text(text, text_lens, self._time)
        for layer, (k, v) in enumerate(keys_values):
            self._cache.write_text(layer, k, v, text_lens)
        self._prompt = prompt

    @torch.inference_mode()
    def step(self, control: Control) -> np.ndarray:
        """Make the next latent frame in one forward pass and decode it: uint8 (4, H, W, 3)."""
        model, config = self.generator.model, self.generator.model.config
        latent = self._latent
        with nvtx.annotate("condition"):
            controls = torch.tensor([[[control.yaw, control.forward]]], device=latent.device)
            rays = control_rays(controls, model.camera, *latent.shape[-2:])
            noise = torch.randn(latent.shape, generator=self._random, device=latent.device)
        with nvtx.annotate("generate"):
            output = model.transformer.step(noise, latent, rays, self._time, self._cache)
            self._latent = clean(config, output, noise, latent, self._time)
        with nvtx.annotate("decode"):
            video, self._decoder = self.generator.vae.decode_frame(self._latent, self._decoder)
            frames = to_pixels(video)
        self.steps += 1
        return frames


def to_pixels(video: Tensor) -> np.ndarray:
    """Video (1, 3, F, H, W) in [-1, 1] as uint8 (F, H, W, 3)."""
    scaled = (video[0].float() * 127.5 + 127.5).round().clamp(0, 255)
    return scaled.permute(1, 2, 3, 0).to(torch.uint8).cpu().numpy()


def bundled_models() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def _tuples(value):
    """JSON has no tuples; the configurations have no lists."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
