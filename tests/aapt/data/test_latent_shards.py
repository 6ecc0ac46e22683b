"""Encoded clips in training: windows, motion, mixtures, damaged folders."""

import dataclasses
import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from aapt.checkpoint import write_json
from aapt.data.latent_shards import DataError, LatentShards, Mixture
from aapt.data.randomness import ClipRandom
from aapt.model.conditioning import camera_rays
from aapt.model.config import CameraConfig
from aapt.model.discriminator import Discriminator
from aapt.model.world_model import WorldModel
from aapt.runs.failed_update import RecordedSets
from aapt.training.curriculum import constant
from aapt.training.optimization import Schedule
from aapt.training.stages.adversarial import Adversarial, AdversarialConfig
from aapt.training.stages.diffusion_adaptation import DiffusionAdaptation, DiffusionConfig

from ..helpers import CONFIG, draws, tiny_model
from ..runs.counting import train

CAMERA = CameraConfig(1.1, 0.0, 0.0, 1.0, 1.0)
LENGTH = 7  # latents of a clip, unless another is asked for
SHARDS = (3, 2, 1)  # clips of each
TURN = 0.1  # to the right


def folder_of(path, motion="none", buckets=("48x32",), offset=0, length=LENGTH):
    """Six clips per bucket: latent i of clip c is 10 c + i, row n of its motion 10 c + n + 1."""
    index = {"format_version": 1, "buckets": {}}
    index["encoding"] = {"latent_frames": length - 1, "motion": motion}
    for bucket in buckets:
        width, height = (int(side) // 8 for side in bucket.split("x"))
        shards, clip = [], offset
        for number, count in enumerate(SHARDS):
            values = 10.0 * torch.arange(clip, clip + count)[:, None] + torch.arange(length)
            latents = values[:, None, :, None, None].expand(-1, 5, -1, height, width)
            tensors = {"latents": latents.half()}
            if motion == "camera":
                pose = torch.eye(4)
                pose[0, 0] = pose[2, 2] = math.cos(TURN)
                pose[0, 2], pose[2, 0] = math.sin(TURN), -math.sin(TURN)
                tensors["poses"] = pose.repeat(count, length - 1, 4, 1, 1)
                tensors["poses"][..., 0, 3] = values[:, 1:, None]
                tensors["lens"] = torch.tensor([[0.8, 1.2, 0.5, 0.4]]).repeat(count, 1)
            elif motion == "pose":
                tensors["skeletons"] = latents[:, :, 1:].half()
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            about = [{"captions": [f"{c}", f"{c} again"]} for c in range(clip, clip + count)]
            name = f"{bucket}/{number:05d}.safetensors"
            (path / bucket).mkdir(parents=True, exist_ok=True)
            save_file(tensors, path / name, metadata={"clips": json.dumps(about)})
            size = (path / name).stat().st_size
            shards.append({"file": name, "clips": count, "bytes": size})
            clip += count
        index["buckets"][bucket] = {"clips": sum(SHARDS), "shards": shards}
    write_json(path / "index.json", index)
    return path


def test_windows_of_every_clip_and_place(tmp_path):
    data = LatentShards(folder_of(tmp_path))
    assert len(data) == 6 and data.latent_frames == 6
    batch = data.sample(draws(300), 3)
    assert batch.latents.shape == (300, 5, 4, 4, 6) and batch.latents.dtype == torch.float32
    assert batch.motion is None
    first = batch.latents[:, 0, 0, 0, 0]
    clips, starts = (first // 10).int(), first % 10
    assert clips.unique().tolist() == list(range(6)) and starts.unique().tolist() == [0, 1, 2, 3]
    assert 0.5 < (starts == 0).float().mean() < 0.75  # half, and a quarter of the rest
    torch.testing.assert_close(batch.latents[:, 2, :, 3, 5], first[:, None] + torch.arange(4))
    assert [prompt.split()[0] for prompt in batch.prompts] == [str(c) for c in clips.tolist()]
    assert {len(prompt.split()) for prompt in batch.prompts} == {1, 2}
    never = data.sample(draws(100), 3, first_frame="never").latents[:, 0, 0, 0, 0] % 10
    assert never.unique().tolist() == [1, 2, 3]


def test_frames_must_fit(tmp_path):
    data = LatentShards(folder_of(tmp_path))
    assert data.sample(draws(2), 6).latents.shape[2] == 7
    with pytest.raises(ValueError, match="frames: expected at most 6, got 7"):
        data.sample(draws(2), 7)
    with pytest.raises(ValueError, match="frames: expected at most 5, got 6"):
        data.sample(draws(2), 6, first_frame="never")


def test_a_rank_draws_what_one_rank_alone_would_have_drawn(tmp_path):
    folder = folder_of(tmp_path)
    whole = LatentShards(folder).sample(ClipRandom(3, 5, range(8)), 3)
    for ranks in (range(0, 4), range(4, 8)):
        part = LatentShards(folder).sample(ClipRandom(3, 5, ranks), 3)
        assert torch.equal(part.latents, whole.latents[ranks.start : ranks.stop])
        assert list(part.prompts) == list(whole.prompts)[ranks.start : ranks.stop]


def test_skeletons_belong_to_the_latent_after(tmp_path):
    batch = LatentShards(folder_of(tmp_path, "pose")).sample(draws(50), 3)
    torch.testing.assert_close(batch.motion, batch.latents[:, :, 1:])


def test_poses_belong_to_the_latent_after_and_have_the_models_lens(tmp_path):
    data = LatentShards(folder_of(tmp_path, "camera"), camera=CAMERA)
    batch = data.sample(draws(50), 3)
    assert batch.motion.shape == (50, 3, 4, 4, 4)
    moves = batch.motion[..., 0, 3]
    torch.testing.assert_close(moves, batch.latents[:, 0, 1:, 0, 0, None].expand(-1, -1, 4))
    with pytest.raises(
        ValueError, match="relative_to_first: expected False, because a clip's lens"
    ):
        LatentShards(tmp_path, camera=dataclasses.replace(CAMERA, relative_to_first=True))
    with pytest.raises(ValueError, match="camera: expected a CameraConfig for the trajectories"):
        LatentShards(tmp_path)


@pytest.mark.parametrize("kind", ["camera", "pose"])
def test_whole_motion_by_number_has_the_window_in_it(tmp_path, kind):
    """In the order asked for, across shards, through the same lens."""
    data = LatentShards(folder_of(tmp_path, kind), camera=CAMERA if kind == "camera" else None)
    batch = data.sample(draws(20), 3)
    whole = data.motion([clip for clip, _ in batch.windows])
    time = 1 if kind == "camera" else 2
    assert whole.shape[time] == 6
    for motion, window, (_, start) in zip(whole, batch.motion, batch.windows, strict=True):
        torch.testing.assert_close(motion.narrow(time - 1, start, 3), window)


def test_a_turn_is_seen_through_the_lens_of_its_clip(tmp_path):
    motion = LatentShards(folder_of(tmp_path, "camera"), camera=CAMERA).sample(draws(1), 2).motion
    rays = camera_rays(motion, CAMERA, 4, 6)
    # Column 0 of 6 and row 1 of 4, where the lens of the clip has them at depth 1
    x = (0.5 / 6 - 0.5) / 0.8
    expected = (x * math.cos(TURN) + math.sin(TURN) - x, 0, math.cos(TURN) - x * math.sin(TURN) - 1)
    assert rays[0, 3:6, 0, 1, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_stage_trains_on_shards_of_several_sizes(tmp_path):
    model = tiny_model(latent_channels=5).float()
    folder = folder_of(tmp_path, "camera", buckets=("48x32", "32x48"))
    parts = [LatentShards(folder, bucket, model.camera) for bucket in ("48x32", "32x48")]
    curriculum = constant("clips", frames=2, batch=2, steps=4)
    stage = DiffusionAdaptation(DiffusionConfig(curriculum, Schedule(1e-3)), model)
    losses = [metrics["loss"] for metrics in train(stage, 4, Mixture(parts))]
    assert all(math.isfinite(loss) for loss in losses) and len(set(losses)) == 4


def test_buckets_of_a_folder(tmp_path):
    folder = folder_of(tmp_path, buckets=("48x32", "32x48"))
    assert LatentShards(folder, "32x48").sample(draws(1), 2).size == (6, 4)
    for bucket in (None, "64x64"):
        with pytest.raises(DataError, match="bucket: expected one of 48x32, 32x48 in .*, got"):
            LatentShards(folder, bucket)


def test_a_folder_without_a_valid_index(tmp_path):
    with pytest.raises(DataError, match="expected a folder of encoded clips with index.json"):
        LatentShards(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match="index.json: expected JSON, got "):
        LatentShards(tmp_path)
    write_json(tmp_path / "index.json", {"format_version": 0})
    with pytest.raises(DataError, match="index.json: expected format_version 1, got 0"):
        LatentShards(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    data = LatentShards(folder_of(tmp_path))
    shard = tmp_path / "48x32" / "00001.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    with pytest.raises(
        DataError, match=rf"00001.safetensors: expected {size} bytes, got {size - 100}"
    ):
        LatentShards(tmp_path)
    with pytest.raises(DataError, match="00001.safetensors: expected a whole shard of clips: "):
        data.sample(draws(60), 3)  # it was whole when training began
    shard.unlink()
    with pytest.raises(DataError, match=rf"00001.safetensors: expected {size} bytes, got 0"):
        LatentShards(tmp_path)


def test_a_mixture_draws_one_part_per_update(tmp_path):
    folder = folder_of(tmp_path / "a", buckets=("48x32", "32x48"))
    other = folder_of(tmp_path / "b", buckets=("32x48", "64x32"), offset=50)
    parts = [
        LatentShards(folder, "48x32"),
        LatentShards(folder, "32x48"),
        LatentShards(other, "32x48"),
    ]
    mixture, sizes = Mixture([*parts, LatentShards(other, "64x32")]), []
    assert mixture.latent_frames == 6
    for step in range(200):
        random = draws(2, step=step)
        batch = mixture.sample(random, 2)
        rank = draws(1, step=step)
        rank.shared.random()
        assert mixture.sample(random, 3).size == mixture.sample(rank, 2).size == batch.size
        sizes.append(batch.size)
    assert 30 < sizes.count((4, 6)) < 70 and 75 < sizes.count((6, 4)) < 125
    assert len(set(sizes)) == 3
    assert mixture.sample(draws(2), 2).size == sizes[0]


def test_a_mixture_draws_from_parts_that_are_long_enough(tmp_path):
    """Two short folders and a long one, each drawn in proportion to its clips if it fits."""
    lengths = {"a": 7, "b": 7, "c": 13}
    folders = [
        folder_of(tmp_path / name, offset=20 * place, length=length)
        for place, (name, length) in enumerate(lengths.items())
    ]

    def parts(frames, first_frame="half", clips=range(2)):
        """The numbers of the parts that 300 updates draw from, with a mixture of their own."""
        mixture = Mixture([LatentShards(folder) for folder in folders])
        batches = (
            mixture.sample(ClipRandom(7, step, clips), frames, first_frame) for step in range(300)
        )
        return [int(batch.latents[0, 0, 0, 0, 0]) // 200 for batch in batches]

    short = parts(6)
    assert [short.count(part) for part in range(3)] == pytest.approx([100] * 3, abs=30)
    assert set(parts(7)) == set(parts(12)) == set(parts(6, "never")) == {2}
    assert parts(5, "never") == parts(1) == parts(6, clips=range(5, 6)) == short
    mixture = Mixture([LatentShards(folder) for folder in folders])
    assert mixture.latent_frames == 12
    with pytest.raises(ValueError, match="frames: expected at most 12 after .* got 13"):
        mixture.sample(draws(2), 13)
    with pytest.raises(ValueError, match="frames: expected at most 12 after .* got 13"):
        mixture.sample(draws(2), 12, "never")


def test_all_draws_of_an_update_come_from_one_part(tmp_path):
    """Later segments need one more latent frame than the first segment. A part that is only long
    enough for the first segment, here of another size, is never drawn."""
    wide = LatentShards(folder_of(tmp_path / "wide", length=4))
    tall = LatentShards(folder_of(tmp_path / "tall", buckets=("32x48",), offset=50, length=9))
    settings = dataclasses.replace(CONFIG, condition_channels=0, latent_channels=5)
    model, judge = WorldModel(settings, None), WorldModel(settings, None)
    given = {"shortest_segment": 2, "segments": 2, "overlap_frames": 1, "discriminator_warmup": 16}
    rates = {"generator_schedule": Schedule(1e-4), "discriminator_schedule": Schedule(1e-4)}
    config = AdversarialConfig("clips", 0, 1, segment_frames=4, **given, **rates)
    stage = Adversarial(config, model, Discriminator(judge), torch.ones(5))
    sets, seen = {"clips": Mixture([wide, tall])}, set()
    for step in range(stage.steps):
        recorded = RecordedSets(sets)
        stage.accumulate(recorded, draws(1, step=step), step)
        first, later = recorded.drawn
        assert first.size == later.size and first.latents.shape == later.latents.shape
        seen.add((first.size, first.latents.shape[2] - 1))
    assert seen == {((4, 6), 2), ((6, 4), 2), ((6, 4), 3), ((6, 4), 4)}
