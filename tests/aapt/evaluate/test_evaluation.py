"""The motion probe, measurements of videos, and a whole evaluation in small."""

import json
import math
import os
import pwd
import tempfile
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from aapt.checkpoint import CheckpointError, save_config, save_module
from aapt.commands.app import main
from aapt.data.tiny_world.themes import THEMES
from aapt.data.tiny_world.world import FIELD_OF_VIEW, FORWARD_STEP, YAW_STEP
from aapt.evaluate import evaluate
from aapt.evaluate.drift_plot import plot_drift
from aapt.evaluate.evaluation import cache_folder
from aapt.evaluate.measure import MeasuredFrames, measure, timeline
from aapt.evaluate.metrics import seam
from aapt.evaluate.motion_probe import (
    MotionProbe,
    ProbeConfig,
    augment,
    load_probe,
    matching_costs,
    shrink_triples,
    train_probe,
)
from aapt.evaluate.object_detector import ObjectDetectorConfig
from aapt.evaluate.scenes import roll_out_scenes
from aapt.evaluate.video_frames import VideoFrames, latent_statistics
from aapt.evaluate.windows import WINDOWS, Schedule, drift_frames, shifted_inside
from aapt.evaluate.world_scenes import WorldScenes, held_out_starts, render_truth
from aapt.media.contact_sheet import contact_sheet
from aapt.model.conditioning import control_rays
from aapt.model.config import CameraConfig, ModelConfig, SamplingConfig
from aapt.model.world_model import WorldModel
from aapt.streaming.generator import StreamingGenerator
from aapt.vae import CausalVAE, tiny
from aapt.vae.pixels import to_pixels

from .test_metrics import HEIGHT, WIDTH, noise, plain

CELL = 8
SMALL_PROBE = ProbeConfig(clips=6, held_out_clips=2, steps=2, batch=8)
SMALL_DETECTOR = ObjectDetectorConfig(
    worlds=6, held_out_worlds=2, pictures=2, steps=2, batch=4, width=8
)
MODEL = ModelConfig(
    width=32,
    heads=2,
    head_dim=16,
    depth=2,
    text_width=16,
    text_tokens=25,
    window_frames=3,
    reference_grid=(2, 4),
    rope_axes=(4, 6, 6),
    sink_distance="clamped",
    output_clamp=4.0,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Save a random generator of 64x32 as a checkpoint folder."""
    return save_checkpoint(tmp_path_factory.mktemp("random"))


def save_checkpoint(folder, height=HEIGHT, yaw_step=YAW_STEP, seed=0):
    torch.manual_seed(seed)
    camera = CameraConfig(FIELD_OF_VIEW, yaw_step, FORWARD_STEP, 0.05, 0.025)
    config = replace(MODEL, condition_channels=camera.channels)
    save_module(folder / "model.safetensors", WorldModel(config, camera))
    save_module(folder / "vae.safetensors", CausalVAE(tiny()))
    facts = {"height": height, "width": WIDTH, "fps": 24, "prompts": ["a sunny green meadow"]}
    parts = {"model": asdict(config), "camera": asdict(camera), "vae": asdict(tiny())}
    save_config(folder, facts | parts)
    return folder


# The motion probe.


def test_triples_are_start_middle_and_end_of_each_latent_frame():
    frames = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 4, 8, 3)
    triples = shrink_triples(frames, 2)
    assert triples.shape == (2, 9, 2, 4)
    seen = (triples[:, ::3, 0, 0] + 1) * 127.5
    assert torch.allclose(seen, torch.tensor([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]), atol=1e-4)


def test_a_mirrored_triple_turns_the_other_way():
    random = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-1, 1, 16).expand(64, 9, 8, 16)
    triples, controls = augment(ramp, torch.tensor([[0.5, 0.7]]).expand(64, 2), random)
    falling = triples[..., 0].mean(dim=(1, 2)) > triples[..., -1].mean(dim=(1, 2))
    assert 10 < falling.sum() < 54
    assert torch.equal(controls[:, 0] < 0, falling)
    assert torch.equal(controls[:, 1], torch.full((64,), 0.7))


def test_matching_costs_by_hand():
    """Try every shift and pixel of a cell that moves by (1, -3), in float64."""
    random = torch.Generator().manual_seed(0)
    start = torch.rand(1, 3, 16, 24, generator=random)
    triple = torch.cat([start, start.roll((1, -3), dims=(2, 3)), start], dim=1)
    padded = np.pad(triple[0, 3:6].double(), ((0, 0), (2, 2), (6, 6)), mode="edge")
    here, found = triple[0, :3].double().numpy(), matching_costs(triple)[0].double()
    for row, column in ((0, 0), (1, 1)):
        rows, columns = (slice(8 * n, 8 * n + 8) for n in (row, column))
        costs = np.array(
            [
                [np.abs(here - padded[:, y : y + 16, x : x + 24])[:, rows, columns].mean()]
                for y in range(5)
                for x in range(13)
            ]
        )[:, 0]
        expected = costs / (costs.mean() + 0.02) - 1
        np.testing.assert_allclose(found[:65, row, column], expected, atol=1e-5)
    assert found[:65, 1, 1].argmin() == 3 * 13 + 3  # two rows and six columns are no shift


def test_a_short_training_already_reads_which_way_the_camera_turns():
    config = ProbeConfig(clips=24, held_out_clips=6, steps=100, batch=32)
    _, quality = train_probe(config, HEIGHT, WIDTH)
    assert quality.yaw > 0.8


def test_a_cache_that_fails_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(
        UserWarning, match="motion probe: cannot be kept in .*cache: Not a directory"
    ):
        probe, quality = load_probe(tmp_path / "file" / "cache", SMALL_PROBE, HEIGHT, WIDTH)
    kept, _ = load_probe(tmp_path, SMALL_PROBE, HEIGHT, WIDTH)
    (path,) = tmp_path.glob("motion-probe-*.safetensors")
    whole = path.read_bytes()
    for broken, message in [
        (whole[:-8], "expected .* bytes up to its end"),
        (b"", "expected a safetensors header"),
        (whole.replace(b'"quality"', b'"qualitx"'), r"expected the motion probe's quality \(2,\)"),
    ]:
        path.write_bytes(broken)
        with pytest.warns(
            UserWarning, match=f"motion probe: expected one in the cache, .*{message}"
        ):
            again, same = load_probe(tmp_path, SMALL_PROBE, HEIGHT, WIDTH)
        assert same == quality and path.read_bytes() == whole
    video = noise(1, 9)[0]
    assert torch.equal(again.estimate(video), probe.estimate(video))


def test_a_probe_is_trained_once_per_configuration(tmp_path, monkeypatch):
    probe, quality = load_probe(tmp_path, SMALL_PROBE, HEIGHT, WIDTH)
    monkeypatch.setattr("aapt.evaluate.motion_probe.train_probe", lambda *_: pytest.fail("again"))
    again, same = load_probe(tmp_path, SMALL_PROBE, HEIGHT, WIDTH)
    assert same == quality
    video = noise(1, 9)[0]
    assert torch.equal(again.estimate(video), probe.estimate(video))
    with pytest.raises(pytest.fail.Exception, match="again"):
        load_probe(tmp_path, SMALL_PROBE, HEIGHT, 2 * WIDTH)


def test_the_probe_refuses_other_videos():
    probe = MotionProbe(HEIGHT, WIDTH, 2)
    for shape in ((8, HEIGHT, WIDTH, 3), (9, WIDTH, HEIGHT, 3), (HEIGHT, WIDTH, 3)):
        with pytest.raises(ValueError, match=r"video: expected \(1 \+ 4n, 32, 64, 3\), got"):
            probe.estimate(torch.zeros(shape, dtype=torch.uint8))


# Starts and video frames.


def test_starts_go_through_the_themes_and_do_not_depend_on_their_number():
    starts = held_out_starts(8, 5, seed=0)
    assert [start.world.theme for start in starts] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert starts[0].prompt in THEMES[0].prompts and starts[0].prompt != starts[6].prompt
    alone = held_out_starts(1, 3, seed=0)[0]
    assert torch.equal(alone.poses, starts[0].poses[:13])
    assert not torch.equal(held_out_starts(1, 5, seed=1)[0].poses, starts[0].poses)


def test_video_frames_are_found_by_their_number():
    starts = held_out_starts(2, 3, seed=0)
    some = render_truth(starts, [0, 4, 9], HEIGHT, WIDTH)
    whole = render_truth(starts, range(13), HEIGHT, WIDTH)
    assert torch.equal(some[[9, 0]], whole.pixels[:, [9, 0]])
    with pytest.raises(ValueError, match=r"kept, got \[5\]"):
        some[[4, 5]]


def test_a_rollout_is_what_a_user_of_the_stream_would_see(checkpoint, tmp_path):
    """Compare the batched rollout with `StreamingGenerator` on the same noise."""
    generator = StreamingGenerator.from_pretrained(checkpoint)
    starts = held_out_starts(2, 6, seed=0)
    first = render_truth(starts, [0], HEIGHT, WIDTH).pixels[:, 0]
    scenes = WorldScenes(starts, {checkpoint: generator}, SMALL_PROBE, tmp_path, SMALL_DETECTOR)
    found, statistics, _ = roll_out_scenes(generator, scenes, 6, range(25), seed=0)
    assert found.pixels.shape == (2, 25, HEIGHT, WIDTH, 3) and statistics.shape == (2, 7, 2)

    from aapt.model.conditioning import Control

    stream = generator.open(first[1].numpy(), starts[1].prompt, seed=1)
    frames = [stream.first_frame]
    for yaw, forward in starts[1].controls.tolist():
        frames.append(stream.step(Control(yaw, forward)))
    expected = torch.from_numpy(np.concatenate(frames))
    assert (found.pixels[1].int() - expected.int()).abs().max() <= 1


def test_rays_relative_to_the_first_frame_are_rolled_out_and_not_streamed(checkpoint, tmp_path):
    generator = StreamingGenerator.from_pretrained(checkpoint)
    generator.model.camera = replace(generator.model.camera, relative_to_first=True)
    starts = held_out_starts(2, 3, seed=0)
    scenes = WorldScenes(starts, {checkpoint: generator}, SMALL_PROBE, tmp_path, SMALL_DETECTOR)
    condition, size = scenes.condition(generator), generator.latent_size
    whole = control_rays(scenes.controls, generator.model.camera, *size)
    for step in (1, 2, 3):
        torch.testing.assert_close(condition(step), whole[:, :, step - 1 : step])
    with pytest.raises(ValueError, match="relative to the first, whose values grow without bound"):
        generator.open(np.zeros((HEIGHT, WIDTH, 3), np.uint8), starts[0].prompt)


def test_a_diffusion_checkpoint_is_sampled_as_it_says(checkpoint, tmp_path):
    """One step from noise without guidance is the single pass of a generator without clamp."""
    generator = StreamingGenerator.from_pretrained(checkpoint)
    scenes = WorldScenes(
        held_out_starts(2, 3, seed=0), {"": generator}, SMALL_PROBE, tmp_path, SMALL_DETECTOR
    )
    model = generator.model.transformer
    model.config = replace(model.config, output_clamp=None)
    for name, parameter in model.named_parameters():
        if "modulation" in name or "video_out" in name:  # so that time and prompt matter
            torch.nn.init.normal_(parameter, std=0.2)
    videos = []
    for sampling in (None, (1, 6.0, 1.0), (2, 6.0, 1.0), (2, 6.0, 4.0)):
        generator.sampling = SamplingConfig(*sampling) if sampling else None
        videos.append(roll_out_scenes(generator, scenes, 3, range(13), seed=0)[0].pixels.int())
    one_pass, one_step, two_steps, guided = videos
    assert (one_pass - one_step).abs().max() <= 1
    assert (two_steps - one_step).abs().max() > 10 and (guided - two_steps).abs().max() > 10


def test_pixels_that_are_not_numbers_are_black():
    video = torch.tensor([math.nan, math.inf, -math.inf, 0.0]).view(1, 1, 1, 1, 4)
    pixels = to_pixels(video.expand(1, 3, 1, 1, 4))
    assert pixels[0, 0, 0, :, 0].tolist() == [0, 255, 0, 128]


# The sheet and the whole.


def test_the_sheet_shows_enlarged_frames_in_their_places():
    red, blue = (plain(colour, colour)[0] for colour in ((255, 0, 0), (0, 0, 255)))
    sheet = contact_sheet([[("model", red), ("truth", blue)]], ["0 s", "1 s"])
    pixels = np.asarray(sheet)
    assert (pixels == (255, 0, 0)).all(-1).sum() == 2 * (2 * HEIGHT) * (2 * WIDTH)
    assert (pixels == (0, 0, 255)).all(-1).sum() == 2 * (2 * HEIGHT) * (2 * WIDTH)
    with pytest.raises(ValueError, match="'model': expected 1 frames, got 2"):
        contact_sheet([[("model", red)]], ["0 s"])


def test_measuring_the_truth_finds_no_fault(checkpoint, tmp_path):
    starts = held_out_starts(2, 8, seed=0)
    window = WINDOWS[0]
    truth = render_truth(starts, window.frames, HEIGHT, WIDTH).pixels
    generators = {checkpoint: StreamingGenerator.from_pretrained(checkpoint)}
    scenes = WorldScenes(starts, generators, SMALL_PROBE, tmp_path, SMALL_DETECTOR)
    real = MeasuredFrames.of(truth[:, 1:], CELL)
    found = measure(truth, real, None, scenes, window)
    assert (found.sharpness, found.palette_error, found.theme_kept) == (1.0, 0.0, 1.0)
    assert found.edge_sharpness == 1.0 and found.seam == seam(truth[:, 1:], CELL)
    assert found.flicker == pytest.approx(1.0, abs=0.1)  # steps do not show in real video
    assert found.yaw_response in range(0, 28, 4) and found.forward_response in range(0, 28, 4)
    assert found.psnr is None and found.latent_deviation is None
    swapped = measure(truth.flip(0), real, None, scenes, window)
    assert swapped.theme_kept == 0.0 and swapped.palette_error > 0.05
    assert swapped.sharpness == pytest.approx(1.0) and swapped.psnr < 25


def test_a_seam_is_that_of_the_sources_own_cells():
    """Cells of 8 pixels, beside a first checkpoint whose cells have 4."""
    levels = torch.arange(WIDTH).div(8, rounding_mode="floor") % 2 * 40 + torch.arange(WIDTH) % 2
    video = levels.to(torch.uint8)[:, None].expand(1, 9, HEIGHT, WIDTH, 3)
    scenes = SimpleNamespace(steps=0, control_metrics=lambda *_: {})
    truth, window = MeasuredFrames.of(video[:, 1:], 4), WINDOWS[0]
    given = video, truth, None, scenes, window
    found = {cell: measure(*given, cell=cell) for cell in (None, 4, 8)}
    assert found[None].seam == found[4].seam == seam(video, 4)
    assert found[8].seam == seam(video, 8) > 2 * found[4].seam


def test_latent_statistics_by_hand():
    latents = torch.zeros(1, 2, 3, 4, 4)
    latents[:, 0, 1] = 3.0
    latents[:, 1, 1] = -1.0
    latents[:, :, 2, :2] = 1.0
    offset, deviation = latent_statistics(latents)[0].T
    assert offset.tolist() == pytest.approx([0, math.sqrt(5), 0.5])
    expected = [np.std([3.0] * 16 + [-1.0] * 16, ddof=1), np.std([1.0, 0.0] * 16, ddof=1)]
    assert deviation.tolist() == pytest.approx([0, *expected])


def test_frames_after_the_end_are_replaced_by_the_last_ones():
    assert shifted_inside(range(0, 5), steps=2) == [0, 1, 2, 3, 4]
    assert shifted_inside((47, 48), steps=2) == [7, 8]
    assert shifted_inside(range(4, 13), steps=2) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert shifted_inside(range(40, 61), steps=2) == [0, 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("fps", "steps"), [(24, ["1-8", "25-36", "175-186", "331-360"]), (16, ["1-5", "17-24"])]
)
def test_windows_are_the_same_seconds_at_every_rate(fps, steps):
    schedule = Schedule(360 if fps == 24 else 24, 24, fps)
    assert [f"{window.first}-{window.last}" for window in schedule.windows] == steps
    for window in schedule.windows:
        begin, end = (float(part) for part in window.name[:-2].split("-"))
        assert window.middle == pytest.approx((begin + end) / 2, abs=0.05)
        assert window.frames[-1] / fps == pytest.approx(end, abs=0.1)
    assert drift_frames(2, fps) == (2 * fps - 1, 2 * fps)
    assert set(drift_frames(2, fps)) <= set(schedule.frames)
    assert schedule.drift_seconds[-1] == len(schedule.drift_seconds) == (60 if fps == 24 else 6)
    assert schedule.sheet_seconds == ([0, 1, 5, 10, 30, 60] if fps == 24 else [0, 1, 5])


def test_a_timeline_finds_the_second_that_is_wrong():
    starts = held_out_starts(6, 18, seed=0)
    seconds = [1, 2, 3]
    frames = [frame for second in seconds for frame in drift_frames(second)]
    assert frames == [23, 24, 47, 48, 71, 72]
    truth = render_truth(starts, frames, HEIGHT, WIDTH)
    pixels = truth.pixels.clone()
    pixels[:, 2:4] = pixels[:, 2:4].flip(0) // 2  # other themes, and darker
    latents = torch.tensor([[[0.1, 1.0], [0.2, 0.5], [0.3, 2.0]]]).expand(6, 3, 2)
    made, true = (
        [MeasuredFrames.of(source[drift_frames(second)], CELL) for second in seconds]
        for source in (VideoFrames(frames, pixels), truth)
    )
    found, real = (timeline(source, true, seconds, latents) for source in (made, true))
    assert found.seconds == seconds and found.latent_deviation == [1.0, 0.5, 2.0]
    assert found.latent_offset == pytest.approx([0.1, 0.2, 0.3])
    assert found.sharpness[::2] == [1.0, 1.0] and found.sharpness[1] == pytest.approx(0.5, abs=0.05)
    assert found.edge_sharpness[::2] == [1.0, 1.0]
    assert found.edge_sharpness[1] == pytest.approx(0.25, abs=0.05)
    assert found.seam[::2] == real.seam[::2]
    assert found.palette_error[::2] == [0.0, 0.0] and found.palette_error[1] > 0.1
    assert found.feature_distance[::2] == real.feature_distance[::2]
    assert found.feature_distance[1] > real.feature_distance[1] + 0.2
    assert found.drift["latent_deviation"] == pytest.approx(60 * 0.5)
    assert found.drift["latent_offset"] == pytest.approx(60 * 0.1)
    assert found.drift["sharpness"] == pytest.approx(0)
    assert set(found.drift) == set(asdict(found)) - {"seconds", "drift"}

    longer = timeline(made, true[:1], seconds, latents)
    assert longer.palette_error == [0.0, None, None] and longer.feature_distance[0] == 0
    assert longer.sharpness == [frames.sharpness / true[0].sharpness for frames in made]


@pytest.fixture(scope="module")
def evaluation(checkpoint, tmp_path_factory):
    """Evaluate three checkpoints for two seconds: the report, its folder and the log."""
    folder, lines = tmp_path_factory.mktemp("evaluation"), []
    checkpoints = [checkpoint]
    checkpoints += [save_checkpoint(folder / n, seed=1) for n in ("baseline", "other/baseline")]
    report = evaluate(
        checkpoints,
        folder / "out",
        starts=2,
        seconds=2.0,
        videos=1,
        probe=SMALL_PROBE,
        objects=SMALL_DETECTOR,
        network_cache=folder / "cache" / "aapt",
        log=lines.append,
    )
    return report, folder, lines


def test_evaluate_end_to_end(checkpoint, evaluation):
    report, folder, lines = evaluation
    out = folder / "out"
    names = [f"{checkpoint.parent.name}/{checkpoint.name}"]
    names += [f"{folder.name}/baseline", "other/baseline"]
    assert [line.split(":")[0] for line in lines] == [
        "motion probe",
        "truth",
        "autoencoder",
        *(f"{name} rollout" for name in names),
        "videos",
        lines[-4],
        "metrics",
        "object detector",
        "objects",
    ]
    assert {path.name for path in out.iterdir()} == {
        *("report.json", "drift.png", "sheet.png", "videos")
    }
    saved = json.loads((out / "report.json").read_text())
    assert saved == json.loads(report.as_json())
    assert list(saved["checkpoints"]) == names and saved["settings"]["seed"] == 0
    sources = saved["windows"]["0-1.3 s"]
    assert list(saved["windows"]) == ["0-1.3 s"]
    assert list(sources) == ["truth", "autoencoder", *names]
    assert sources["truth"]["sharpness"] == 1.0 and sources["truth"]["palette_error"] == 0.0
    assert sources["truth"]["feature_distance"] == 0 < sources[names[0]]["feature_distance"]
    assert sources[names[0]]["psnr"] == pytest.approx(report.windows["0-1.3 s"][names[0]].psnr)
    assert sources[names[0]] != sources[names[1]] == sources[names[2]]  # these are the same
    assert saved["truth"] == "rendered"
    assert saved["same_theme"] is None and saved["other_theme"] > 0.05
    assert list(saved["timelines"]) == ["truth", *names]
    assert saved["timelines"][names[1]]["seconds"] == [1, 2]
    assert set(saved["timelines"][names[1]].pop("drift")) > {"sharpness", "palette_error"}
    assert {len(values) for values in saved["timelines"][names[1]].values()} == {2}
    assert list(saved["objects"]) == ["1 s"]  # three seconds are after the end
    assert list(saved["objects"]["1 s"]) == ["truth", "autoencoder", *names]
    table = report.table()
    assert table.row_count == 5
    assert "objects kept after 1 s: " in table.caption
    headings = [column.header for column in table.columns]
    assert "feature distance" in headings and "FID" not in headings

    sheet = Image.open(out / "sheet.png")
    assert sheet.width > 2 * 2 * WIDTH and sheet.height > 2 * 4 * 2 * HEIGHT
    drift = np.asarray(Image.open(out / "drift.png").convert("L"))
    assert drift.shape[1] > 1000 and drift.std() > 5

    figure = plot_drift(report)
    curves = figure.axes[2].get_lines()
    assert [curve.get_label() for curve in curves] == ["truth", *names]
    assert curves[1].get_ydata().tolist() == report.timelines[names[0]].sharpness
    assert len({curve.get_color() for curve in curves}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"starts": 0}, "starts: expected 1 to 1000, got 0"),
        ({"seconds": 1.0}, r"seconds: expected at least 1\.33, got 1\.0"),
        ({"seconds": math.nan}, "seconds: expected at least .*, got nan"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"videos": -1}, "videos: expected 0 or more, got -1"),
    ],
)
def test_bad_settings_are_refused(checkpoint, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate([checkpoint], tmp_path, **{"starts": 1, "seconds": 2.0} | arguments)


def test_bad_checkpoints_are_refused(checkpoint, tmp_path):
    short = dict(starts=1, seconds=2.0)
    with pytest.raises(CheckpointError, match="nowhere: expected a checkpoint folder"):
        evaluate([tmp_path / "nowhere"], tmp_path, **short)
    quick = save_checkpoint(tmp_path / "quick", yaw_step=2 * YAW_STEP)
    with pytest.raises(ValueError, match=r"quick: expected the world's yaw step.*got \(0\.052"):
        evaluate([quick], tmp_path, **short)
    tall = save_checkpoint(tmp_path / "tall", height=2 * HEIGHT)
    with pytest.raises(ValueError, match="checkpoints: expected one image size, got .*32, 64"):
        evaluate([checkpoint, tall], tmp_path, **short)
    with pytest.raises(ValueError, match="expected different paths, got"):
        evaluate([checkpoint, checkpoint], tmp_path, **short)
    with pytest.raises(ValueError, match="expected different paths, got none"):
        evaluate([], tmp_path, **short)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quick", "tall"]


def test_the_probe_is_kept_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "aapt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "aapt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    assert cache_folder() == tmp_path / ".cache" / "aapt"


def test_a_user_without_a_home_has_a_cache_among_temporary_files(tmp_path, monkeypatch):
    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == tmp_path / f"aapt-{os.getuid()}"


# The command.


def test_the_command_prints_a_table(checkpoint, evaluation, tmp_path, capsys, monkeypatch):
    """The numbers are those of `evaluation`, because only seeds decide them."""
    before, folder, _ = evaluation
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr("aapt.evaluate.evaluation.ProbeConfig", lambda: SMALL_PROBE)
    monkeypatch.setattr("aapt.evaluate.evaluation.ObjectDetectorConfig", lambda: SMALL_DETECTOR)
    network = tmp_path / "network.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        torch.jit.script(MeanColour()).save(str(network))
    options = ["--baseline", folder / "baseline", "--starts", 2, "--seconds", 2, "--fid", network]
    arguments = [str(part) for part in ["eval", checkpoint, *options, "--out", tmp_path / "a"]]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "feature distance" in said.out and "FID" in said.out and "FVD" not in said.out
    assert said.err.splitlines()[0].startswith("motion probe: ")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["settings"]["fid"] == str(network)
    sources, earlier = report["windows"]["0-1.3 s"], before.windows["0-1.3 s"]
    assert sources["truth"]["fid"] is None
    found, then = sources[checkpoint.name], next(iter(before.checkpoints))
    assert found.pop("fid") > 0 and found.items() <= asdict(earlier[then]).items()
    assert report["timelines"][checkpoint.name] == asdict(before.timelines[then])


def test_the_command_prints_json(checkpoint, evaluation, tmp_path, capsys, monkeypatch):
    before, folder, _ = evaluation
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr("aapt.evaluate.evaluation.ProbeConfig", lambda: SMALL_PROBE)
    monkeypatch.setattr("aapt.evaluate.evaluation.ObjectDetectorConfig", lambda: SMALL_DETECTOR)
    options = ["--starts", 2, "--seconds", 2, "--seed", 1, "--json", "--out", tmp_path]
    assert main([str(part) for part in ["eval", checkpoint, *options]]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["settings"] == {
        "starts": 2,
        "seconds": 2.0,
        "seed": 1,
        "device": "cpu",
        "dtype": "float32",
        "size": "64x32",
        "cache": "model",
    }
    other = printed["timelines"][checkpoint.name]["palette_error"]
    assert other not in [line.palette_error for line in before.timelines.values()]
    assert len(list((folder / "cache" / "aapt").iterdir())) == 2


class MeanColour(torch.nn.Module):
    def forward(self, images: torch.Tensor):
        return images.float().mean(dim=(2, 3))


def test_the_command_says_what_is_wrong_in_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments, code, message in [
        (["nowhere", "--out", "a"], 2, "nowhere: expected a checkpoint folder"),
        ([checkpoint, "--starts", "0", "--out", "a"], 2, "starts: expected 1 to 1000, got 0"),
        ([checkpoint, "--seconds", "1.2", "--out", "a"], 2, "seconds: expected at least 1.33"),
        ([checkpoint, "--seconds", "nan", "--out", "a"], 2, "seconds: expected a finite number"),
        ([checkpoint, "--fvd", "no.pt", "--out", "a"], 2, "fvd: expected a TorchScript file"),
        (
            [checkpoint, "--device", "disk", "--out", "a"],
            2,
            "device: expected cpu, cuda or ",
        ),
        ([checkpoint, "--seconds", "1e308", "--out", "a"], 2, "seconds: expected at most 1e+07"),
        ([checkpoint, "--seed", 2**43, "--out", "a"], 2, "Invalid value for '--seed'"),
        ([checkpoint, "--fid", 300 * "a", "--out", "a"], 2, "fid: cannot read aaa"),
        ([300 * "a", "--out", "a"], 2, "aaa: cannot be read: File name too long"),
        ([checkpoint, "--out", tmp_path / "file"], 2, "out: expected a folder that can be written"),
        ([checkpoint, "--out", tmp_path / "file/a"], 2, "out: expected a folder that can be writ"),
        ([checkpoint, "--out", 300 * "a"], 2, "aaa: File name too long"),
    ]:
        assert main(["eval", *map(str, arguments)]) == code
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_the_command_needs_no_cache(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("aapt.evaluate.evaluation.ProbeConfig", lambda: SMALL_PROBE)
    monkeypatch.setattr("aapt.evaluate.evaluation.ObjectDetectorConfig", lambda: SMALL_DETECTOR)
    options = ["--starts", "1", "--seconds", "1.4", "--out", str(tmp_path / "out")]
    assert main(["eval", str(checkpoint), *options]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("aapt: motion probe: cannot be kept in ")
    assert said[1].startswith("motion probe: ")
    assert (tmp_path / "out" / "report.json").is_file()
