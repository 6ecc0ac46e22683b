"""Training data from the puppet: rendered clips with their poses.

Run `python -m aapt.data.tiny_puppet.clips --out sheet.png` to draw every look and every place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...clock import FPS
from ...model.pose import POINTS, draw_skeletons
from ...vae import CausalVAE
from ...vae.pixels import to_video
from ..clips import LatentClips
from ..rendered import FirstImage, RenderedData, encoded
from .looks import LOOKS
from .motions import Body, keypoints, sample_body, sample_joints
from .presets import preset
from .render import PLACES, backdrop, render_puppet

FIRST_SEED = 3  # of the views behind the images to start from


@dataclass(frozen=True)
class PuppetClip:
    """A rendered clip of n latent frames, with its poses and prompt.

    Attributes:
        video: uint8 (4 n - 3, height, width, 3).
        points: float64 (4 n - 3, 14, 3), keypoints (x, y, visible) of each video frame, see `Pose`.
        prompt: The look and the place in words.
        look, place: Indices into LOOKS and PLACES.
    """

    video: Tensor
    points: np.ndarray
    prompt: str
    look: int
    place: int


def prompt_of(look: int, place: int) -> str:
    """Return the prompt of a look in a place, at most 24 bytes."""
    return f"{LOOKS[look].name} {PLACES[place]}"


@dataclass(frozen=True)
class Puppet:
    """A figure in a place, before it is rendered.

    Attributes:
        seed: Decides the place's view.
        look, place: Indices into LOOKS and PLACES.
        body, tint: Proportions, and the gain (3,) of the figure's colours.
        points: float64 (frames, 14, 3), keypoints (x, y, visible) of each video frame, see `Pose`.
        height, width: Size of the video in pixels.
    """

    seed: int
    look: int
    place: int
    body: Body
    tint: np.ndarray
    points: np.ndarray
    height: int
    width: int

    @property
    def prompt(self) -> str:
        """The look and the place in words."""
        return prompt_of(self.look, self.place)

    def render(self, frames: Sequence[int] | slice = slice(None)) -> Tensor:
        """Render video frames, by default all: uint8 (frames, height, width, 3)."""
        behind = backdrop(self.seed, self.place, self.height, self.width)
        points = self.points[frames, :, :2]
        video = render_puppet(points, self.body, self.look, self.tint, behind, self.place)
        return torch.from_numpy(video)


def sample_puppet(
    seed: int,
    latent_frames: int,
    *,
    look: int | None = None,
    place: int | None = None,
    motion: str | None = None,
    height: int = 96,
    width: int = 96,
) -> Puppet:
    """Draw a random figure that moves in a random place. Equal arguments give equal figures.

    Args:
        seed: Any int >= 0; decides body, colours, place and motion, and what is not given.
        latent_frames: Length, with the first frame; 1 gives a single image.
        look, place: Indices into LOOKS and PLACES, None for random ones.
        motion: One of MOTIONS for the whole clip, None for random ones in turn.
        height, width: Size of the video in pixels.
    """
    if latent_frames < 1:
        raise ValueError(f"latent_frames: expected 1 or more, got {latent_frames}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    rng = np.random.default_rng(seed)
    drawn = int(rng.integers(len(LOOKS))), int(rng.integers(len(PLACES)))
    look, place = (d if given is None else given for d, given in zip(drawn, (look, place)))
    body, tint = sample_body(rng), rng.uniform(0.92, 1.06, 3)
    seconds = np.arange(4 * latent_frames - 3) / FPS
    places = keypoints(sample_joints(seconds, rng, motion), body, width / height)
    points = np.concatenate([places, np.ones((*places.shape[:2], 1))], axis=-1)
    return Puppet(seed, look, place, body, tint, points, height, width)


@dataclass(frozen=True)
class PuppetData(RenderedData):
    """Clips of random figures; their motion is the latents of drawn skeletons.

    The skeletons are encoded as a video of their own (docs/method.md#10). Latent n of it drives
    latent n of the clip, so the skeleton of the first video frame drives none.
    """

    poses: ClassVar[bool] = True

    @property
    def prompts(self) -> list[str]:
        return [prompt_of(look, look % len(PLACES)) for look in range(len(LOOKS))]

    def clip(self, seed: int) -> PuppetClip:
        size = {"height": self.height, "width": self.width}
        puppet = sample_puppet(seed, self.latent_frames, **size)
        said = puppet.prompt, puppet.look, puppet.place
        return PuppetClip(puppet.render(), puppet.points, *said)

    @torch.inference_mode()
    def encode(self, vae: CausalVAE, clips: Iterable[PuppetClip]) -> dict[str, Tensor]:
        """The tensors are latents, skeletons (clips, C, T - 1, h, w) float16, and looks and places
        (clips,)."""
        latents, skeletons, looks, places = [], [], [], []
        for several, encoding in encoded(vae, clips):
            latents.append(encoding)
            drawn = [draw_skeletons(clip.points, self.height, self.width) for clip in several]
            video = to_video(torch.from_numpy(np.stack(drawn)))
            skeletons.append(vae.encode(video)[:, :, 1:].half())
            looks += [clip.look for clip in several]
            places += [clip.place for clip in several]
        return {
            "latents": torch.cat(latents),
            "skeletons": torch.cat(skeletons),
            "looks": torch.tensor(looks),
            "places": torch.tensor(places),
        }

    def latent_clips(self, tensors: dict[str, Tensor]) -> LatentClips:
        pairs = zip(tensors["looks"].tolist(), tensors["places"].tolist(), strict=True)
        phrasings = [(prompt_of(look, place),) for look, place in pairs]
        return LatentClips(tensors["latents"], tensors["skeletons"], phrasings)

    def first_images(self) -> list[FirstImage]:
        """Each look in its place, standing as in the first frame of the preset `still`."""
        points = np.ones((1, len(POINTS), 3))
        points[:, :, :2] = preset("still")[0]
        size = points, self.height, self.width
        first = []
        for look in range(len(LOOKS)):
            place = look % len(PLACES)
            puppet = Puppet(FIRST_SEED, look, place, Body(), np.ones(3), *size)
            image = Image.fromarray(puppet.render()[0].numpy())
            first.append(FirstImage(LOOKS[look].name, image, puppet.prompt))
        return first


def draw_looks(path: str | Path, moments: int = 6) -> None:
    """Write an image with a row per look, each in another place: moments half a second apart."""
    rows = []
    for look in range(len(LOOKS)):
        puppet = sample_puppet(look, 3 * moments, look=look, place=look % len(PLACES))
        rows.append(np.concatenate(list(puppet.render(slice(None, None, 12)).numpy()), axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Draws a contact sheet of the puppet.")
    parser.add_argument("--out", default="sheet.png")
    draw_looks(parser.parse_args().out)
