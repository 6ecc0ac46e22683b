"""The tiny world against closed forms: poses, projection, obstacles, looks."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import aapt.data
from aapt.data.tiny_world.render import render
from aapt.data.tiny_world.rendered_clips import draw_themes, sample_clip
from aapt.data.tiny_world.themes import THEMES
from aapt.data.tiny_world.world import (
    CLEARANCE,
    FIELD_OF_VIEW,
    FORWARD_STEP,
    YAW_STEP,
    World,
    integrate,
    make_world,
    relative_poses,
    sample_trajectory,
)


def walk(seed, steps=48, theme=0):
    world = make_world(seed, theme)
    controls, poses = sample_trajectory(world, steps, np.random.default_rng(seed))
    return world, controls, poses


def first_object(world, is_round):
    found = world.objects(np.array([-30.0, -30.0]), np.array([30.0, 30.0]))
    return next(item for item in found if item.is_round == is_round)


def test_a_clip_is_uint8_and_one_control_drives_four_frames():
    clip = sample_clip(3, 5, height=20, width=32)
    assert clip.video.shape == (17, 20, 32, 3) and clip.video.dtype == torch.uint8
    assert clip.controls.shape == (4, 2) and clip.controls.dtype == torch.float32
    assert clip.poses.shape == (17, 3) and clip.poses.dtype == torch.float64
    assert clip.prompt in THEMES[clip.theme].prompts
    assert torch.equal(integrate(clip.controls, tuple(clip.poses[0])), clip.poses)


def test_the_same_seed_gives_the_same_clip_and_another_seed_does_not():
    first, again, other = (sample_clip(s, 4, height=20, width=32) for s in (5, 5, 6))
    assert torch.equal(first.video, again.video) and torch.equal(first.controls, again.controls)
    assert first.prompt == again.prompt and first.theme == again.theme
    assert not torch.equal(first.poses, other.poses)


def test_frames_do_not_depend_on_their_neighbours_in_the_call():
    world, _, poses = walk(1, 12)
    video = render(world, poses, 40, 64)
    alone = torch.cat([render(world, poses[i : i + 1], 40, 64) for i in (0, 17, 48)])
    assert (video[[0, 17, 48]].int() - alone.int()).abs().max() <= 1


def test_a_long_clip_starts_like_a_short_one():
    short, long = (sample_clip(8, n, height=16, width=16) for n in (3, 9))
    assert torch.equal(short.controls, long.controls[:2])
    assert torch.equal(short.video, long.video[:9])


def test_walking_straight_on_moves_along_the_heading():
    poses = integrate(torch.tensor([[0.0, 1.0], [0.0, -0.5]]), (1.0, 2.0, 0.3))
    away = FORWARD_STEP * torch.tensor([0, 1, 2, 3, 4, 3.5, 3, 2.5, 2], dtype=torch.float64)
    expected = torch.stack([1 + away * math.cos(0.3), 2 + away * math.sin(0.3)], 1)
    torch.testing.assert_close(poses[:, :2], expected, rtol=0, atol=1e-12)
    assert (poses[:, 2] == 0.3).all()


def test_a_constant_turn_walks_on_a_circle():
    yaw, forward, steps = 0.75, 0.5, 10
    poses = integrate(torch.tensor([[yaw, forward]] * steps))
    step = yaw * YAW_STEP
    k = torch.arange(4 * steps + 1, dtype=torch.float64)
    # Sum over j = 1..k of exp(i j step): the closed form of the chord of a polygon.
    scale = forward * FORWARD_STEP * torch.sin(k * step / 2) / math.sin(step / 2)
    torch.testing.assert_close(poses[:, 0], scale * torch.cos((k + 1) * step / 2))
    torch.testing.assert_close(poses[:, 1], scale * torch.sin((k + 1) * step / 2))
    torch.testing.assert_close(poses[:, 2], k * step)


def test_relative_poses_compose_to_the_absolute_pose():
    _, _, poses = walk(2)
    x, y, heading = poses[:, 0], poses[:, 1], poses[:, 2]
    world_from_camera = torch.zeros(len(poses), 4, 4, dtype=torch.float64)
    right = torch.stack([-heading.sin(), heading.cos(), torch.zeros_like(x)], 1)
    ahead = torch.stack([heading.cos(), heading.sin(), torch.zeros_like(x)], 1)
    world_from_camera[:, :3, 0], world_from_camera[:, 2, 1] = right, 1.0
    world_from_camera[:, :3, 2] = ahead
    world_from_camera[:, 0, 3], world_from_camera[:, 1, 3] = x, y
    world_from_camera[:, 3, 3] = 1.0
    assert torch.allclose(torch.linalg.det(world_from_camera), torch.ones_like(x))

    composed = world_from_camera[0]
    for f, motion in enumerate(relative_poses(poses)):
        composed = composed @ motion
        torch.testing.assert_close(composed, world_from_camera[f + 1])


def test_relative_poses_walk_along_z_and_turn_right_for_positive_yaw():
    ahead = relative_poses(integrate(torch.tensor([[0.0, 1.0]]), (4.0, -3.0, 2.0)))[0]
    expected = torch.eye(4, dtype=torch.float64)
    expected[2, 3] = FORWARD_STEP
    torch.testing.assert_close(ahead, expected)
    right = relative_poses(integrate(torch.tensor([[1.0, 0.0]])))[0]
    # A point straight ahead of the second camera is to the right (x > 0) of the first.
    seen = right[:3, :3] @ torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    expected = torch.tensor([math.sin(YAW_STEP), 0.0, math.cos(YAW_STEP)], dtype=torch.float64)
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("seed", range(12))
def test_walks_have_bounded_controls_and_keep_clear_of_objects(seed):
    world, controls, poses = walk(seed, 64)
    assert controls.abs().max() <= 1 and controls[:, 1].min() >= -0.4 - 1e-6
    assert world.clearance(poses.numpy()).min() >= CLEARANCE - 1e-6


def test_walks_stand_turn_walk_and_come_close():
    walks = [walk(seed, 64) for seed in range(20)]
    controls = torch.cat([w[1] for w in walks])
    turns, moves = controls[:, 0] != 0, controls[:, 1] != 0
    for kind in (~turns & ~moves, turns & ~moves, ~turns & moves, turns & moves):
        assert kind.float().mean() > 0.01
    clearance = np.concatenate([w[0].clearance(w[2].numpy()) for w in walks])
    assert (clearance < CLEARANCE + 0.3).mean() > 0.1


def test_clearance_is_the_distance_to_the_surface():
    world = make_world(0, 0)
    block, pillar = first_object(world, False), first_object(world, True)
    points = np.array(
        [
            [block.x, block.y],
            [block.x + block.half_x + 0.1, block.y],
            [pillar.x, pillar.y],
            [pillar.x, pillar.y - pillar.half_x - 0.2],
        ]
    )
    np.testing.assert_allclose(world.clearance(points), [0, 0.1, 0, 0.2], atol=1e-12)


def test_objects_stay_inside_their_own_cells():
    world = make_world(9, 1)
    objects = list(world.objects(np.array([-60.0, -60.0]), np.array([60.0, 60.0])))
    assert len(objects) > 100 and {o.is_round for o in objects} == {False, True}
    for o in objects:
        for centre, half, cell in ((o.x, o.half_x, o.cell[0]), (o.y, o.half_y, o.cell[1])):
            assert cell * world.cell_size < centre - half
            assert centre + half < (cell + 1) * world.cell_size


def facing(world, away, shift=0.0):
    """A pose that looks along +x at the side of a block, `away` units in front of the side."""
    block = first_object(world, False)
    return block, torch.tensor([[block.x - block.half_x - away, block.y + shift, 0.0]])


@dataclass(frozen=True)
class Chosen(World):
    """A world with the given objects and no others."""

    chosen: tuple = ()

    def objects(self, low, high):
        return iter(self.chosen)


def wall_columns(away):
    """A block and its columns over the horizon, where no object casts a shadow."""
    world = make_world(4, 1)
    block, pose = facing(world, away)
    alone, empty = (
        render(Chosen(4, 1, world.tint, chosen=chosen), pose, 160, 256)[0, 70].int()
        for chosen in ((block,), ())
    )
    columns = (alone - empty).abs().sum(1).gt(8).nonzero()[:, 0]
    return block, int(columns[0]), int(columns[-1]) + 1


@pytest.mark.parametrize("away", [1.4, 2.0, 2.6])
def test_a_wall_covers_the_columns_that_a_pinhole_gives(away):
    block, left, right = wall_columns(away)
    focal = 128 / math.tan(FIELD_OF_VIEW / 2)
    width = min(256, 2 * focal * block.half_y / away)
    assert abs((right - left) - width) <= 3
    assert abs((right + left) / 2 - 128) <= 2


def test_a_wall_grows_when_it_is_approached():
    widths = [right - left for _, left, right in (wall_columns(a) for a in (3.0, 2.2, 1.4))]
    assert widths[0] < widths[1] < widths[2]


def test_turning_right_moves_the_image_to_the_left():
    world = make_world(0, 3)
    poses = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0 + 2 * YAW_STEP]])
    sky = render(world, poses, 80, 128)[:, 20:38].float().mean(-1)
    shift = round(64 * 2 * YAW_STEP)
    error = {
        s: (sky[1, :, 40:88] - sky[0, :, 40 + s : 88 + s]).abs().mean().item()
        for s in (-shift, 0, shift)
    }
    assert error[shift] < 0.5 * error[0] and error[shift] < 0.5 * error[-shift]


def test_the_sky_stays_and_the_ground_flows_when_walking():
    world = make_world(0, 0)
    poses = integrate(torch.tensor([[0.0, 1.0]] * 2), (0.5, 0.2, 0.4))
    video = render(world, poses, 80, 128).float()
    change = (video[0] - video[-1]).abs()
    assert change[:12].median() == 0  # the median: a tree may stand before the sky
    assert change[60:].mean() > 8


def test_themes_look_and_read_differently():
    means = []
    for theme in range(len(THEMES)):
        world, _, poses = walk(0, 40, theme)
        picture = render(world, poses[::8], 20, 32).float()
        means.append(torch.cat([picture[:, :10].mean((0, 1, 2)), picture[:, 12:].mean((0, 1, 2))]))
    distance = torch.cdist(torch.stack(means), torch.stack(means))
    assert distance[~torch.eye(len(THEMES), dtype=bool)].min() > 25
    prompts = [prompt for theme in THEMES for prompt in theme.prompts]
    assert len(set(prompts)) == len(prompts) and len(THEMES) == 6
    assert all(prompt.isascii() and 0 < len(prompt) <= 24 for prompt in prompts)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 50), (81, 127), (64, 64)])
def test_any_size_renders(size):
    for theme in range(len(THEMES)):
        clip = sample_clip(theme, 2, theme=theme, height=size[0], width=size[1])
        assert clip.video.shape == (5, *size, 3)


def test_a_larger_image_shows_the_same_scene():
    world, _, poses = walk(7, 6, theme=2)
    small = render(world, poses[::6], 40, 64).float()
    large = render(world, poses[::6], 160, 256).float()
    pooled = large.reshape(-1, 40, 4, 64, 4, 3).mean((2, 4))
    assert (small - pooled).abs().mean() < 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_clip(0, 0), "latent_frames: expected 1 or more, got 0"),
        (lambda: sample_clip(-1, 2), "seed: expected 0 or more, got -1"),
        (lambda: sample_clip(0, 2, theme=6), "theme: expected 0 to 5, got 6"),
        (lambda: sample_clip(0, 2, width=0), "height, width: expected 1 or more, got 80 and 0"),
        (lambda: integrate(torch.zeros(3)), r"controls: expected shape \(n, 2\), got \(3,\)"),
        (
            lambda: integrate(torch.full((1, 2), 1.5)),
            r"controls: expected numbers in \[-1, 1\], got 1.5",
        ),
        (lambda: integrate(torch.full((1, 2), math.nan)), "controls: expected finite numbers"),
        (lambda: relative_poses(torch.zeros(4, 2)), r"poses: expected shape \(n, 3\)"),
        (lambda: render(make_world(0, 0), torch.zeros(0, 3)), "poses: expected 1 row or more"),
        (lambda: render(make_world(0, 0), torch.zeros(2)), r"poses: expected shape \(n, 3\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_sample_image_is_a_view_of_the_desert():
    picture = np.asarray(Image.open(Path(aapt.data.__file__).parents[1] / "assets/sample.png"))
    view = render(make_world(502, 1), torch.tensor([[3.4, -11.5, 2.8]], dtype=torch.float64))[0]
    assert picture.shape == (80, 128, 3)
    assert np.abs(picture.astype(int) - view.numpy().astype(int)).max() <= 1


def test_the_contact_sheet_has_a_row_per_theme(tmp_path):
    path = tmp_path / "sheet.png"
    draw_themes(path, moments=2)
    assert Image.open(path).size == (2 * 128, len(THEMES) * 80)
