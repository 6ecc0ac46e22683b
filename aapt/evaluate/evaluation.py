"""Measures checkpoints on starts they have not seen, beside the truth."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..clock import FPS, FRAMES_PER_LATENT, SHEET_SECONDS, STEPS_PER_SECOND
from ..device import move
from ..environment import environment
from ..media.contact_sheet import SHOWN_ROWS, contact_sheet
from ..media.figures import new_figure, path_labels, save_figure
from ..streaming.generator import StreamingGenerator
from .clip_scenes import EncodedClips
from .drift_plot import plot_drift
from .footage import Footage
from .measure import Measurement, Stretch, measure, timeline
from .motion_probe import ProbeConfig
from .pretrained import PretrainedDistance
from .report import Report
from .scenes import AUTOENCODER, TRUTH, Scenes, film_rollout
from .windows import WINDOWS, drift_frames, nearest
from .world_scenes import Walks, held_out_starts


def evaluate(
    checkpoints: Sequence[str | Path],
    out: Path,
    *,
    latents: Path | None = None,
    starts: int = 16,
    seconds: float = 60.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
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
        latents: A folder of encoded clips to start from, which any checkpoint can be measured on
            (see `EncodedClips`); None for worlds, which the bundled one moves in. Of clips there is
            no truth past their end, and no theme and no commanded motion that could be checked.
        starts: How many; six worlds show every theme.
        seconds: Length of a rollout. Windows that it does not reach the end of are left out.
        seed: Chooses worlds and walks, or clips, and noise.
        device: Where the checkpoints run; metrics are computed on the CPU.
        fid, fvd: TorchScript files, see `PretrainedDistance`.
        probe: How the motion probe is trained, None for the usual way.
        cache: Where the probe is kept from evaluation to evaluation, None for the user's cache.
        log: Told what is done and how long it took.
    """
    steps = _steps(seconds)
    names = path_labels(checkpoints, taken=(TRUTH, AUTOENCODER))
    loaded = {folder: _load(folder, device) for folder in checkpoints}
    generators = dict(zip(names, loaded.values(), strict=True))
    sizes = {(g.height, g.width) for g in generators.values()}
    if len(sizes) > 1:
        raise ValueError(f"checkpoints: expected one picture size, got {sizes}")
    scenes: Scenes
    if latents is None:
        walks = held_out_starts(starts, steps, seed)
        scenes = Walks(walks, loaded, probe or ProbeConfig(), cache or cache_folder())
    else:
        scenes = EncodedClips(latents, loaded, starts, seed)
    files = {"fid": fid, "fvd": fvd}
    networks = [PretrainedDistance(kind, path) for kind, path in files.items() if path]
    new_figure(1, 1)  # a missing library is said before the work, not after it
    windows = [window for window in WINDOWS if window.last <= steps]
    moments = [s for s in SHEET_SECONDS if s * FPS <= steps * FRAMES_PER_LATENT]
    drift_seconds = range(1, steps // STEPS_PER_SECOND + 1)
    true_seconds = range(1, min(steps, scenes.steps) // STEPS_PER_SECOND + 1)
    stretches = [*(window.frames for window in windows), *map(drift_frames, drift_seconds)]
    frames = sorted({s * FPS for s in moments}.union(*stretches))
    true_frames = sorted(set(frames).union(*(nearest(s, scenes.steps) for s in stretches)))
    seconds_taken: dict[str, float] = {}

    def each_second(film: Footage, seconds: Sequence[int]) -> list[Stretch]:
        return [Stretch.of(film[drift_frames(second)]) for second in seconds]

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        seconds_taken[part] = round(time.perf_counter() - begun, 2)
        log(f"{part}: {seconds_taken[part]:.1f} s")

    out.mkdir(parents=True, exist_ok=True)
    films, real = scenes.film(next(iter(generators.values())), true_frames, windows, timed)
    truth, statistics = films[TRUTH], {TRUTH: real}
    steady = torch.cat(real, dim=1).mean(dim=1, keepdim=True).expand(-1, len(true_seconds), -1)
    lasting = each_second(truth, true_seconds)
    timelines = {TRUTH: timeline(lasting, lasting, true_seconds, steady)}
    for name, generator in generators.items():
        with timed(f"{name} rollout"):
            films[name], made = film_rollout(generator, scenes, steps, frames, seed)
        statistics[name] = [made[:, window.first : window.last + 1] for window in windows]
        made = made[:, [STEPS_PER_SECOND * second for second in drift_seconds]]
        each = each_second(films[name], drift_seconds)
        timelines[name] = timeline(each, lasting, drift_seconds, made)

    with timed("metrics"):
        measured = {}
        for place, window in enumerate(windows):
            real = Stretch.of(truth[nearest(window.frames, scenes.steps)][:, 1:])
            over = window.last > scenes.steps
            measured[window.name] = {
                name: Measurement()
                if name == TRUTH and over
                else measure(
                    film[window.frames],
                    real,
                    statistics[name][place] if name in statistics else None,
                    scenes,
                    window,
                    networks if name != TRUTH else (),
                )
                for name, film in films.items()
            }
    given = {"latents": latents, **files}
    report = Report(
        checkpoints={name: str(folder) for name, folder in zip(names, checkpoints)},
        settings={"starts": starts, "seconds": seconds, "seed": seed, "device": str(device)}
        | {kind: str(path) for kind, path in given.items() if path},
        windows=measured,
        timelines=timelines,
        seconds_taken=seconds_taken,
        environment=environment(),
        **scenes.facts(truth, windows[-1]),
    )
    (out / "report.json").write_text(report.as_json() + "\n")
    save_figure(plot_drift(report), out / "drift.png")
    shown = {name: films[name] for name in (*generators, TRUTH)}
    _sheet(scenes, shown, moments).save(out / "sheet.png")
    return report


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


def _load(folder: str | Path, device: str | torch.device) -> StreamingGenerator:
    generator = StreamingGenerator.from_pretrained(folder)
    for network in (generator.model, generator.vae):
        move(network, device)
    return generator


def _sheet(scenes: Scenes, films: Mapping[str, Footage], moments: Sequence[int]) -> Image.Image:
    """Starts at the seconds of `moments`; black where there is no truth any more."""

    def shown(film: Footage) -> Tensor:
        pixels = film.pixels.new_zeros(len(film.pixels), len(moments), *film.pixels.shape[2:])
        kept = [place for place, second in enumerate(moments) if FPS * second in film.frames]
        pixels[:, kept] = film[[FPS * moments[place] for place in kept]]
        return pixels

    videos = {name: shown(film) for name, film in films.items()}
    groups = [
        [(f"{label}\n{name}", video[i]) for name, video in videos.items()]
        for i, label in enumerate(scenes.labels)
    ]
    height = next(iter(videos.values())).shape[2]
    columns = [f"{second} s" for second in moments]
    return contact_sheet(groups, columns, max(1, SHOWN_ROWS // height))
