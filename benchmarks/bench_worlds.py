"""Trains the bundled world's recipe on a GPU in larger batches: `make gpu PART=worlds`.

Each case is a stage; `python -m benchmarks.worlds_model` predicts their minutes. Stages with a
result in `runs/gpu-worlds` are not run again, and a stage that was stopped resumes from its last
saved state. After each stage, what later stages start from and the newest checkpoint are packed
into $OUT, if it is set. On another machine the run resumes from there:

    mkdir -p runs/gpu-worlds && cat $OUT/world.tar.* | tar x -C runs/gpu-worlds
"""

import io
import os
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from aapt.data.tiny_world.rendered_clips import ProceduralData
from aapt.runs.loop import RunOptions
from aapt.runs.parallel import Parallel
from aapt.runs.run import DISCRIMINATOR, run
from aapt.runs.stage_order import stage_names
from aapt.training.curriculum import constant
from aapt.training.recipe import Recipe
from aapt.training.tiny_recipes import on_a_gpu, tiny_world

from .worlds_model import CLIPS, UPDATES

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "gpu-worlds"
STAGES = stage_names(tiny_world())
PIECE, PIECES = 16 * 2**20, 8  # bytes of a file, and the most files


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> Path:
    dry = request.config.getoption("device") == "dry"
    return tmp_path_factory.mktemp("worlds") if dry else FOLDER


@pytest.mark.patience(600)  # the longest stage
@pytest.mark.parametrize("stage", STAGES)
def test_stage(stage, mode, device, folder, record_property):
    if mode == "cpu":
        pytest.skip("`aapt train tiny-world` trains on a CPU")
    recipe = on_a_gpu(tiny_world(), CLIPS, UPDATES)
    if mode == "dry":
        recipe = cut_down(recipe)
    options = RunOptions(save_every=50, sample_every=None)
    parallel, workers = Parallel.single(device), 1 if mode == "dry" else os.cpu_count()
    given = {"parallel": parallel, "workers": workers, "options": options}
    begun = time.perf_counter()
    run(recipe, folder, [stage], **given)
    seconds = time.perf_counter() - begun
    if out := os.environ.get("OUT"):
        pack(recipe, folder, Path(out))
    record_property("result", {"seconds": seconds, "summary": f"{seconds:.0f} s"})


def pack(recipe: Recipe, folder: Path, out: Path) -> None:
    """Write what the run needs to resume elsewhere, as `world.tar.0` and so on.

    These are the records, the autoencoder, the generators and discriminators that unfinished stages
    start from, and the newest checkpoint. Clips are rendered again. ValueError if the files are too
    many.
    """
    done = [name for name in recipe.stages if (folder / name / "weights.safetensors").is_file()]
    open_stages = [config for name, config in recipe.stages.items() if name not in done]
    starts = {config.start for config in open_stages} | set(done[-1:])
    discriminators = {getattr(config, "discriminator_start", None) for config in open_stages}
    chosen = [folder / name for name in ("recipe.json", "inputs.json", recipe.name)]
    chosen += [folder / name / "weights.safetensors" for name in ("encoder", "decoder")]
    chosen += [folder / "light-decoder" / "weights.safetensors"]
    chosen += [
        folder / name / "weights.safetensors" for name in done if name in starts | discriminators
    ]
    chosen += [folder / name / DISCRIMINATOR for name in done if name in discriminators]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in filter(Path.exists, chosen):
            tar.add(path, path.relative_to(folder))
    pieces = [packed.getvalue()[i : i + PIECE] for i in range(0, packed.tell(), PIECE)]
    if len(pieces) > PIECES:
        raise ValueError(f"{out}: expected at most {PIECES} files of 16 MiB, got {len(pieces)}")
    for old in out.glob("world.tar.*"):
        old.unlink()
    for index, piece in enumerate(pieces):
        (out / f"world.tar.{index}").write_bytes(piece)


def cut_down(recipe: Recipe) -> Recipe:
    """The recipe with every stage, on small images, for two clips and one update each."""

    def short(data: ProceduralData) -> ProceduralData:
        frames = {17: 5, 33: 9, 49: 13, 289: 17}[data.latent_frames]
        videos = min(data.video_clips, 2)
        changes = {"height": 16, "width": 32, "clips": 2, "latent_frames": frames}
        return replace(data, **changes, video_clips=videos)

    def brief(config):
        if hasattr(config, "curriculum"):
            return replace(config, curriculum=constant("clips", frames=2, batch=2, steps=1))
        changes = {"steps": 1, "batch": 2, "segment_frames": 2}
        if hasattr(config, "lead_segments"):
            changes |= {"discriminator_warmup": 0, "lead_segments": min(config.lead_segments, 2)}
        return replace(config, **changes)

    decoders = {"steps": 1, "batch": 1, "video_frames": 9}
    return replace(
        recipe,
        data={name: short(data) for name, data in recipe.data.items()},
        stages={name: brief(config) for name, config in recipe.stages.items()},
        decoder=replace(recipe.decoder, **decoders),
        light_decoder=replace(recipe.light_decoder, **decoders),
    )
