"""Every bundled model follows a walk, or poses, that no training has seen."""

import numpy as np
import pytest
import torch

from aapt import Control, Pose, StreamingGenerator
from aapt.checkpoint import bundled_models
from aapt.evaluate.metrics import psnr
from aapt.evaluate.puppet_scenes import held_out_puppets
from aapt.evaluate.world_scenes import held_out_starts, render_truth

STEPS = 8  # 1.3 seconds
FIGURES = ["tiny-puppet"]


@pytest.mark.parametrize("name", sorted({*bundled_models()} - {*FIGURES}))
def test_a_walk_is_nearer_to_the_truth_than_its_first_image(name):
    generator = StreamingGenerator.from_pretrained(name)
    starts = held_out_starts(3, STEPS, seed=0)
    size = generator.height, generator.width
    truth = render_truth(starts, range(4 * STEPS + 1), *size).pixels
    walked, still = [], []
    for start, video in zip(starts, truth, strict=True):
        stream = generator.open(video[0].numpy(), start.prompt)
        made = np.concatenate([stream.step(Control(*row)) for row in start.controls.tolist()])
        walked.append(psnr(torch.from_numpy(made), video[1:]))
        still.append(psnr(video[:1].expand_as(video[1:]), video[1:]))
    assert np.mean(walked) > max(20.0, np.mean(still) + 1)
    assert min(walked) > 17


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_nearer_to_the_truth_than_its_first_image(name):
    generator = StreamingGenerator.from_pretrained(name)
    made, still = [], []
    for puppet in held_out_puppets(6, STEPS, 0, generator.height, generator.width):
        truth = puppet.render()
        stream = generator.open(truth[0].numpy(), puppet.prompt, pose=Pose(puppet.points[:1]))
        steps = puppet.points[1:].reshape(STEPS, 4, *puppet.points.shape[1:])
        video = np.concatenate([stream.step(Pose(points)) for points in steps])
        made.append(psnr(torch.from_numpy(video), truth[1:]))
        still.append(psnr(truth[:1].expand_as(truth[1:]), truth[1:]))
    assert np.mean(made) > np.mean(still) + 1
    assert min(made) > 16
