"""Camera trajectories in the text format of RealEstate10K.

The first line is a title, and may be missing. Every other line is one video frame:

    timestamp fx fy cx cy k1 k2 p11 p12 p13 p14 p21 ... p34

`timestamp` is in microseconds after the first video frame. fx fy cx cy are the focal lengths and
the principal point, as fractions of the width and height of the upright image. k1 and k2 are 0,
because distortion is not supported. p is the world-to-camera matrix, row by row, in OpenCV axes
(x right, y down, z forward).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .sample import Skipped

REASON = "bad camera"
COLUMNS = 19  # numbers per line
LENS_TOLERANCE = 0.01  # a share; a clip has one lens and no zoom (docs/method.md#10)
MAX_TURN = math.pi / 2  # radians between two lines; a larger turn could go either way


@dataclass(frozen=True)
class Trajectory:
    """A camera's path, all float64.

    Attributes:
        times: (N,) seconds, growing.
        lens: (4,) of (fx, fy, cx, cy), fractions of the image's sides.
        cameras: (N, 4, 4), camera-to-world.
    """

    times: Tensor
    lens: Tensor
    cameras: Tensor

    def at(self, times: Tensor) -> Tensor:
        """Camera-to-world matrices (len(times), 4, 4) at times in seconds.

        Between two lines the rotation turns evenly about one axis, and the centre moves on a
        straight line. A time outside the path gives the nearest end.
        """
        times = times.clamp(self.times[0], self.times[-1])
        after = torch.searchsorted(self.times, times).clamp(min=1)
        start, end = self.cameras[after - 1], self.cameras[after]
        share = (times - self.times[after - 1]) / (self.times[after] - self.times[after - 1])
        turn = rotation_vectors(start[:, :3, :3].mT @ end[:, :3, :3])
        cameras = start.clone()
        cameras[:, :3, :3] = start[:, :3, :3] @ rotations(share[:, None] * turn)
        cameras[:, :3, 3] = torch.lerp(start[:, :3, 3], end[:, :3, 3], share[:, None])
        return cameras


def rotation_vectors(matrices: Tensor) -> Tensor:
    """Convert rotations (..., 3, 3) by less than half a turn to axis times angle (..., 3)."""
    odd = (matrices - matrices.mT) / 2
    axis = torch.stack([odd[..., 2, 1], odd[..., 0, 2], odd[..., 1, 0]], dim=-1)  # times sine
    sine = axis.norm(dim=-1, keepdim=True)
    cosine = (matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1, keepdim=True) - 1) / 2
    return axis * torch.where(sine > 0, torch.atan2(sine, cosine) / sine, 1.0)


def rotations(vectors: Tensor) -> Tensor:
    """Convert axis times angle (..., 3) to rotation matrices (..., 3, 3)."""
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    return torch.linalg.matrix_exp(cross)


def parse_trajectory(text: str) -> Trajectory:
    """Read a trajectory. Skipped for `bad camera`, naming the line, if the format differs."""
    lines = [(n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if lines and not _is_camera(lines[0][1]):  # a title
        del lines[0]
    if len(lines) < 2:
        raise Skipped(REASON, f"expected a title and two video frames or more, got {len(lines)}")
    for number, words in lines:
        if len(words) != COLUMNS:
            raise Skipped(REASON, f"line {number}: expected {COLUMNS} numbers, got {len(words)}")
    try:
        rows = [[float(word) for word in words] for _, words in lines]
    except ValueError as error:
        raise Skipped(REASON, f"expected numbers: {error}") from None
    table = torch.tensor(rows, dtype=torch.float64)

    def require(good: Tensor, expected: str) -> None:
        if not good.all():
            number = lines[int(good.int().argmin())][0]
            raise Skipped(REASON, f"line {number}: expected {expected}")

    times, lens, matrices = table[:, 0] / 1e6, table[:, 1:5], table[:, 7:].unflatten(1, (3, 4))
    require(table.isfinite().all(dim=1), "finite numbers")
    require(times.diff(prepend=times[:1] - 1) > 0, "a later timestamp than the line before")
    require((lens[:, :2] > 0).all(dim=1), "focal lengths above 0")
    require((table[:, 5:7] == 0).all(dim=1), "no lens distortion")
    same = (lens - lens[0]).abs() <= LENS_TOLERANCE * lens[0, [0, 1, 0, 1]]
    require(same.all(dim=1), "the lens of the first line")
    rotation, shift = matrices[:, :, :3], matrices[:, :, 3:]
    error = (rotation @ rotation.mT - torch.eye(3)).abs().amax(dim=(1, 2))
    require((error < 1e-3) & (rotation.det() > 0), "a rotation in the matrix")
    turned = rotation_vectors(rotation @ rotation[[0, *range(len(table) - 1)]].mT).norm(dim=1)
    require(turned < MAX_TURN, "a turn below 90 degrees since the line before")
    cameras = torch.eye(4, dtype=torch.float64).repeat(len(table), 1, 1)
    cameras[:, :3, :3] = rotation.mT  # the inverse of a rotation
    cameras[:, :3, 3:] = -rotation.mT @ shift
    return Trajectory(times, lens[0], cameras)


def _is_camera(words: list[str]) -> bool:
    """True for a line that is no title: 19 numbers."""
    try:
        return len([float(word) for word in words]) == COLUMNS
    except ValueError:
        return False
