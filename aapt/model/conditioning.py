"""Controls and camera motion as condition channels (docs/method.md#10)."""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .config import CameraConfig

# Horizontal field of view, in radians, at which the rays of encoded clips are measured: about that
# of RealEstate10K.
MEASURED_FIELD_OF_VIEW = 1.0


@dataclass(frozen=True)
class Control:
    """The camera's controls in one step, each a deflection in [-1, 1].

    `yaw` > 0 turns right, `forward` > 0 walks ahead.
    """

    yaw: float = 0.0
    forward: float = 0.0

    def __post_init__(self):
        for name in ("yaw", "forward"):
            value = getattr(self, name)
            if not (isinstance(value, Real) and abs(value) <= 1):
                raise ValueError(f"{name}: expected a number in [-1, 1], got {value!r}")
            object.__setattr__(self, name, float(value))


def relative_poses(controls: Tensor, camera: CameraConfig) -> Tensor:
    """Returns the camera-to-previous-camera transform of one video frame under each control.

    controls: (..., 2) of (yaw, forward). Returns (..., 4, 4) in OpenCV axes (x right, y down,
    z forward): the camera turns first and then walks along its new heading.
    """
    yaw = controls[..., 0] * camera.yaw_step
    walk = controls[..., 1] * camera.forward_step
    cos, sin = yaw.cos(), yaw.sin()
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    rows = [cos, zero, sin, walk * sin]
    rows += [zero, one, zero, zero]
    rows += [-sin, zero, cos, walk * cos]
    rows += [zero, zero, zero, one]
    return torch.stack(rows, dim=-1).unflatten(-1, (4, 4))


def trajectory_poses(cameras: Tensor) -> Tensor:
    """Returns camera-to-previous-camera transforms along a trajectory.

    cameras: (..., F, 4, 4), camera-to-world of each video frame. Returns (..., F - 1, 4, 4).
    """
    return torch.linalg.solve(cameras[..., :-1, :, :], cameras[..., 1:, :, :])


def followed(poses: Tensor) -> Tensor:
    """Chains camera-to-previous-camera transforms.

    poses: (B, F, 4, 4). Returns cameras (B, 1 + F, 4, 4) relative to the one before the first, in
    float64.
    """
    cameras = [torch.eye(4, dtype=torch.float64, device=poses.device).expand(len(poses), 4, 4)]
    for pose in poses.double().unbind(1):
        cameras.append(cameras[-1] @ pose)
    return torch.stack(cameras, dim=1)


def through_lens(
    poses: Tensor, lens: Tensor, camera: CameraConfig, height: int, width: int
) -> Tensor:
    """Returns poses whose `camera_rays` are those of footage taken with another lens.

    poses: (..., 4, 4); lens: (4,) of (fx, fy, cx, cy), focal lengths and principal point in shares
    of the image's width and height; `height` and `width` are those given to `camera_rays`.

    The model's lens sees a pixel along r; the other lens sees it along A r, with A upper
    triangular. Rays hold the change (R - I) r of a direction, so R is replaced by I + (R - I) A.
    The result is not a rotation.
    """
    fx, fy, cx, cy = lens.to(poses)
    model_fx = 0.5 / math.tan(camera.field_of_view / 2)
    model_fy = model_fx * width / height  # square latent pixels
    to_lens = torch.eye(3).to(poses)
    to_lens[0, 0], to_lens[0, 2] = model_fx / fx, (0.5 - cx) / fx
    to_lens[1, 1], to_lens[1, 2] = model_fy / fy, (0.5 - cy) / fy
    still = torch.eye(3).to(poses)
    folded = poses.clone()
    folded[..., :3, :3] = still + (poses[..., :3, :3] - still) @ to_lens
    return folded


def camera_rays(poses: Tensor, camera: CameraConfig, height: int, width: int) -> Tensor:
    """Returns rays through latent-pixel centres, relative to the previous video frame; with
    `relative_to_first`, to the video frame before the first of `poses`.

    poses: (B, T, frames, 4, 4), of each video frame of each latent frame the pose relative to the
    video frame before.
    Returns (B, 6 frames, T, height, width): per video frame the ray's origin, or its moment, and
    its direction less that of a resting camera. A resting camera gives zeros, and both parts have
    about unit deviation. The moment is origin x direction, with the whole direction.
    """
    if poses.shape[2:] != (camera.frames, 4, 4):
        raise ValueError(
            f"poses: expected (batch, time, {camera.frames}, 4, 4), got {tuple(poses.shape)}"
        )
    if camera.relative_to_first:
        poses = followed(poses.flatten(1, 2))[:, 1:].unflatten(1, poses.shape[1:3]).to(poses)
    half = math.tan(camera.field_of_view / 2)
    pixel = 2 * half / width  # square latent pixels
    x = (torch.arange(width, device=poses.device) + 0.5 - width / 2) * pixel
    y = (torch.arange(height, device=poses.device) + 0.5 - height / 2) * pixel
    rest = torch.stack(
        [x.expand(height, width), y[:, None].expand(height, width), torch.ones_like(x + y[:, None])]
    ).to(poses)  # (3, H, W)
    rotation, origin = poses[..., :3, :3], poses[..., :3, 3]
    # A sum, not a matrix product: mixed precision would round it to the width of a pixel
    turn = rotation - torch.eye(3, dtype=rotation.dtype, device=rotation.device)
    turned = (turn[..., None, None] * rest).sum(dim=4)  # (B, T, frames, 3, H, W)
    place = origin[..., None, None].expand_as(turned)
    if camera.rays == "moment":
        place = torch.linalg.cross(place, rest + turned, dim=3)
    rays = torch.cat([place / camera.origin_deviation, turned / camera.direction_deviation], dim=3)
    return rays.flatten(2, 3).transpose(1, 2)  # (B, 6 frames, T, H, W)


def control_rays(controls: Tensor, camera: CameraConfig, height: int, width: int) -> Tensor:
    """Returns the condition channels of controls (B, T, 2), each held for one latent frame."""
    poses = relative_poses(controls, camera)[:, :, None].expand(-1, -1, camera.frames, -1, -1)
    return camera_rays(poses, camera, height, width)
