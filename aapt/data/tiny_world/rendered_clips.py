"""Training data from the tiny world: rendered clips, and the latents of many of them.

Run `python -m aapt.data.tiny_world.rendered_clips --out sheet.png` to draw every theme.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...checkpoint import BUNDLED, load_config
from ...vae import CausalVAE
from ..clips import LatentClips
from ..rendered import FirstImage, RenderedData, encoded
from .render import render
from .themes import THEMES
from .world import make_world, sample_trajectory


@dataclass(frozen=True)
class Clip:
    """A rendered clip of n latent frames, with its controls, poses and prompt.

    Attributes:
        video: uint8 (4 n - 3, height, width, 3).
        controls: float32 (n - 1, 2), rows (yaw, forward); row i drives video frames 4 i + 1 to
            4 i + 4.
        poses: float64 (4 n - 3, 3), rows (x, y, heading).
        prompt: A sentence of the theme.
        theme: Index into THEMES.
    """

    video: Tensor
    controls: Tensor
    poses: Tensor
    prompt: str
    theme: int


def sample_clip(
    seed: int,
    latent_frames: int,
    *,
    theme: int | None = None,
    height: int = 80,
    width: int = 128,
) -> Clip:
    """Render a random walk through a random world. Equal arguments give equal clips.

    Args:
        seed: Any int >= 0; decides world, walk and prompt, and the theme unless it is given.
        latent_frames: Length, with the first frame; 1 gives a single image.
        theme: Index into THEMES, None for a random one.
        height, width: Size of the video in pixels.
    """
    if latent_frames < 1:
        raise ValueError(f"latent_frames: expected 1 or more, got {latent_frames}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    rng = np.random.default_rng(seed)
    drawn = int(rng.integers(len(THEMES)))
    theme = drawn if theme is None else theme
    world = make_world(seed, theme)
    prompt = THEMES[theme].prompts[int(rng.integers(len(THEMES[theme].prompts)))]
    controls, poses = sample_trajectory(world, latent_frames - 1, rng)
    return Clip(render(world, poses, height, width), controls, poses, prompt, theme)


@dataclass(frozen=True)
class ProceduralData(RenderedData):
    """Clips of random walks through the tiny world; their motion is the controls."""

    @property
    def prompts(self) -> list[str]:
        return [theme.prompts[0] for theme in THEMES]

    def clip(self, seed: int) -> Clip:
        return sample_clip(seed, self.latent_frames, height=self.height, width=self.width)

    def encode(self, vae: CausalVAE, clips: Iterable[Clip]) -> dict[str, Tensor]:
        """The tensors are latents, controls (clips, T - 1, 2) and themes (clips,)."""
        latents, controls, themes = [], [], []
        for several, encoding in encoded(vae, clips):
            latents.append(encoding)
            controls += [clip.controls for clip in several]
            themes += [clip.theme for clip in several]
        return {
            "latents": torch.cat(latents),
            "controls": torch.stack(controls).float(),
            "themes": torch.tensor(themes),
        }

    def latent_clips(self, tensors: dict[str, Tensor]) -> LatentClips:
        phrasings = [THEMES[theme].prompts for theme in tensors["themes"].tolist()]
        return LatentClips(tensors["latents"], tensors["controls"], phrasings)

    def first_images(self) -> list[FirstImage]:
        """Those of the bundled model, one per theme."""
        folder = BUNDLED / "tiny-world"
        config, first = load_config(folder), []
        for entry in (config["sample"], *config["gallery"]):
            with Image.open(folder / entry["image"]) as image:
                name = Path(entry["image"]).stem
                first.append(FirstImage(name, image.convert("RGB"), entry["prompt"]))
        return first


def draw_themes(path: str | Path, moments: int = 6) -> None:
    """Write an image with a row per theme: moments of one walk, 6 latent frames apart."""
    rows = []
    for theme in range(len(THEMES)):
        clip = sample_clip(theme, 6 * moments, theme=theme)
        rows.append(np.concatenate(list(clip.video[::24].numpy()), axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Draws a contact sheet of the tiny world.")
    parser.add_argument("--out", default="sheet.png")
    draw_themes(parser.parse_args().out)
