"""Whole videos beside a report: their names, their frames, and a disk that is full."""

import os
import resource

import pytest
import torch

from aapt.evaluate import evaluate
from aapt.evaluate.saved_videos import save_videos
from aapt.evaluate.scenes import roll_out_scenes
from aapt.evaluate.world_scenes import WorldScenes, held_out_starts, render_truth
from aapt.streaming.generator import StreamingGenerator

from ..helpers import read_video
from .test_evaluation import SMALL_DETECTOR, SMALL_PROBE, save_checkpoint
from .test_metrics import HEIGHT, WIDTH

STEPS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("random"))


def rolled_out(checkpoint, folder, kept):
    generator = StreamingGenerator.from_pretrained(checkpoint)
    scenes = WorldScenes(
        held_out_starts(3, STEPS, 0), {"": generator}, SMALL_PROBE, folder, SMALL_DETECTOR
    )
    frames = range(1 + 4 * STEPS)
    video, _, latents = roll_out_scenes(generator, scenes, STEPS, frames, seed=0, kept=kept)
    return generator, scenes, video, latents


def test_saved_videos_are_what_was_measured(checkpoint, tmp_path):
    """Frames are nearer to their own than to another start's; H.264 loses the rest."""
    generator, scenes, video, latents = rolled_out(checkpoint, tmp_path, kept=2)
    assert latents.shape[:3] == (2, 16, 1 + STEPS)
    paths = save_videos(tmp_path, scenes, {"a/b": generator}, {"a/b": latents}, seed=7)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        f"videos/{start}-{theme}-seed-7-{source}.mp4"
        for start, theme in enumerate(label.split()[1] for label in scenes.labels[:2])
        for source in ("truth", "a%2Fb")
    ]
    truth = render_truth(scenes.starts, range(1 + 4 * STEPS), HEIGHT, WIDTH)
    for start in range(2):
        for path, whole in zip(paths[2 * start :], (truth, video), strict=False):
            found = read_video(path).float()
            assert found.shape == (1 + 4 * STEPS, HEIGHT, WIDTH, 3)
            own, other = (
                (found - whole.pixels[i].float()).abs().mean() for i in (start, 1 - start)
            )
            assert own < 0.7 * other  # noise of random weights loses much


def test_the_decoded_rollout_is_the_measured_one(checkpoint, tmp_path):
    """Before H.264 the frames agree to one step of 8 bits."""
    from aapt.evaluate.video_frames import decode_stream

    generator, _, video, latents = rolled_out(checkpoint, tmp_path, kept=1)
    found = torch.cat(list(decode_stream(generator.vae, latents)))
    assert (found.int() - video.pixels[0].int()).abs().max() <= 1


def test_no_videos_unless_asked_for(checkpoint, tmp_path):
    lines = []
    settings = dict(starts=1, seconds=2.0, probe=SMALL_PROBE, objects=SMALL_DETECTOR)
    settings |= {"network_cache": tmp_path / "cache"}
    evaluate([checkpoint], tmp_path / "out", **settings, log=lines.append)
    assert not (tmp_path / "out" / "videos").exists()
    assert not any("video" in line for line in lines)


def test_a_full_disk_leaves_no_part_of_a_video(checkpoint, tmp_path):
    """A file may not grow beyond 2000 bytes: no MP4 fits."""
    generator, scenes, _, latents = rolled_out(checkpoint, tmp_path, kept=1)
    arguments = tmp_path / "full", scenes, {"a": generator}, {"a": latents}, 0
    child = os.fork()
    if child == 0:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            save_videos(*arguments)
        except OSError as error:
            os._exit(error.errno)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 27  # EFBIG
    assert list((tmp_path / "full" / "videos").iterdir()) == []
