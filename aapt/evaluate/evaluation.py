"""Measure checkpoints on starts that no training has seen, beside the truth."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..checkpoint import find_checkpoint, replacing
from ..clock import FRAMES_PER_LATENT
from ..environment import environment
from ..lock import folder_lock
from ..media.contact_sheet import SHOWN_ROWS, contact_sheet
from ..media.figures import new_figure, path_labels, save_figure
from ..model.caches import MODEL
from ..streaming.actions import model_digest
from ..streaming.generator import StreamingGenerator
from .clip_scenes import ClipScenes
from .drift_plot import plot_drift
from .keypoints import KeypointDetectorConfig
from .measure import MeasuredFrames, Measurement, Timeline, UserNetwork, measure, timeline
from .motion_probe import ProbeConfig
from .object_detector import ObjectDetectorConfig
from .pose_errors import CameraErrors, KeypointErrors
from .pretrained import PretrainedDistance
from .puppet_scenes import PuppetScenes, held_out_puppets
from .report import Report
from .saved_videos import FOLDER, save_videos
from .scenes import AUTOENCODER, TRUTH, Scenes, roll_out_scenes
from .video_frames import VideoFrames
from .windows import Schedule, Window, drift_frames, shifted_inside, windows_at
from .world_scenes import WorldScenes, held_out_starts

Videos = dict[str, VideoFrames]  # by source
Statistics = dict[str, list[Tensor]]  # `latent_statistics` of each window, by source


def evaluate(
    checkpoints: Sequence[str | Path],
    out: Path,
    *,
    latents: Path | None = None,
    starts: int = 16,
    seconds: float = 60.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    size: tuple[int, int] | None = None,
    cache: str = MODEL,
    videos: int = 0,
    fid: Path | None = None,
    fvd: Path | None = None,
    keypoints: Path | None = None,
    camera_poses: Path | None = None,
    probe: ProbeConfig | None = None,
    detector: KeypointDetectorConfig | None = None,
    objects: ObjectDetectorConfig | None = None,
    network_cache: Path | None = None,
    log: Callable[[str], None] = print,
) -> Report:
    """Roll out checkpoints from held-out starts and measure them.

    Writes `report.json`, `drift.png` and `sheet.png` into `out`, and whole videos if asked for.

    Args:
        checkpoints: Folders, or names of bundled models. All get the same starts and noise; in the
            report each is named by the end of its path.
        latents: A folder of encoded clips to start from, which suit any checkpoint (see
            `ClipScenes`); None for worlds, which suit those that move as the bundled one, or for
            puppets, which suit those that follow poses. After a clip's end there is no truth;
            themes and controls are not checked on clips.
        starts: Number of worlds or clips; six worlds show every theme.
        seconds: Length of a rollout. A window that ends later is left out.
        seed: Chooses worlds and walks, or clips, and noise.
        device, dtype, size, cache: Of the checkpoints, as `StreamingGenerator.from_pretrained`
            takes them; metrics are computed on the CPU.
        videos: Number of starts whose rollouts and truth are saved, see `save_videos`; all if there
            are fewer starts.
        fid, fvd, keypoints, camera_poses: TorchScript files, see `PretrainedDistance`,
            `KeypointErrors` and `CameraErrors`.
        probe, detector, objects: How the motion probe, the keypoint detector and the object
            detector are trained; None for the defaults.
        network_cache: Folder that keeps them for the next evaluation; None for the user's cache.
        log: Called with one line per finished part.

    Raises ValueError for settings or checkpoints that do not fit, FolderInUse while another process
    works in `out`, OSError if it cannot be written.
    """
    if videos < 0:
        raise ValueError(f"videos: expected 0 or more, got {videos}")
    names = path_labels(checkpoints, taken=(TRUTH, AUTOENCODER))
    load = StreamingGenerator.from_pretrained
    where = dict(device=device, dtype=dtype, size=size, cache=cache)
    loaded = {folder: load(folder, **where) for folder in checkpoints}
    generators = dict(zip(names, loaded.values(), strict=True))
    digests = checkpoint_digests(checkpoints)
    sizes = {(g.height, g.width) for g in generators.values()}
    if len(sizes) > 1:
        raise ValueError(f"checkpoints: expected one image size, got {sizes}")
    fps = _rate(generators.values())
    steps = _steps(seconds, fps)
    scenes: Scenes
    if latents is None and any(generator.poses for generator in loaded.values()):
        puppets = held_out_puppets(starts, steps, seed, *sizes.pop())
        given = detector or KeypointDetectorConfig(), network_cache or cache_folder()
        scenes = PuppetScenes(puppets, loaded, *given)
    elif latents is None:
        walks = held_out_starts(starts, steps, seed)
        kept = probe or ProbeConfig(), network_cache or cache_folder()
        scenes = WorldScenes(walks, loaded, *kept, objects or ObjectDetectorConfig())
    else:
        scenes = ClipScenes(latents, loaded, starts, seed)
    files = {"fid": fid, "fvd": fvd}
    networks: list[UserNetwork] = [
        PretrainedDistance(kind, path) for kind, path in files.items() if path
    ]
    files |= {"keypoints": keypoints, "camera_poses": camera_poses}
    if keypoints:
        networks.append(KeypointErrors(keypoints))
    if camera_poses:
        networks.append(CameraErrors(camera_poses, scenes))
    new_figure(1, 1)  # a missing library is said before the work, not after it
    schedule = Schedule(steps, scenes.steps, fps)

    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        parts = PartTimes(log)
        shown, statistics, timelines, rollouts = _make_videos(
            generators, scenes, schedule, seed, parts, videos
        )
        if videos:
            with parts("videos"):
                paths = save_videos(out, scenes, generators, rollouts, seed)
            taken = sum(path.stat().st_size for path in paths)
            log(f"{len(paths)} videos of {taken / 2**20:.1f} MiB in {out / FOLDER}")
        with parts("metrics"):
            measured = {
                window.name: _measure_window(
                    place, window, shown, statistics, scenes, networks, _cells(generators)
                )
                for place, window in enumerate(schedule.windows)
            }
        found = scenes.object_fields(generators[names[0]], shown, parts)
        given = {"latents": latents, **files}
        report = Report(
            checkpoints={name: str(folder) for name, folder in zip(names, checkpoints)},
            digests=digests,
            settings={"starts": starts, "seconds": seconds, "seed": seed}
            | placed(generators[names[0]])
            | {kind: str(path) for kind, path in given.items() if path},
            windows=measured,
            timelines=timelines,
            seconds_taken=parts.seconds,
            environment=environment(),
            **found,
            **scenes.report_fields(shown[TRUTH], schedule.windows[-1]),
        )
        rows = {name: shown[name] for name in (*generators, TRUTH)}
        _write(report, _sheet(scenes, rows, schedule), out)
    return report


def checkpoint_digests(checkpoints: Sequence[str | Path]) -> dict[str, str]:
    """Return the `model_digest` of each checkpoint, by its name in a report."""
    names = path_labels(checkpoints, taken=(TRUTH, AUTOENCODER))
    folders = map(find_checkpoint, checkpoints)
    return {name: model_digest(folder) for name, folder in zip(names, folders, strict=True)}


def cache_folder() -> Path:
    """Return the user's folder for files that can be made again (XDG base directories).

    A user without a home gets a folder among the temporary files.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    if given and os.path.isabs(given):
        return Path(given) / "aapt"
    try:
        return Path.home() / ".cache" / "aapt"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"aapt-{os.getuid()}"


def placed(generator: StreamingGenerator) -> dict[str, str]:
    """Return the settings of a report that say where, in which precision, size and cache models
    ran."""
    weight = next(generator.model.parameters())
    return {
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "size": f"{generator.width}x{generator.height}",
        "cache": generator.cache,
    }


class PartTimes:
    """Measures the parts of an evaluation: `with parts("metrics"): ...`.

    Attributes:
        seconds: Wall time of each finished part, by its name.
    """

    def __init__(self, log: Callable[[str], None]):
        self.log = log
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - begun, 2)
        self.log(f"{part}: {self.seconds[part]:.1f} s")


def _rate(generators: Iterable[StreamingGenerator]) -> int:
    """Return the video frames per second of all checkpoints. ValueError if they differ."""
    rates = {generator.fps for generator in generators}
    if len(rates) > 1:
        raise ValueError(f"checkpoints: expected one rate, got {sorted(rates)} fps")
    return rates.pop()


def _steps(seconds: float, fps: int) -> int:
    """Return the latent frames of a rollout; ValueError if it is too short for the first window."""
    shortest = windows_at(fps)[0].last
    frames = seconds * fps
    steps = round(frames / FRAMES_PER_LATENT) if math.isfinite(frames) else 0
    if steps < shortest:
        needed = shortest * FRAMES_PER_LATENT / fps
        raise ValueError(f"seconds: expected at least {needed:.2f}, got {seconds}")
    return steps


def _make_videos(
    generators: Mapping[str, StreamingGenerator],
    scenes: Scenes,
    schedule: Schedule,
    seed: int,
    parts: PartTimes,
    kept: int,
) -> tuple[Videos, Statistics, dict[str, Timeline], dict[str, Tensor]]:
    """Make the truth and every checkpoint's rollout.

    Returns by source: the video frames that are measured, the statistics of latents in each window,
    the measurements of each second, and the latents of the first `kept` rollouts. The autoencoder
    has video frames alone.
    """
    first = next(iter(generators.values()))
    videos, real = scenes.truth(first, schedule.true_frames, schedule.windows, parts)
    true_seconds = schedule.true_seconds
    # The truth has statistics of windows alone: their mean is taken for every second.
    mean = torch.cat(real, dim=1).mean(dim=1, keepdim=True).expand(-1, len(true_seconds), -1)
    fps, cells = schedule.fps, _cells(generators)
    truth = _each_second(videos[TRUTH], true_seconds, cells[TRUTH], fps)
    statistics, timelines = {TRUTH: real}, {TRUTH: timeline(truth, truth, true_seconds, mean)}
    seconds, latents = schedule.drift_seconds, {}
    for name, generator in generators.items():
        with parts(f"{name} rollout"):
            videos[name], made, latents[name] = roll_out_scenes(
                generator, scenes, schedule.steps, schedule.frames, seed, kept
            )
        statistics[name] = [made[:, window.first : window.last + 1] for window in schedule.windows]
        made = made[:, [math.ceil(fps * second / FRAMES_PER_LATENT) for second in seconds]]
        shown = _each_second(videos[name], seconds, cells[name], fps)
        timelines[name] = timeline(shown, truth, seconds, made)
    return videos, statistics, timelines, latents


def _cells(generators: Mapping[str, StreamingGenerator]) -> dict[str, int]:
    """Return the width in pixels of a latent pixel, by source; the truth has that of the first
    checkpoint."""
    cells = {name: generator.vae.config.space_factor for name, generator in generators.items()}
    return {TRUTH: next(iter(cells.values())), AUTOENCODER: next(iter(cells.values())), **cells}


def _each_second(
    video: VideoFrames, seconds: Sequence[int], cell: int, fps: int
) -> list[MeasuredFrames]:
    return [MeasuredFrames.of(video[drift_frames(second, fps)], cell) for second in seconds]


def _measure_window(
    place: int,
    window: Window,
    videos: Videos,
    statistics: Statistics,
    scenes: Scenes,
    networks: Sequence[UserNetwork],
    cells: Mapping[str, int],
) -> dict[str, Measurement]:
    """Measure every source in the window with the number `place`.

    cells: see `_cells`. If the truth ends before the window does, nothing is measured of the truth.
    """
    truth = videos[TRUTH][shifted_inside(window.frames, scenes.steps)][:, 1:]
    real = MeasuredFrames.of(truth, cells[TRUTH])
    found = {}
    for name, video in videos.items():
        if name == TRUTH and window.last > scenes.steps:
            found[name] = Measurement()
            continue
        latents = statistics[name][place] if name in statistics else None
        compared = [network for network in networks if network.of_truth or name != TRUTH]
        given = video[window.frames], real, latents, scenes, window, compared
        found[name] = measure(*given, cell=cells[name])
    return found


def _write(report: Report, sheet: Image.Image, out: Path) -> None:
    """Write the files of an evaluation, each whole or not at all."""
    with replacing(out / "report.json") as path:
        path.write_text(report.as_json() + "\n")
    with replacing(out / "drift.png") as path:
        save_figure(plot_drift(report), path)
    with replacing(out / "sheet.png") as path:
        sheet.save(path, "png")


def _sheet(scenes: Scenes, videos: Videos, schedule: Schedule) -> Image.Image:
    """Draw every start at the sheet's seconds; black after the end of the truth."""
    seconds, fps = schedule.sheet_seconds, schedule.fps

    def shown(video: VideoFrames) -> Tensor:
        pixels = video.pixels.new_zeros(len(video.pixels), len(seconds), *video.pixels.shape[2:])
        kept = [place for place, second in enumerate(seconds) if fps * second in video.numbers]
        pixels[:, kept] = video[[fps * seconds[place] for place in kept]]
        return pixels

    rows = {name: shown(video) for name, video in videos.items()}
    groups = [
        [(f"{label}\n{name}", frames[i]) for name, frames in rows.items()]
        for i, label in enumerate(scenes.labels)
    ]
    height = next(iter(rows.values())).shape[2]
    columns = [f"{second} s" for second in seconds]
    return contact_sheet(groups, columns, max(1, SHOWN_ROWS // height))
