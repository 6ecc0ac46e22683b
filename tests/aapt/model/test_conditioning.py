"""Controls, poses, rays, positions and prompts."""

import math
from dataclasses import replace

import pytest
import torch

from aapt.data.tiny_world import world
from aapt.model.conditioning import Control, camera_rays, control_rays, followed, relative_poses
from aapt.model.config import CameraConfig
from aapt.model.rope import RotaryPositions
from aapt.model.text import BEGIN, ByteTextEncoder, prompt_bytes, prompt_cut

from ..helpers import CAMERA, CONFIG

WORLD_CAMERA = CameraConfig(world.FIELD_OF_VIEW, world.YAW_STEP, world.FORWARD_STEP, 1.0, 1.0)


def test_relative_poses_are_those_of_the_world():
    controls = torch.tensor([[0.3, 0.8], [-1.0, 0.0], [0.0, -0.4], [0.7, 1.0]]).double()
    poses = world.integrate(controls, (1.0, -2.0, 0.4))
    expected = world.relative_poses(poses)  # four video frames per control
    torch.testing.assert_close(
        relative_poses(controls, WORLD_CAMERA).repeat_interleave(4, 0), expected
    )


def test_standing_still_is_zero():
    assert control_rays(torch.zeros(1, 2, 2), CAMERA, 4, 6).abs().max() == 0


def test_a_camera_asks_for_more_motion():
    """Turns are in the directions of rays, walks in their origins."""
    controls = torch.tensor([[[0.3, 0.8], [-1.0, 0.4]]])
    rays, more = (
        control_rays(controls, camera, 4, 6).unflatten(1, (-1, 2, 3))
        for camera in (WORLD_CAMERA, WORLD_CAMERA.asking(turns=1.5, walks=2.0))
    )
    torch.testing.assert_close(more, rays * torch.tensor([2.0, 1.5])[:, None, None, None, None])
    assert rays.abs().amax(dim=(0, 1, 3, 4, 5, 6)).min() > 0


def test_rays_of_one_pixel_by_hand():
    yaw = 0.25
    controls = torch.tensor([[[yaw, 0.5]]]).double()
    rays = control_rays(controls, WORLD_CAMERA, 2, 4)  # 90 degrees: half width 1 at depth 1
    assert rays.shape == (1, 24, 1, 2, 4)
    angle, walk = yaw * world.YAW_STEP, 0.5 * world.FORWARD_STEP
    x, y = 0.75, -0.25  # the top right pixel
    origin = [walk * math.sin(angle), 0, walk * math.cos(angle)]
    turned = [
        math.cos(angle) * x + math.sin(angle) - x,
        0,
        -math.sin(angle) * x + math.cos(angle) - 1,
    ]
    for frame in range(4):
        got = rays[0, 6 * frame : 6 * frame + 6, 0, 0, 3]
        torch.testing.assert_close(got, torch.tensor([*origin, *turned]).double())
    assert y  # the row does not matter to a turn about the vertical
    torch.testing.assert_close(rays[..., 0, :], rays[..., 1, :])


def test_moments_are_origins_times_directions():
    """Per pixel, whichever point of the ray is taken: they are at right angles to both."""
    controls = torch.tensor([[[0.25, 0.5], [-0.7, 1.0]]]).double()
    origins = control_rays(controls, WORLD_CAMERA, 2, 4)
    moments = control_rays(controls, replace(WORLD_CAMERA, rays="moment"), 2, 4)
    (origin, turned), (moment, same) = (
        rays.unflatten(1, (4, 2, 3)).unbind(2) for rays in (origins, moments)
    )
    torch.testing.assert_close(turned, same)
    x, y = torch.meshgrid(
        torch.tensor([-0.75, -0.25, 0.25, 0.75]), torch.tensor([-0.25, 0.25]), indexing="xy"
    )
    direction = turned + torch.stack([x, y, torch.ones_like(x)])[:, None].double()
    for axis in range(3):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        by_hand = origin[:, :, a] * direction[:, :, b] - origin[:, :, b] * direction[:, :, a]
        torch.testing.assert_close(moment[:, :, axis], by_hand)
    assert control_rays(torch.zeros(1, 2, 2), replace(CAMERA, rays="moment"), 4, 6).abs().max() == 0
    with pytest.raises(ValueError, match="rays: expected 'origin' or 'moment', got 'line'"):
        replace(CAMERA, rays="line")


def test_rays_relative_to_the_first_frame_are_those_of_the_way_walked():
    controls = torch.tensor([[[0.3, 0.8], [-1.0, 0.5], [0.7, 1.0]]]).double()
    first = replace(WORLD_CAMERA, relative_to_first=True)
    found = control_rays(controls, first, 2, 4)
    cameras = followed(world.relative_poses(world.integrate(controls[0], (1.0, -2.0, 0.4)))[None])
    expected = camera_rays(cameras[:, 1:].unflatten(1, (3, 4)), WORLD_CAMERA, 2, 4)
    torch.testing.assert_close(found, expected)
    walked = cameras[0, -1, :3, 3]
    torch.testing.assert_close(found[0, -6:-3, -1, 0, 0], walked)
    plain = control_rays(controls, WORLD_CAMERA, 2, 4)
    torch.testing.assert_close(found[:, :6, :1], plain[:, :6, :1])  # the first video frame
    assert (found[:, :, 1:] - plain[:, :, 1:]).abs().amax() > 0.1


def test_rays_refuse_other_frame_counts():
    with pytest.raises(ValueError, match=r"poses: expected \(batch, time, 4, 4, 4\), got"):
        camera_rays(torch.eye(4).expand(1, 2, 3, 4, 4), CAMERA, 2, 2)


@pytest.mark.parametrize("bad", [1.01, -2, 10**400, float("nan"), float("inf"), "x", None])
def test_controls_are_bounded(bad):
    with pytest.raises(ValueError, match=r"yaw: expected a number in \[-1, 1\], got"):
        Control(yaw=bad)
    with pytest.raises(ValueError, match="forward: expected"):
        Control(forward=bad)


def test_controls_take_any_real_number():
    import numpy as np

    control = Control(yaw=np.float32(0.5), forward=1)
    assert control == Control(0.5, 1.0) and isinstance(control.yaw, float)


def test_positions_leave_meta_with_values():
    with torch.device("meta"):
        positions = RotaryPositions(CONFIG)
    expected = RotaryPositions(CONFIG).time_frequency
    assert torch.equal(positions.to_empty(device="cpu").time_frequency, expected)


def test_positions_stretch_in_space_and_not_in_time():
    positions = RotaryPositions(CONFIG)
    time, rows, columns = (axis // 2 for axis in CONFIG.rope_axes)
    small = positions(torch.tensor([0, 3]), (2, 3))
    large = positions(torch.tensor([0, 3]), (4, 6))
    pick = {}
    for name, rotation, grid in (("small", small, (2, 3)), ("large", large, (4, 6))):
        pick[name] = rotation.cos.view(2, *grid, -1)
    # Row 1 of two sits where row 2 of four does; columns likewise.
    torch.testing.assert_close(pick["small"][1, 1, 2], pick["large"][1, 2, 4])
    angle = 3 * CONFIG.rope_theta ** -(torch.arange(time).double() / time)
    torch.testing.assert_close(pick["small"][1, 0, 0, :time], angle.cos().float())
    assert rows + columns + time == small.cos.shape[-1]


def test_positions_stay_exact_far_out_and_in_half_precision_models():
    positions = RotaryPositions(CONFIG).to(torch.bfloat16)
    assert positions.time_frequency.dtype == torch.float64
    far = positions(torch.tensor([1_000_003]), (1, 1)).cos[0, 0]
    assert far.item() == pytest.approx(math.cos(1_000_003), abs=1e-6)


def test_clamped_distance_rotates_sink_queries_no_further():
    import dataclasses

    config = dataclasses.replace(CONFIG, sink_distance="clamped")  # window 2: clamp at 3
    rotation = RotaryPositions(config)(torch.arange(6), (1, 1))
    torch.testing.assert_close(rotation.cos_sink[:4], rotation.cos[:4])
    torch.testing.assert_close(rotation.cos_sink[4:], rotation.cos[3:4].expand(2, -1))
    assert RotaryPositions(CONFIG)(torch.arange(6), (1, 1)).cos_sink is None


def test_prompts_are_read_in_lower_case():
    assert prompt_bytes("Ab É") == b"ab \xc3\xa9"
    assert prompt_bytes("\ud800") == b"?"  # half a character, as a broken file has it


def test_prompts_become_bytes():
    encoder = ByteTextEncoder(tokens=5, width=3)
    ids, lengths = encoder.tokenize(["Hi", "", "long prompt"])
    assert ids[0, :3].tolist() == [BEGIN, *b"hi"]
    assert lengths.tolist() == [3, 1, 5]
    embedded, _ = encoder(["Hi", "", "long prompt"])
    assert embedded.shape == (3, 5, 3)


def test_a_prompt_that_is_cut_is_told_with_the_part_that_is_read():
    assert prompt_cut("a" * 24, tokens=25) is None
    said = "prompt: expected at most 4 bytes, got 5; only 'ab' is read"
    assert prompt_cut("Ab\u20ac", tokens=5) == said  # the euro sign has three bytes, two are read
