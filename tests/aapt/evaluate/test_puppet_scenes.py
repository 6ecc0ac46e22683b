"""AKD, looks and places of models that follow poses, against figures made by hand."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from aapt import StreamingGenerator
from aapt.checkpoint import save_config, save_module
from aapt.data.tiny_puppet.looks import LOOKS
from aapt.evaluate import evaluate
from aapt.evaluate.keypoints import (
    KeypointDetectorConfig,
    augment,
    expected_places,
    figures,
    heat_loss,
    keypoint_distance,
    load_detector,
)
from aapt.evaluate.puppet_scenes import PuppetScenes, held_out_puppets, look_kept
from aapt.evaluate.windows import WINDOWS
from aapt.model.pose import POINTS
from aapt.model.world_model import WorldModel
from aapt.vae import CausalVAE

from ..helpers import CAMERA, CONFIG
from ..streaming.test_generator import VAE

SIZE = 48
BRIEF = KeypointDetectorConfig(clips=120, held_out_clips=12, steps=250, batch=16, width=24)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return folder, *load_detector(folder, BRIEF, SIZE, SIZE)


def test_the_distance_is_in_pixels():
    commanded = torch.full((2, 3, 14, 2), 0.5)
    found = commanded + torch.tensor([3 / 64, 4 / 32])
    assert keypoint_distance(found, commanded, height=32, width=64) == pytest.approx(5.0)
    with pytest.raises(ValueError, match=r"keypoints: expected \(2, 3, 14, 2\), got \(2, 14, 2\)"):
        keypoint_distance(found[:, 0], commanded, 32, 64)


def test_places_are_means_around_the_peak():
    logits = torch.full((1, 2, 12, 12), -20.0)
    logits[0, 0, 3, 7] = logits[0, 0, 3, 8] = 5.0  # between two columns
    logits[0, 1, 9, 1] = 5.0
    logits[0, 1, 0, 11] = 4.9  # a second figure, far away
    expected = torch.tensor([[[8 / 12, 3.5 / 12], [1.5 / 12, 9.5 / 12]]])
    assert torch.allclose(expected_places(logits), expected, atol=1e-4)


def test_the_loss_is_least_at_the_place_itself():
    """The maps that minimise it are the bilinear shares of the place, whose mean is the place."""
    places = torch.rand(5, 14, 2) * 0.8 + 0.1
    logits = torch.zeros(5, 14, 6, 8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        heat_loss(logits, places).backward()
        optimizer.step()
    assert torch.allclose(expected_places(logits.detach()), places, atol=0.01)


def test_a_mirrored_figure_swaps_left_and_right():
    images = torch.zeros(64, 3, 8, 8)
    images[..., 0] = 1.0
    points = torch.rand(64, 14, 2)
    shown, places = augment(images, points, torch.Generator().manual_seed(0))
    mirrored = shown[..., -1].mean(dim=(1, 2)) > shown[..., 0].mean(dim=(1, 2))
    assert 10 < mirrored.sum() < 54
    assert torch.equal(places[~mirrored], points[~mirrored])
    for name in POINTS:
        other = name
        if name.startswith("left"):
            other = name.replace("left", "right")
        elif name.startswith("right"):
            other = name.replace("right", "left")
        found, was = places[mirrored, POINTS.index(name)], points[mirrored, POINTS.index(other)]
        assert torch.allclose(found, torch.stack([1 - was[:, 0], was[:, 1]], dim=-1))


def test_a_short_training_already_finds_points_and_is_kept(detector):
    folder, network, score = detector
    _, points = figures(7_500_000, 12, SIZE, SIZE)
    guess = keypoint_distance(points.mean(dim=0).expand_as(points), points, SIZE, SIZE)
    assert score < 0.7 * guess
    again, same = load_detector(folder, BRIEF, SIZE, SIZE)
    video = torch.randint(0, 256, (2, 3, SIZE, SIZE, 3), dtype=torch.uint8)
    assert same == score and torch.equal(again.find(video), network.find(video))
    assert network.find(video).shape == (2, 3, 14, 2)
    assert len(list(folder.glob("keypoint-detector-*.safetensors"))) == 1


def test_the_colours_nearest_to_a_look_decide():
    references = torch.rand(4, 7, 3)
    assert look_kept(references + 0.01, references, torch.arange(4)) == 1
    assert look_kept(references[[1, 0, 2, 3]], references, torch.arange(4)) == 0.5


def test_puppets_show_every_look_and_place_and_begin_the_same():
    puppets = held_out_puppets(6, 4, 0, SIZE, SIZE)
    assert {p.look for p in puppets} == {p.place for p in puppets} == set(range(len(LOOKS)))
    longer = held_out_puppets(2, 9, 0, SIZE, SIZE)[1]
    assert longer.prompt == puppets[1].prompt
    assert np.array_equal(longer.points[:17], puppets[1].points)
    with pytest.raises(ValueError, match="starts: expected 1 to 1000, got 0"):
        held_out_puppets(0, 4, 0, SIZE, SIZE)
    with pytest.raises(ValueError, match="seed: expected 0 or more, got -1"):
        held_out_puppets(1, 4, -1, SIZE, SIZE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("follows")
    torch.manual_seed(0)
    model, vae = WorldModel(replace(CONFIG, condition_channels=4), None), CausalVAE(VAE)
    save_module(folder / "model.safetensors", model)
    save_module(folder / "vae.safetensors", vae)
    parts = {"model": asdict(model.config), "camera": None, "vae": asdict(VAE), "poses": True}
    save_config(folder, {"height": SIZE, "width": SIZE, "fps": 24, "prompts": ["a"], **parts})
    return folder


def test_the_truth_follows_its_own_poses(checkpoint, detector):
    generator = StreamingGenerator.from_pretrained(checkpoint)
    puppets = held_out_puppets(6, 8, 0, SIZE, SIZE)
    scenes = PuppetScenes(puppets, {checkpoint: generator}, BRIEF, detector[0])
    window = WINDOWS[0]
    video = torch.stack([puppet.render(list(window.frames)) for puppet in puppets])
    palettes = torch.zeros(6, 6)
    found = scenes.control_metrics(video, palettes, window)
    assert found["akd_to_pose"] < 1.5 * detector[2]
    assert found["look_kept"] >= 0.5
    turned = video[[1, 2, 3, 4, 5, 0]]  # the figures of others
    other = scenes.control_metrics(turned, palettes, window)
    assert other["akd_to_pose"] > 1.5 * found["akd_to_pose"]
    assert other["look_kept"] < found["look_kept"]
    channels = scenes.condition(generator)
    assert channels(1).shape == channels(8).shape == (6, 4, 1, 6, 6)
    unlike = WorldModel(CONFIG, CAMERA)
    other = StreamingGenerator(unlike, generator.vae, height=SIZE, width=SIZE)
    with pytest.raises(ValueError, match="b: expected a model that follows poses, as the others"):
        PuppetScenes(puppets, {"a": generator, "b": other}, BRIEF, detector[0])


def test_an_evaluation_reports_akd_beside_the_detectors_own(checkpoint, detector, tmp_path):
    settings = {"starts": 2, "seconds": 2.0, "detector": BRIEF, "network_cache": detector[0]}
    report = evaluate([checkpoint], tmp_path, **settings, log=lambda line: None)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["detector_distance"] == pytest.approx(detector[2])
    window = report.windows[WINDOWS[0].name]
    truth, made = window["truth"], window[checkpoint.name]
    assert truth.akd_to_pose < made.akd_to_pose
    assert truth.theme_kept == 1 and made.yaw_gain is None
    columns = {column.header for column in report.table().columns}
    assert {"AKD to pose px", "look kept", "theme kept"} <= columns and "yaw gain" not in columns
    assert "keypoint detector on held-out real figures" in report.table().caption
