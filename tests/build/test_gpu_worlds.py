"""The part `worlds` of `make gpu`, rehearsed: stages as cases, files sent back, larger batches."""

import io
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_parts import BENCH_WORLDS
from gpu_results import Results

from aapt.training.tiny_recipes import on_a_gpu, tiny_world
from benchmarks import bench_worlds
from benchmarks.bench_worlds import pack

ROOT = Path(__file__).parents[2]


def test_stages_run_in_order_and_leave_what_the_next_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    command = [sys.executable, ROOT / "tools" / "gpu.py", "--part", "worlds", "--dry-run"]
    command += [f"{BENCH_WORLDS}::test_stage[{name}]" for name in ("encoder", "clips", "diffusion")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("dry-run/*-worlds.jsonl")
    rows = Results(path).rows
    assert [row["case"].rpartition("[")[2] for row in rows] == ["encoder]", "clips]", "diffusion]"]
    assert all(row["outcome"] == "passed" and row["result"]["seconds"] > 0 for row in rows)
    with tarfile.open(fileobj=joined(tmp_path)) as tar:
        names = set(tar.getnames())
    assert {"encoder/weights.safetensors", "diffusion/weights.safetensors"} < names
    assert {"recipe.json", "tiny-world/model.safetensors"} < names
    assert not any(name.startswith("clips") for name in names)


def joined(out: Path) -> io.BytesIO:
    return io.BytesIO(b"".join(path.read_bytes() for path in sorted(out.glob("world.tar.*"))))


@pytest.fixture
def folder(tmp_path):
    """Results of the stages up to `extension`, of a megabyte each."""
    stages = list(tiny_world().stages)
    for name in ("encoder", "decoder", *stages[: stages.index("extension") + 1]):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "weights.safetensors").write_bytes(name[:1].encode() * 2**20)
    for name in ("adversarial", "extension"):
        (tmp_path / "run" / name / "discriminator.safetensors").write_bytes(b"d" * 2**20)
    return tmp_path / "run"


def test_what_is_sent_back_is_what_open_stages_start_from(folder, tmp_path, monkeypatch):
    """`further-regression` starts from `long-regression`, `further-adversarial` needs the
    discriminator of `extension`; the newest result goes back as well."""
    monkeypatch.setattr(bench_worlds, "PIECE", 2**21)
    out = tmp_path / "out"
    out.mkdir()
    (out / "world.tar.7").write_bytes(b"of an earlier stage")
    pack(tiny_world(), folder, out)
    sizes = [path.stat().st_size for path in sorted(out.glob("world.tar.*"))]
    assert len(sizes) == 3 and sizes[:2] == [2**21] * 2 and 0 < sizes[2] <= 2**21
    with tarfile.open(fileobj=joined(out)) as tar:
        tar.extractall(tmp_path / "again", filter="data")
    kept = {str(path.relative_to(tmp_path / "again")) for path in tmp_path.glob("again/*/*")}
    assert kept == {
        "encoder/weights.safetensors",
        "decoder/weights.safetensors",
        "long-regression/weights.safetensors",
        "extension/weights.safetensors",
        "extension/discriminator.safetensors",
    }
    content = (tmp_path / "again" / "long-regression" / "weights.safetensors").read_bytes()
    assert content == (folder / "long-regression" / "weights.safetensors").read_bytes()


def test_too_much_to_send_back(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_worlds, "PIECE", 2**19)
    with pytest.raises(ValueError, match="expected at most 8 files of 16 MiB, got 11"):
        pack(tiny_world(), folder, tmp_path)


def test_larger_batches_keep_all_else():
    given, made = tiny_world(), on_a_gpu(tiny_world(), clips=4, updates=0.5)
    assert made.motion_asked == (1.0, 1.0)
    changed = {"motion_asked": (1.0, 1.0), "light_decoder": None}
    assert replace(made, stages=given.stages, decoder=given.decoder, **changed) == replace(
        given, **changed
    )
    phase = made.stages["diffusion"].curriculum.phases[0]
    assert (phase.batch, phase.steps) == (32, 1500)
    final, before = made.stages["final"], given.stages["final"]
    assert (final.batch, final.steps, final.discriminator_warmup) == (8, 45, 5)
    assert final.generator_schedule.learning_rate == 2 * before.generator_schedule.learning_rate
    assert final.generator_schedule.warmup == 10
    assert final.average == pytest.approx(0.96)  # half as many updates, each counts twice
    assert (
        replace(
            final,
            batch=2,
            steps=90,
            discriminator_warmup=10,
            average=before.average,
            generator_schedule=before.generator_schedule,
            discriminator_schedule=before.discriminator_schedule,
        )
        == before
    )
    assert (made.decoder.batch, made.decoder.steps) == (8, 700)
