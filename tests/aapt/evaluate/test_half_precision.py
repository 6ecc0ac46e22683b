"""An evaluation in half precision, and in a size of its own."""

import torch

from aapt import StreamingGenerator
from aapt.evaluate.scenes import roll_out_scenes
from aapt.evaluate.world_scenes import WorldScenes, held_out_starts

from .test_evaluation import SMALL_DETECTOR, SMALL_PROBE, save_checkpoint


def test_a_rollout_in_half_precision_keeps_to_the_whole_one(tmp_path):
    checkpoint = save_checkpoint(tmp_path)
    videos = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = StreamingGenerator.from_pretrained(checkpoint, dtype=dtype, size=(48, 64))
        starts = held_out_starts(2, 6, seed=0)
        scenes = WorldScenes(starts, {checkpoint: generator}, SMALL_PROBE, tmp_path, SMALL_DETECTOR)
        assert scenes.first_latents(generator).dtype == dtype
        found, *_ = roll_out_scenes(generator, scenes, 2, range(9), seed=0)
        assert found.pixels.shape == (2, 9, 48, 64, 3)
        videos.append(found.pixels.float())
    assert 0 < (videos[0] - videos[1]).abs().mean() < 4
