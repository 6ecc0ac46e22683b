"""The puppet against closed forms: bodies, keypoints, motions, and where the figure is drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from aapt.data.tiny_puppet import clips as clips_module
from aapt.data.tiny_puppet.clips import PuppetData, draw_looks, prompt_of, sample_puppet
from aapt.data.tiny_puppet.looks import LOOKS
from aapt.data.tiny_puppet.motions import (
    ARMS,
    GROUND,
    JOINTS,
    LEGS,
    LIFT,
    MOTIONS,
    Body,
    keypoints,
    sample_joints,
)
from aapt.data.tiny_puppet.presets import preset
from aapt.data.tiny_puppet.render import PLACES, backdrop
from aapt.data.tiny_world.themes import THEMES
from aapt.model.pose import LIMBS, POINTS, draw_skeletons, limb_colour
from aapt.model.text import ByteTextEncoder
from aapt.streaming.poses import FOLDER, PRESETS, load_poses
from aapt.training.puppet_recipe import tiny_puppet
from aapt.training.stages.decoder import fit_linear
from aapt.vae.pixels import to_video

SMALL = {"height": 48, "width": 48}


def at(name):
    return POINTS.index(name)


def upright():
    joints = np.zeros((1, JOINTS))
    for _, _, share in LEGS:
        joints[:, share] = 1.0
    return joints


def test_an_upright_body_has_its_lengths_and_stands_on_the_ground():
    body = Body()
    points = keypoints(upright(), body, aspect=1.0)[0]
    assert points[at("left ankle"), 1] == points[at("right ankle"), 1]
    assert 0 < GROUND - points[at("left ankle"), 1] < 0.05
    for side, sign in (("right", -1), ("left", 1)):
        down = np.diff(points[[at(f"{side} hip"), at(f"{side} knee"), at(f"{side} ankle")]], axis=0)
        assert np.allclose(down, [[0, body.leg]] * 2)
        arm = np.diff(
            points[[at(f"{side} shoulder"), at(f"{side} elbow"), at(f"{side} wrist")]], axis=0
        )
        assert np.allclose(arm, [[0, body.arm], [0, 0.95 * body.arm]])
        assert np.isclose(points[at(f"{side} shoulder"), 0], 0.5 + sign * body.shoulders)
    assert np.allclose(points[at("neck")] - points[at("head")], [0, body.neck])


def test_joints_turn_limbs_outwards_and_a_wide_image_keeps_shapes():
    joints = upright()
    (right, _), (left, elbow) = ARMS
    joints[:, right], joints[:, left], joints[:, elbow] = np.pi / 2, np.pi / 2, np.pi / 2
    joints[:, LIFT] = 0.1
    body = Body()
    points, low = (keypoints(j, body, aspect=1.0)[0] for j in (joints, upright()))
    assert np.allclose(points[at("right elbow")] - points[at("right shoulder")], [-body.arm, 0])
    assert np.allclose(points[at("left elbow")] - points[at("left shoulder")], [body.arm, 0])
    upper = points[at("left wrist")] - points[at("left elbow")]
    assert np.allclose(upper, [0, -0.95 * body.arm])  # bent up
    assert np.isclose(low[at("left ankle"), 1] - points[at("left ankle"), 1], 0.1)
    wide = keypoints(joints, body, aspect=2.0)[0]
    assert np.allclose((wide[:, 0] - 0.5) * 2, points[:, 0] - 0.5)


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_are_smooth_in_the_image_and_move(motion):
    seconds = np.arange(240) / 24
    for seed in range(3):
        joints = sample_joints(seconds, np.random.default_rng(seed), motion)
        points = keypoints(joints, Body(), aspect=1.0)
        assert 0 < points.min() and points.max() < 1
        assert np.abs(np.diff(points, axis=0)).max() < 0.09  # 9 pixels of 96 per video frame
        if motion != "still":
            assert np.ptp(points, axis=0).max() > 0.05


def test_a_sequence_begins_the_same_for_every_length():
    seconds = np.arange(200) / 24
    whole = sample_joints(seconds, np.random.default_rng(3))
    part = sample_joints(seconds[:60], np.random.default_rng(3))
    assert np.array_equal(whole[:60], part)


def test_the_same_seed_gives_the_same_clip_and_another_seed_does_not():
    first, again, other = (sample_puppet(seed, 3, **SMALL) for seed in (5, 5, 6))
    assert torch.equal(first.render(), again.render()) and np.array_equal(
        first.points, again.points
    )
    assert not np.array_equal(first.points, other.points)
    video = first.render()
    assert video.shape == (9, 48, 48, 3) and video.dtype == torch.uint8
    assert torch.equal(first.render([3, 8]), video[[3, 8]])
    assert first.points.shape == (9, 14, 3) and (first.points[..., 2] == 1).all()
    assert first.prompt == prompt_of(first.look, first.place)
    with pytest.raises(ValueError, match="latent_frames: expected 1 or more, got 0"):
        sample_puppet(0, 0)
    with pytest.raises(ValueError, match="seed: expected 0 or more, got -1"):
        sample_puppet(-1, 1)


@pytest.mark.parametrize("look", range(len(LOOKS)))
def test_the_figure_is_where_its_keypoints_are(look):
    """Pixels at the middle of every limb differ from the empty place, far pixels do not."""
    clip = sample_puppet(31, 1, look=look, place=0, motion="still")
    empty = backdrop(31, 0, 96, 96)
    changed = np.abs(clip.render()[0].numpy().astype(int) - empty.round().astype(int)).max(-1) > 8
    places = clip.points[0, :, :2] * 96
    for a, b in LIMBS:
        column, row = ((places[a] + places[b]) / 2).astype(int)
        assert changed[row - 1 : row + 2, column - 1 : column + 2].any(), (POINTS[a], POINTS[b])
    low, high = places.min(axis=0) - 30, places.max(axis=0) + 30
    x, y = np.meshgrid(np.arange(96), np.arange(96))
    far = (x < low[0]) | (x > high[0]) | (y < low[1]) | (y > high[1])
    assert far.any() and not changed[far].any()


def test_looks_and_places_differ_and_prompts_name_them():
    images = [
        sample_puppet(1, 1, look=look, place=place, **SMALL).render().float()
        for look, place in ((0, 0), (1, 0), (0, 1))
    ]
    assert min((images[0] - other).abs().mean() for other in images[1:]) > 2
    assert len(PLACES) == len(THEMES)
    prompts = {prompt_of(i, j) for i in range(len(LOOKS)) for j in range(len(PLACES))}
    reader = ByteTextEncoder(tokens=25, width=1)
    assert len(prompts) == 36 and not any(reader.cut(prompt) for prompt in prompts)


def test_a_skeleton_has_its_colours_where_its_limbs_are():
    clip = sample_puppet(4, 1)
    points = clip.points.copy()
    drawn = draw_skeletons(points, 192, 192)[0]
    for number, (a, b) in enumerate(LIMBS[:-1]):  # the head's dot covers a part of the last
        later = [pair for pair in LIMBS[number + 1 :]]
        middle = (points[0, a, :2] + points[0, b, :2]) / 2 * 192
        clear = all(_distance(middle, *points[0, pair, :2] * 192) > 9 for pair in map(list, later))
        column, row = middle.astype(int)
        if clear:
            assert tuple(drawn[row, column]) == limb_colour(number)
    assert tuple(drawn[tuple((points[0, 0, 1::-1] * 192).astype(int))]) == (255, 255, 255)
    points[..., 2] = 0
    assert not draw_skeletons(points, 32, 32).any()


def _distance(point, a, b):
    share = np.clip((point - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
    return np.linalg.norm(point - a - share * (b - a))


def test_a_hidden_point_takes_its_limbs_with_it_and_points_may_be_outside():
    points = sample_puppet(4, 1).points.copy()
    whole = draw_skeletons(points, 96, 96)
    points[0, at("left wrist"), 2] = 0
    part = draw_skeletons(points, 96, 96)
    wrist = (points[0, at("left wrist"), 1::-1] * 96).astype(int)
    assert whole[0][tuple(wrist)].any() and not part[0][tuple(wrist)].any()
    points[0, :, :2] += 0.9
    assert not draw_skeletons(points, 96, 96)[0, :40, :40].any()


def test_encoded_skeletons_are_those_of_the_next_video_frames():
    data = PuppetData(height=32, width=32, clips=3, latent_frames=3)
    clips = [data.clip(data.first_seed + i) for i in range(3)]
    config = tiny_puppet().vae
    vae = fit_linear(config, torch.stack([clip.video for clip in clips]))
    tensors = data.encode(vae, clips)
    batch = data.latent_clips(tensors)
    assert tensors["latents"].shape == (3, 32, 3, 4, 4) and len(batch) == 3
    drawn = draw_skeletons(clips[1].points, 32, 32)
    expected = vae.encode(to_video(torch.from_numpy(drawn)[None]))[0, :, 1:]
    assert torch.allclose(batch.motion([1])[0], expected, atol=2e-2)
    assert batch.phrasings[1] == (clips[1].prompt,)


def test_the_packaged_presets_are_those_of_their_motions():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(PRESETS)
    for name in PRESETS:
        stored = json.loads((FOLDER / f"{name}.json").read_text())
        assert np.allclose(stored["keypoints"], preset(name), atol=1.01e-4)
        assert load_poses(name).seconds >= 4


def test_the_sheet_has_a_row_per_look(tmp_path):
    draw_looks(tmp_path / "sheet.png", moments=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 96, len(LOOKS) * 96)


def test_every_look_stands_in_a_place_of_its_own_to_start_from():
    first = PuppetData(96, 96, 1, 1).first_images()
    assert [image.name for image in first] == [look.name for look in LOOKS]
    assert {image.prompt for image in first} == {prompt_of(i, i) for i in range(len(LOOKS))}
    pixels = np.stack([np.asarray(image.image) for image in first]).astype(int)
    assert pixels.shape == (len(LOOKS), 96, 96, 3)
    points = np.array(preset("still")[0]) * 96
    head = pixels[:, int(points[0, 1]), int(points[0, 0])]
    corner = pixels[:, 2, 2]
    assert (np.abs(head - corner).sum(axis=1) > 60).all()  # a head, not the place behind it
    assert clips_module.FIRST_SEED < PuppetData(1, 1, 1, 1).first_seed
