"""Measures checkpoints on worlds they have not seen, beside the truth."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..contact_sheet import contact_sheet
from ..data.world import FORWARD_STEP, FRAMES_PER_LATENT, THEMES, YAW_STEP
from ..environment import environment
from ..figures import new_figure, path_labels, save_figure
from ..generator import StreamingGenerator
from . import metrics
from .drift import timeline
from .drift_plot import plot_drift
from .features import feature_distance
from .footage import (
    Footage,
    Start,
    film_reconstruction,
    film_rollout,
    film_truth,
    held_out_starts,
    theme_footage,
)
from .moments import (
    FPS,
    SHEET_SECONDS,
    STEPS_PER_SECOND,
    WINDOWS,
    drift_frames,
)
from .motion_probe import MotionProbe, ProbeConfig, load_probe
from .pretrained import PretrainedDistance
from .report import AUTOENCODER, TRUTH, Measurement, Report
from .stretch import Stretch


def evaluate(
    checkpoints: Sequence[str | Path],
    out: Path,
    *,
    starts: int = 16,
    seconds: float = 60.0,
    seed: int = 0,
    fid: Path | None = None,
    fvd: Path | None = None,
    probe: ProbeConfig | None = None,
    cache: Path | None = None,
    log: Callable[[str], None] = print,
) -> Report:
    """Roll out checkpoints from held-out starts and measure them; writes `report.json`,
    `drift.png` and `sheet.png` into `out`.

    Args:
        checkpoints: Folders, or names of bundled models; all see the same starts and noise, and
            are told apart by the ends of their paths.
        starts: How many worlds; six show every theme.
        seconds: Length of a rollout. Windows that it does not reach the end of are left out.
        seed: Chooses worlds, walks and noise.
        fid, fvd: TorchScript files, see `PretrainedDistance`.
        probe: How the motion probe is trained, None for the usual way.
        cache: Where the probe is kept from evaluation to evaluation, None for the user's cache.
        log: Told what is done and how long it took.
    """
    steps = _steps(seconds)
    walks = held_out_starts(starts, steps, seed)
    names = path_labels(checkpoints, taken=(TRUTH, AUTOENCODER))
    generators = {name: _load(folder) for name, folder in zip(names, checkpoints, strict=True)}
    sizes = {(g.height, g.width) for g in generators.values()}
    if len(sizes) > 1:
        raise ValueError(f"checkpoints: expected one picture size, got {sizes}")
    height, width = sizes.pop()
    files = {"fid": fid, "fvd": fvd}
    networks = [PretrainedDistance(kind, path) for kind, path in files.items() if path]
    new_figure(1, 1)  # a missing library is said before the work, not after it
    windows = [window for window in WINDOWS if window.last <= steps]
    moments = [s for s in SHEET_SECONDS if s * FPS <= steps * FRAMES_PER_LATENT]
    drift_seconds = range(1, steps // STEPS_PER_SECOND + 1)
    frames = {s * FPS for s in moments}.union(*(window.frames for window in windows))
    frames = sorted(frames.union(*(drift_frames(s) for s in drift_seconds)))
    seconds_taken: dict[str, float] = {}

    def each_second(film: Footage) -> list[Stretch]:
        return [Stretch.of(film[drift_frames(second)]) for second in drift_seconds]

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        seconds_taken[part] = round(time.perf_counter() - begun, 2)
        log(f"{part}: {seconds_taken[part]:.1f} s")

    out.mkdir(parents=True, exist_ok=True)
    with timed("motion probe"):
        cache = cache or cache_folder()
        motion_probe, quality = load_probe(cache, probe or ProbeConfig(), height, width)
    with timed(TRUTH):
        truth = film_truth(walks, frames, height, width)
        references = metrics.palette(theme_footage(height, width))
    films, statistics = {TRUTH: truth}, {}
    with timed(AUTOENCODER):
        stretches = [window.frames for window in windows]
        films[AUTOENCODER], real = film_reconstruction(
            next(iter(generators.values())), truth, stretches
        )
        statistics[TRUTH] = real
    steady = torch.cat(real, dim=1).mean(dim=1, keepdim=True).expand(-1, len(drift_seconds), -1)
    true_seconds = each_second(truth)
    timelines = {TRUTH: timeline(true_seconds, true_seconds, drift_seconds, steady)}
    for name, generator in generators.items():
        with timed(f"{name} rollout"):
            films[name], latents = film_rollout(generator, walks, truth[[0]][:, 0], frames, seed)
        statistics[name] = [latents[:, window.first : window.last + 1] for window in windows]
        latents = latents[:, [STEPS_PER_SECOND * second for second in drift_seconds]]
        timelines[name] = timeline(each_second(films[name]), true_seconds, drift_seconds, latents)

    themes = torch.tensor([walk.world.theme for walk in walks])
    with timed("metrics"):
        measured = {}
        for place, window in enumerate(windows):
            real = Stretch.of(truth[window.frames][:, 1:])
            measured[window.name] = {
                name: measure(
                    film[window.frames],
                    real,
                    statistics[name][place] if name in statistics else None,
                    torch.stack([w.controls[window.first - 1 : window.last] for w in walks]),
                    themes,
                    references,
                    motion_probe,
                    networks if name != TRUTH else (),
                )
                for name, film in films.items()
            }
    longest = metrics.palette(truth[windows[-1].frames])
    report = Report(
        checkpoints={name: str(folder) for name, folder in zip(names, checkpoints)},
        settings={"starts": starts, "seconds": seconds, "seed": seed}
        | {kind: str(path) for kind, path in files.items() if path},
        windows=measured,
        same_theme=metrics.palette_distance(longest, themes, same_theme=True),
        other_theme=metrics.palette_distance(longest, themes, same_theme=False),
        probe=quality,
        timelines=timelines,
        seconds_taken=seconds_taken,
        environment=environment(),
    )
    (out / "report.json").write_text(report.as_json() + "\n")
    save_figure(plot_drift(report), out / "drift.png")
    shown = {name: films[name] for name in (*generators, TRUTH)}
    _sheet(walks, shown, moments).save(out / "sheet.png")
    return report


def measure(
    video: Tensor,
    truth: Stretch,
    latents: Tensor | None,
    controls: Tensor,
    themes: Tensor,
    references: Tensor,
    probe: MotionProbe,
    networks: Sequence[PretrainedDistance] = (),
) -> Measurement:
    """One window of a video source, uint8 (starts, 1 + 4 T, H, W, 3), against the truth without the
    first frame, which is only there for the motion of the second.

    latents: `latent_statistics` of its latent frames (starts, T, 2), None where it has none;
    controls (starts, T, 2); themes (starts,); references: palettes (themes, 6).
    """
    motion = torch.stack([probe.estimate(clip) for clip in video])
    clips = Stretch.of(video[:, 1:])
    psnr = metrics.psnr(clips.video, truth.video)
    frames = clips.video.shape[1]
    distances = {n.kind: n(clips.video, truth.video) for n in networks if frames >= n.frames}
    yaw, forward = ((motion[..., axis], controls[..., axis]) for axis in (0, 1))
    return Measurement(
        latent_offset=None if latents is None else latents[..., 0].mean().item(),
        latent_deviation=None if latents is None else latents[..., 1].mean().item(),
        sharpness=clips.sharpness_over(truth),
        palette_error=metrics.palette_error(clips.palette, truth.palette),
        theme_kept=metrics.theme_kept(clips.palette, references, themes),
        feature_distance=feature_distance(clips.features, truth.features),
        psnr=psnr if math.isfinite(psnr) else None,
        yaw_correlation=metrics.correlation(*yaw),
        forward_correlation=metrics.correlation(*forward),
        yaw_gain=metrics.gain(*yaw),
        forward_gain=metrics.gain(*forward),
        **distances,
    )


def cache_folder() -> Path:
    """Where a user's programs keep what they can make again (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aapt"


def _steps(seconds: float) -> int:
    """Latent frames of a rollout; refuses one too short for the first window."""
    shortest = WINDOWS[0].last
    steps = round(seconds * FPS / FRAMES_PER_LATENT) if math.isfinite(seconds) else 0
    if steps < shortest:
        needed = shortest * FRAMES_PER_LATENT / FPS
        raise ValueError(f"seconds: expected at least {needed:.2f}, got {seconds}")
    return steps


def _load(folder: str | Path) -> StreamingGenerator:
    """A checkpoint that moves as the bundled world does."""
    generator = StreamingGenerator.from_pretrained(folder)
    camera = generator.model.camera
    if camera is None:
        raise ValueError(f"{folder}: expected a model with a camera, to walk as the world does")
    expected = (YAW_STEP, FORWARD_STEP, FRAMES_PER_LATENT)
    got = (camera.yaw_step, camera.forward_step, generator.frames_per_step)
    if got != expected:
        raise ValueError(
            f"{folder}: expected the world's yaw step, forward step and frames per step "
            f"{expected}, got {got}"
        )
    return generator


def _sheet(walks: Sequence[Start], films: dict[str, Footage], moments: Sequence[int]):
    numbers = [second * FPS for second in moments]
    shown = {name: film[numbers] for name, film in films.items()}
    groups = [
        [
            (f"{i} {THEMES[walk.world.theme].name}\n{name}", video[i])
            for name, video in shown.items()
        ]
        for i, walk in enumerate(walks)
    ]
    return contact_sheet(groups, [f"{second} s" for second in moments])
