"""Held-out clips of `aapt encode`, for checkpoints whose world no renderer knows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..clock import FRAMES_PER_LATENT
from ..data.latent_shards import LatentShards, read_index
from ..data.videos.buckets import Bucket
from ..model.conditioning import followed
from ..streaming.generator import StreamingGenerator
from ..streaming.rollout import starting_over
from ..vae.folder import ORIGINAL, load_vae, vae_digest
from .scenes import TRUTH, Timed
from .video_frames import VideoFrames, decode_chosen, decode_stream, latent_statistics
from .windows import Window, windows_at

MOTIONS = {"camera": ("camera",), "channels": ("pose",), "prompt": ("none", "pose")}


class ClipScenes:
    """`Scenes` that begin as clips do, with the clips' captions and motion.

    The motion is repeated when a clip ends. The truth is the clip's latents, decoded by a
    checkpoint's autoencoder.

    Args:
        folder: Encoded clips that no training has seen.
        generators: By their checkpoints, all of one image size.
        count: Number of clips; clip i is the same whatever the count.
        seed: Chooses the clips.

    ValueError if the clips are not latents of every checkpoint's autoencoder (light or original),
    have another motion than the checkpoint's, another size or rate, are fewer than `count`, or end
    before the first window does.
    """

    def __init__(
        self,
        folder: Path,
        generators: Mapping[str | Path, StreamingGenerator],
        count: int,
        seed: int,
    ):
        index = read_index(folder)
        for checkpoint, generator in generators.items():
            _check_fit(folder, index, checkpoint, generator)
        self.folder, self.bucket = folder, _bucket(generator)
        clips, self.fps = self._open(generator), generator.fps
        shortest = windows_at(self.fps)[0].last
        if clips.latent_frames < shortest:
            raise ValueError(
                f"{folder}: expected clips of at least {shortest} latent frames after the "
                f"first, got {clips.latent_frames}"
            )
        if not 1 <= count <= len(clips):
            raise ValueError(
                f"starts: expected 1 to {len(clips)}, the clips of {self.bucket} in {folder}, "
                f"got {count}"
            )
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        self.numbers = np.random.default_rng(seed).permutation(len(clips))[:count].tolist()
        batch = clips.whole(self.numbers)
        self.latents, self.prompts, self.steps = batch.latents, batch.prompts, clips.latent_frames
        self.labels = [f"{i}" for i in range(count)]
        self.poses = clips.poses(self.numbers)

    def _open(self, generator: StreamingGenerator) -> LatentShards:
        """Open the clips, with motion as this generator's camera sees it."""
        return LatentShards(self.folder, self.bucket, generator.model.camera)

    def truth(
        self,
        generator: StreamingGenerator,
        frames: Sequence[int],
        windows: Sequence[Window],
        timed: Timed,
    ) -> tuple[dict[str, VideoFrames], list[Tensor]]:
        with timed(TRUTH):
            latents = self.latents.to(generator.device)
            known = [frame for frame in frames if frame <= FRAMES_PER_LATENT * self.steps]
            truth = decode_chosen(generator.vae, latents.split(1, dim=2), known)
            statistics = latent_statistics(latents).cpu()
        covered = [window for window in windows if window.last <= self.steps]
        return {TRUTH: truth}, [statistics[:, w.first : w.last + 1] for w in covered]

    def truth_video(
        self, generator: StreamingGenerator, start: int, steps: int
    ) -> Iterator[Tensor]:
        return decode_stream(generator.vae, self.latents[start, None, :, : 1 + steps])

    def first_latents(self, generator: StreamingGenerator) -> Tensor:
        return self.latents[:, :, :1].to(generator.vae.latent_mean)

    def condition(self, generator: StreamingGenerator) -> Callable[[int], Tensor | None]:
        motion = self._open(generator).whole(self.numbers).motion
        if motion is not None:
            motion = motion.to(generator.device)
        return starting_over(generator.model.channels(motion, generator.latent_size))

    def control_metrics(self, video: Tensor, palettes: Tensor, window: Window) -> Mapping[str, Any]:
        return {}

    def cameras(self, window: Window) -> Tensor | None:
        if self.poses is None:
            return None
        steps = [(step - 1) % self.steps for step in range(window.first, window.last + 1)]
        return followed(self.poses[:, steps].flatten(1, 2))

    def object_fields(
        self, generator: StreamingGenerator, videos: Mapping[str, VideoFrames], timed: Timed
    ) -> Mapping[str, Any]:
        return {}

    def report_fields(self, truth: VideoFrames, window: Window) -> Mapping[str, Any]:
        seconds = self.steps * FRAMES_PER_LATENT / self.fps
        return {
            "truth": f"{len(self.numbers)} clips of {self.folder}, {seconds:.2f} s each, as the "
            "autoencoder decodes them"
        }


def _bucket(generator: StreamingGenerator) -> str:
    return str(Bucket(generator.width, generator.height))


def _check_fit(
    folder: Path, index: Mapping[str, Any], checkpoint: str | Path, generator: StreamingGenerator
) -> None:
    """Raise ValueError unless clips with this index suit a checkpoint."""
    encoding, bucket = index["encoding"], _bucket(generator)
    if bucket not in index["buckets"]:
        raise ValueError(
            f"{folder}: expected clips of {bucket} for {checkpoint}, "
            f"got {', '.join(index['buckets']) or 'none yet'}"
        )
    motions = MOTIONS[generator.driven_by]
    if encoding["motion"] not in motions:
        raise ValueError(
            f"{folder}: expected clips with {' or '.join(motions)} motion for {checkpoint}, "
            f"got {encoding['motion']}"
        )
    channels = generator.model.config.condition_channels
    if generator.driven_by == "channels" and channels != generator.vae.config.latent_channels:
        raise ValueError(
            f"{checkpoint}: expected {generator.vae.config.latent_channels} condition channels, "
            f"the channels of a skeleton's latents, got {channels}"
        )
    for name, frames in (
        (folder, encoding["frames_per_latent"]),
        (checkpoint, generator.frames_per_step),
    ):
        if frames != FRAMES_PER_LATENT:
            raise ValueError(
                f"{name}: expected {FRAMES_PER_LATENT} frames per latent frame, got {frames}"
            )
    if encoding["fps"] != generator.fps:
        raise ValueError(
            f"{folder}: expected {generator.fps} frames per second, as {checkpoint} has, "
            f"got {encoding['fps']}"
        )
    vaes = generator.vae, load_vae(checkpoint, ORIGINAL)
    known = sorted({vae_digest(vae) for vae in vaes})
    if encoding["vae"] not in known:
        raise ValueError(
            f"{folder}: expected latents of the autoencoder of {checkpoint} "
            f"({' or '.join(digest[:8] for digest in known)}), got those of {encoding['vae'][:8]}"
        )
