"""Errors of poses that the user's own networks read: keypoints of people, and cameras.

Both compare video with what it was to show; the networks are TorchScript files, see the classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..torchscript import TorchScriptNetwork
from .scenes import Scenes
from .windows import Window

SEEN = 0.3  # least score of a keypoint that counts as detected
STILL = 1e-6  # way of a camera that does not move, in the unit of its poses
BATCH = 32  # video frames per forward pass


class KeypointErrors:
    """Average keypoint distance (AKD) and missing keypoint rate, arXiv 2003.00196, section 4.

    Frames of a video are compared with those of the truth at the same time, so a rollout has them
    only up to the end of its clip.

    path: A TorchScript network from frames, uint8 (N, 3, H, W), to keypoints (N, K, 3): x and y in
    pixels, and a score of 0 to 1. ValueError if the file is none.
    """

    of_truth: ClassVar[bool] = False

    def __init__(self, path: Path):
        returned = "keypoints (N, K, 3)"
        self.network = TorchScriptNetwork("keypoints", path, returned, (-1, 3), torch.uint8)

    def measure(
        self, video: Tensor, truth: Tensor, scenes: Scenes, window: Window
    ) -> Mapping[str, float | None]:
        """Measure a window of videos, uint8 (starts, F, H, W, 3), against the truth's frames."""
        if window.last > scenes.steps:
            return {}
        made, real = (self._keypoints(x) for x in (video[:, 1:], truth))
        return keypoint_errors(made, real)

    @torch.no_grad()
    def _keypoints(self, video: Tensor) -> Tensor:
        frames = video.flatten(0, 1).permute(0, 3, 1, 2)
        return torch.cat([self.network(batch) for batch in frames.split(BATCH)])


def keypoint_errors(made: Tensor, real: Tensor) -> dict[str, float | None]:
    """Compare keypoints (N, K, 3) of frames with those of the true frames.

    Returns `akd_to_truth`, the mean distance in pixels of keypoints that are detected in both, and
    `missing_keypoints`, the share of the truth's that are not detected in the video. None if there
    are none to compare.
    """
    wanted, seen = real[..., 2] >= SEEN, made[..., 2] >= SEEN
    both = wanted & seen
    distance = (made[..., :2] - real[..., :2]).double().norm(dim=-1)[both]
    return {
        "akd_to_truth": distance.mean().item() if len(distance) else None,
        "missing_keypoints": (~seen)[wanted].double().mean().item() if wanted.any() else None,
    }


class CameraErrors:
    """Rotation and translation errors of the camera, arXiv 2404.02101, equations 4 and 5.

    Args:
        path: A TorchScript network from one clip, float32 (1, 3, F, H, W) of 0 to 255, to the
            camera of each frame, (1, F, 4, 4), camera-to-world in OpenCV axes and any unit. Where
            it finds none it returns numbers that are not finite.
        scenes: The starts that will be measured.

    ValueError if the file is none, and for starts without camera motion.
    """

    of_truth: ClassVar[bool] = True  # the estimator's own error, below which no model gets

    def __init__(self, path: Path, scenes: Scenes):
        if scenes.cameras(Window("first", 1, 1)) is None:
            raise ValueError(
                "camera_poses: expected starts with camera motion, got clips without; encode clips "
                "with --motion camera"
            )
        returned = "cameras (1, F, 4, 4)"
        self.network = TorchScriptNetwork("camera_poses", path, returned, (-1, 4, 4), torch.float32)

    @torch.no_grad()
    def measure(
        self, video: Tensor, truth: Tensor, scenes: Scenes, window: Window
    ) -> Mapping[str, float | None]:
        """Measure a window of videos, uint8 (starts, 1 + 4 T, H, W, 3), against the motion that
        drove them."""
        commanded = scenes.cameras(window)
        clips = video.permute(0, 4, 1, 2, 3).split(1)
        found = torch.cat([self.network(clip) for clip in clips])
        if found.shape != commanded.shape:
            raise ValueError(
                f"camera_poses: expected one camera per frame, {commanded.shape[1]}, "
                f"got {found.shape[1]}"
            )
        return camera_errors(found, commanded)


def camera_errors(found: Tensor, true: Tensor) -> dict[str, float | None]:
    """Compare cameras (starts, F, 4, 4), camera-to-world, of videos with the true ones.

    Each trajectory is taken relative to its first camera, and its positions are divided by the
    largest distance from there, because an estimator's unit is its own. Returns per clip, mean over
    clips: `rotation_error`, the sum over frames of the angles between both, in radians;
    `translation_error`, the sum of squared distances; and `cameras_found`, the share of clips in
    which the estimator found all cameras. Other clips have no errors.
    """
    whole = found.flatten(1).isfinite().all(dim=1)
    shares = {"cameras_found": whole.double().mean().item()}
    if not whole.any():
        return shares
    a, b = (_relative(cameras[whole].double()) for cameras in (found, true))
    turned = a[..., :3, :3] @ b[..., :3, :3].mT
    cosine = (turned.diagonal(dim1=-2, dim2=-1).sum(dim=-1) - 1) / 2
    angle = cosine.clamp(-1, 1).arccos().sum(dim=1)
    gap = (_scaled(a) - _scaled(b)).square().sum(dim=(1, 2))
    return shares | {
        "rotation_error": angle.mean().item(),
        "translation_error": gap.mean().item(),
    }


def _relative(cameras: Tensor) -> Tensor:
    """Return cameras (B, F, 4, 4) relative to the first."""
    return torch.linalg.solve(cameras[:, :1].expand_as(cameras), cameras)


def _scaled(cameras: Tensor) -> Tensor:
    """Return positions (B, F, 3), the farthest at distance 1; zeros if the camera rests."""
    positions = cameras[..., :3, 3]
    reach = positions.norm(dim=-1).amax(dim=1)[:, None, None]
    return torch.where(reach > STILL, positions / reach.clamp_min(STILL), 0.0)
