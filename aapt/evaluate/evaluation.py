"""Measures a checkpoint on worlds it has not seen, beside the truth and beside a baseline."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.world import FORWARD_STEP, FRAMES_PER_LATENT, THEMES, YAW_STEP
from ..environment import environment
from ..generator import StreamingGenerator
from . import metrics
from .contact_sheet import contact_sheet
from .footage import (
    Footage,
    Start,
    deviation,
    film_reconstruction,
    film_rollout,
    film_truth,
    held_out_starts,
    theme_footage,
)
from .motion_probe import MotionProbe, ProbeConfig, load_probe
from .report import Measurement, Report

FPS = 24
SHEET_SECONDS = (0, 1, 5, 10, 30, 60)


@dataclass(frozen=True)
class Window:
    """The steps `first` to `last`, counted from 1; step n makes video frames 4 n - 3 to 4 n."""

    name: str
    first: int
    last: int

    @property
    def frames(self) -> range:
        """Its video frames, and before them the last one of the step before."""
        return range(FRAMES_PER_LATENT * (self.first - 1), FRAMES_PER_LATENT * self.last + 1)


WINDOWS = (
    Window("0-1.3 s", 1, 8),
    Window("4-6 s", 25, 36),
    Window("29-31 s", 175, 186),
    Window("55-60 s", 331, 360),
)


def evaluate(
    folder: str | Path,
    out: Path,
    *,
    baseline: str | Path | None = None,
    starts: int = 16,
    seconds: float = 60.0,
    seed: int = 0,
    probe: ProbeConfig | None = None,
    log: Callable[[str], None] = print,
) -> Report:
    """Roll out a checkpoint from held-out starts and measure it; writes `report.json` and
    `sheet.png` into `out`, where the motion probe is kept too.

    Args:
        folder, baseline: Checkpoint folders, or names of bundled models.
        starts: How many worlds; six show every theme.
        seconds: Length of a rollout. Windows that it does not reach the end of are left out.
        seed: Chooses worlds, walks and noise.
        probe: How the motion probe is trained, None for the usual way.
        log: Told what is done and how long it took.
    """
    steps = _steps(seconds)
    walks = held_out_starts(starts, steps, seed)
    generators = {"model": _load(folder)}
    if baseline is not None:
        generators["baseline"] = _load(baseline)
    sizes = {(g.height, g.width) for g in generators.values()}
    if len(sizes) > 1:
        raise ValueError(f"baseline: expected the picture size of the model, got {sizes}")
    height, width = sizes.pop()
    windows = [window for window in WINDOWS if window.last <= steps]
    moments = [s for s in SHEET_SECONDS if s * FPS <= steps * FRAMES_PER_LATENT]
    frames = sorted({s * FPS for s in moments}.union(*(window.frames for window in windows)))
    seconds_taken: dict[str, float] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        seconds_taken[part] = round(time.perf_counter() - begun, 2)
        log(f"{part}: {seconds_taken[part]:.1f} s")

    out.mkdir(parents=True, exist_ok=True)
    with timed("motion probe"):
        motion_probe, quality = load_probe(out, probe or ProbeConfig(), height, width)
    with timed("truth"):
        truth = film_truth(walks, frames, height, width)
        references = metrics.palette(theme_footage(height, width))
    films, deviations = {"truth": truth}, {}
    with timed("autoencoder"):
        stretches = [window.frames for window in windows]
        films["autoencoder"], latents = film_reconstruction(generators["model"], truth, stretches)
        deviations["truth"] = [deviation(latent) for latent in latents]
    timelines = {}
    for name, generator in generators.items():
        with timed(f"{name} rollout"):
            films[name], each = film_rollout(generator, walks, truth[[0]][:, 0], frames, seed)
        deviations[name] = [each[:, window.first : window.last + 1] for window in windows]
        timelines[name] = each.mean(dim=0)[:: FPS // FRAMES_PER_LATENT].tolist()

    themes = torch.tensor([walk.world.theme for walk in walks])
    with timed("metrics"):
        measured = {}
        for place, window in enumerate(windows):
            measured[window.name] = {
                name: measure(
                    film[window.frames],
                    truth[window.frames],
                    deviations[name][place] if name in deviations else None,
                    torch.stack([w.controls[window.first - 1 : window.last] for w in walks]),
                    themes,
                    references,
                    motion_probe,
                )
                for name, film in films.items()
            }
    longest = metrics.palette(truth[windows[-1].frames])
    report = Report(
        checkpoints={"model": str(folder)} | ({"baseline": str(baseline)} if baseline else {}),
        settings={"starts": starts, "seconds": seconds, "seed": seed},
        windows=measured,
        same_theme=metrics.palette_distance(longest, themes, same_theme=True),
        other_theme=metrics.palette_distance(longest, themes, same_theme=False),
        probe=quality,
        timelines=timelines,
        seconds_taken=seconds_taken,
        environment=environment(),
    )
    report.save(out / "report.json")
    shown = {name: films[name] for name in (*generators, "truth")}
    _sheet(walks, shown, moments).save(out / "sheet.png")
    return report


def measure(
    video: Tensor,
    truth: Tensor,
    deviations: Tensor | None,
    controls: Tensor,
    themes: Tensor,
    references: Tensor,
    probe: MotionProbe,
) -> Measurement:
    """One window of a video source, and of the truth: uint8 (starts, 1 + 4 T, H, W, 3), the first
    frame only there for the motion of the second.

    deviations: of its latent frames (starts, T), None where it has none; controls (starts, T, 2);
    themes (starts,); references: palettes (themes, 6).
    """
    motion = torch.stack([probe.estimate(clip) for clip in video])
    video, truth = video[:, 1:], truth[:, 1:]
    colours = metrics.palette(video)
    contrast = metrics.sharpness(truth)
    psnr = metrics.psnr(video, truth)
    yaw, forward = ((motion[..., axis], controls[..., axis]) for axis in (0, 1))
    return Measurement(
        latent_deviation=None if deviations is None else deviations.mean().item(),
        sharpness=metrics.sharpness(video) / contrast if contrast else None,
        palette_error=metrics.palette_error(colours, metrics.palette(truth)),
        theme_kept=metrics.theme_kept(colours, references, themes),
        psnr=psnr if math.isfinite(psnr) else None,
        yaw_correlation=metrics.correlation(*yaw),
        forward_correlation=metrics.correlation(*forward),
        yaw_gain=metrics.gain(*yaw),
        forward_gain=metrics.gain(*forward),
    )


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
