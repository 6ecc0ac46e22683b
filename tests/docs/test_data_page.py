"""The Python of docs/data.md, on a model and clips of the sizes that the page names."""

import numpy as np
import pytest

from aapt.model.config import CameraConfig

from ..aapt.data.test_latent_shards import folder_of
from ..aapt.evaluate.test_clip_scenes import HEIGHT, WIDTH, save_checkpoint
from .test_pages import ROOT, blocks

PAGE = ROOT / "docs" / "data.md"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the page's block with these words, given these names; returns what it defines."""
    monkeypatch.chdir(tmp_path)

    def start(words: str, **names) -> dict:
        (block,) = (block for block in blocks(PAGE, {"python"}) if words in block)
        exec(compile(block, str(PAGE), "exec"), names)
        return names

    return start


def test_every_block_is_run_here():
    assert len(blocks(PAGE, {"python"})) == 2


def test_a_model_that_a_skeleton_drives(run, tmp_path):
    save_checkpoint(tmp_path / "runs" / "pose" / "pose", "pose")
    drawn = np.zeros((9, HEIGHT, WIDTH, 3), dtype=np.uint8)
    made = run("runs/pose/pose", drawn=drawn, first_frame=drawn[0])
    assert made["stream"].steps == 2 and made["frames"].shape == (4, HEIGHT, WIDTH, 3)


def test_clips_of_two_buckets(run, tmp_path):
    folder_of(tmp_path / "latents", "camera", ("736x416", "416x736"), length=32)

    class Model:
        camera = CameraConfig(1.1, 0.0, 0.0, 1.0, 1.0)

    batch = run("Mixture", model=Model())["batch"]
    assert batch.latents.shape[:3] == (8, 5, 31)
    assert tuple(batch.latents.shape[3:]) in {(52, 92), (92, 52)}
