"""Motion of later segments, which must not tell a fake from a real clip (docs/method.md#8)."""

import torch
from torch import Tensor

from ..data.clips import ClipBatch, ClipsOfOneSize
from ..data.randomness import ClipRandom
from ..model.conditioning import camera_rays, control_rays
from ..model.config import CameraConfig

CANDIDATES = 16  # clips per rollout and segment, among which the continuation is sought


class LaterMotion:
    """Continues the motion of clips that are shorter than their rollouts.

    A camera takes a new trajectory: the continuation of the moment, in `CANDIDATES` random clips,
    that is most like the end of the rollout's trajectory. Condition channels such as a skeleton
    follow their own clip, forwards and backwards (`there_and_back`).

    Args:
        clips: The set that `batch` was drawn from.
        overlap: Frames that a segment shares with the segment before.
        camera: The model's camera; None for a model that is driven by condition channels.
    """

    def __init__(
        self, clips: ClipsOfOneSize, batch: ClipBatch, overlap: int, camera: CameraConfig | None
    ):
        self.clips, self.camera = clips, camera
        self.past = batch.motion
        self.numbers = [clip for clip, _ in batch.windows]
        self.overlap = overlap
        length = batch.targets.shape[2]
        self.places = [(start + length - 1, 1) for _, start in batch.windows]

    def next(self, frames: int, random: ClipRandom) -> Tensor:
        """Returns the motion of the next `frames` latent frames, laid out as `ClipBatch.motion`."""
        if self.camera:
            drawn = [random.integers(len(self.clips)) for _ in range(CANDIDATES)]
            numbers, chosen = torch.tensor(drawn).T.unique(return_inverse=True)
            # Only what continues a window that the discriminator could be shown as real: a clip's
            # first rows differ from others, because no window of a later segment begins there.
            pool = self.clips.motion(numbers.tolist())[:, max(0, self.overlap - 1) :]
            pool, chosen = pool.to(random.device), chosen.to(random.device)
            made = continued(self.past, pool, chosen, frames, self.camera, random)
            self.past = torch.cat([self.past, made], dim=1)[:, -2:]
        else:
            own = self.clips.motion(self.numbers)
            length = own.shape[2]
            late = max(0, self.overlap - 1)
            delays = [late if coin else 0 for coin in random.integers(4)]
            paths = [
                there_and_back(place, length, frames, delay)
                for place, delay in zip(self.places, delays, strict=True)
            ]
            cut = [clip[:, path] for clip, (path, _) in zip(own, paths, strict=True)]
            made = torch.stack(cut).to(random.device)
            self.places = [place for _, place in paths]
        return made


def continued(
    past: Tensor,
    pool: Tensor,
    candidates: Tensor,
    frames: int,
    camera: CameraConfig,
    random: ClipRandom,
) -> Tensor:
    """Continue trajectories by `frames` latent frames of the trajectories most like their ends.

    Two moments are alike if their rays are, and the changes of the rays in the latent frame that
    ends there, each relative to its deviation among the clip's candidates. What is left between the
    rays is added to the whole continuation. So every change from one video frame to the next is one
    that a trajectory of the pool makes.

    Args:
        past: Controls (B, T, 2) or poses (B, T, frames, 4, 4).
        pool: Trajectories to choose from, (clips, L, ...), with L > `frames`.
        candidates: Places in the pool of the trajectories that each may continue by, (B, K).

    Returns (B, frames, ...).
    """
    length = pool.shape[1]
    remembered = min(2, past.shape[1], length - frames)  # latent frames that are compared
    ends = _rays(past[:, -remembered:], camera)
    rays = _rays(pool, camera)[candidates]
    rays = rays[:, :, : length - frames].unfold(2, remembered, 1).movedim(-1, 3)
    # (B, K, places, video frames, numbers): the rays that lead to each place
    rays, ends = rays.flatten(3, 4), ends.flatten(1, 2)[:, None, None]
    video_frames = 1 if remembered == 1 else camera.frames + 1
    rays, ends = rays[..., -video_frames:, :], ends[..., -video_frames:, :]
    unlike = _relative(rays[..., -1:, :], ends[..., -1:, :])
    if remembered > 1:
        unlike = unlike + _relative(rays.diff(dim=3), ends.diff(dim=3))
    # A steady motion is alike at many places: the first of them would always be a young one.
    unlike = (unlike + 1e-4 * random.uniform(*unlike.shape[1:])).flatten(1)
    chosen = unlike.argmin(dim=1)
    likest = candidates.gather(1, (chosen // rays.shape[2])[:, None])[:, 0]
    places = chosen % rays.shape[2] + remembered
    made = []
    for before, number, place in zip(past, likest.tolist(), places.tolist(), strict=True):
        trajectory = pool[number]
        made.append(trajectory[place : place + frames] + _last(before) - _last(trajectory[:place]))
    return torch.stack(made)


def there_and_back(
    place: tuple[int, int], length: int, frames: int, delay: int
) -> tuple[list[int], tuple[int, int]]:
    """Walk on by `frames` frames inside a clip of `length` frames.

    A walk that would leave the clip turns after `delay` frames, or at the end of the clip if that
    is nearer. A late turn would betray a segment by its small range of motion, an early one by
    frames that resemble its overlap; delays that differ from clip to clip hide both.

    place: the last frame, and the direction 1 or -1. Returns the frames and the new place.
    """
    at, direction = place
    ahead = length - 1 - at if direction > 0 else at
    turn = frames if ahead >= frames else min(delay, ahead)
    path = []
    for index in range(frames):
        if index == turn or not 0 <= at + direction < length:
            direction = -direction
        at = min(max(at + direction, 0), length - 1)  # a clip of one frame stays there
        path.append(at)
    return path, (at, direction)


def _rays(motion: Tensor, camera: CameraConfig) -> Tensor:
    """Two rays per video frame, one left and one right, as (B, T, video frames, 12)."""
    rays = (control_rays if motion.dim() == 3 else camera_rays)(motion, camera, 1, 2)
    return rays.unflatten(1, (camera.frames, 6)).permute(0, 3, 1, 2, 4, 5).flatten(3)


def _relative(values: Tensor, to: Tensor) -> Tensor:
    """Squared distances (B, K, places), in units of the squared deviation of each clip's values, so
    that a clip's choice does not depend on the clips beside it."""
    deviation = values.flatten(1, -2).var(dim=1, correction=0).sum(dim=-1)[:, None, None]
    return (values - to).square().sum(dim=-1).mean(dim=-1) / deviation.clamp_min(1e-12)


def _last(motion: Tensor) -> Tensor:
    """The motion of the last video frame, as one that is added to every video frame."""
    return motion[-1:] if motion.dim() == 2 else motion[-1:, -1:]
