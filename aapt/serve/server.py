"""Shared by all connections of one server: model, generator thread, places, lost worlds."""

import asyncio
import contextlib
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import quote

import numpy as np

from ..checkpoint import find_checkpoint, load_config
from ..media.image import fit_image, load_image
from ..model.caches import check_same
from ..model.pose import LIMBS, POINTS, Pose, limb_colour
from ..streaming.actions import Walk, load_walk, model_digest
from ..streaming.controls import FORWARD_RANGE, YAW_RANGE
from ..streaming.generator import StreamingGenerator
from ..streaming.poses import PRESETS, load_poses
from . import protocol
from .batch import run_together
from .images import encode_png, read_upload
from .line import Line
from .metrics import Metrics
from .saved import SavedWorld, read_saved
from .scheduler import Scheduler
from .session import Place, Session
from .settings import Settings
from .world import blank, driven_by

TIDY_SECONDS = 0.5
SWITCH_SECONDS = 0.0005  # longest time that the event loop waits for the generator thread
Upload = np.ndarray | Walk | SavedWorld


def package_version() -> str:
    """Returns the version of the installed package, "0" of one that is not installed."""
    try:
        return version("aapt")
    except PackageNotFoundError:
        return "0"


@dataclass(frozen=True)
class Start:
    """A start on offer. pixels: first frame (H, W, 3), None for the prompt alone. png: its image.
    prompt: its prompt."""

    pixels: np.ndarray | None
    png: bytes
    prompt: str


class PlayServer:
    """The sessions of one generator on one device. Used on the event loop alone.

    Args:
        name: The bundled model or checkpoint folder that the generator is of.

    Attributes:
        sessions: Sessions by token.
        kept: Worlds whose connection is lost, by token, and when they are forgotten.
    """

    def __init__(self, generator: StreamingGenerator, name: str, settings: Settings):
        generator.check_streams()
        self.driven_by = driven_by(generator)
        if settings.batch and generator.few_step:
            raise ValueError(
                "batch: expected a model of one pass per frame, got a few-step model; leave it away"
            )
        folder = find_checkpoint(name)
        self.generator, self.settings = generator, settings
        self.name, self.version, self.digest = folder.name, package_version(), model_digest(folder)
        self.gallery = read_gallery(folder, generator, settings.gallery)
        self.scheduler = Scheduler(run_together if settings.batch else None)
        self.metrics = Metrics()
        self.line = Line(settings.sessions, self._count)
        self.sessions: dict[str, Session] = {}
        self.kept: OrderedDict[str, tuple[float, Place]] = OrderedDict()
        self._decoding = ThreadPoolExecutor(1, "aapt-upload")  # one at a time

    def start(self) -> None:
        """Starts the generator thread; called on the event loop."""
        # A step is mostly Python on a small model. By default the event loop waits 5 ms for the
        # interpreter at each of the calls that send a message, and up to 90 ms in all.
        sys.setswitchinterval(SWITCH_SECONDS)
        self.scheduler.start()
        self._tidying = asyncio.create_task(self._tidy())

    async def stop(self) -> None:
        """Ends the generator thread; called after the last connection."""
        self._tidying.cancel()
        await asyncio.to_thread(self.scheduler.stop)
        self._decoding.shutdown(cancel_futures=True)

    async def _tidy(self) -> None:
        """Ends idle worlds and forgets lost ones, for ever."""
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            now = time.monotonic()
            for session in list(self.sessions.values()):
                if session.ended is None and now - session.touched > self.settings.idle_seconds:
                    session.end("idle")
            for token in [token for token, (until, _) in self.kept.items() if now > until]:
                del self.kept[token]
            self.metrics.bytes.set(sum(session.bytes for session in self.sessions.values()))

    def _count(self, line: Line) -> None:
        self.metrics.worlds.set(line.taken)
        self.metrics.waiting.set(line.waiting)

    def keep(self, token: str, place: Place) -> None:
        """Keeps a lost world for `keep_seconds`. As many as may be open keep their snapshots; an
        older one will be replayed."""
        self.kept[token] = time.monotonic() + self.settings.keep_seconds, place
        self.kept.move_to_end(token)
        for old in list(self.kept)[: -self.settings.sessions]:
            until, place = self.kept[old]
            self.kept[old] = until, replace(place, snapshot=None, frames=None)

    def walk(
        self,
        image: str,
        upload: np.ndarray | None,
        prompt: str | None,
        seed: int,
        pose: Pose | None = None,
    ) -> Walk:
        """Returns a walk without steps from an uploaded image or one of the gallery. ValueError for
        an image that is not there, or an image or pose that the model cannot start from."""
        if upload is not None:
            pixels, default = upload, self.generator.sample_prompt
        elif image in self.gallery:
            pixels, default = self.gallery[image].pixels, self.gallery[image].prompt
        else:
            raise ValueError("image: expected sample, a name of the gallery or the id of an upload")
        self.generator.check_first_frame(pixels)
        given = prompt if prompt is not None else default
        if pose is None and self.driven_by == "pose":
            pose = load_poses("still").first
        self.generator.check_first_pose(pose)
        generator = self.generator
        drawn = dict(size=(generator.height, generator.width)) if pixels is None else {}
        like = dict(pose=pose, cache=generator.cache, **drawn)
        return Walk(self.name, self.digest, pixels, given, seed, **like)

    def check_walk(self, walk: Walk) -> Walk:
        """Returns a walk that was uploaded. ValueError if it is of another model, size or cache."""
        if walk.digest != self.digest:
            raise ValueError(
                f"log: expected a walk of {self.name} {self.digest[:12]}, "
                f"got one of {walk.model[:40]} {walk.digest[:12]}"
            )
        size = self.generator.height, self.generator.width
        if walk.size not in (None, size):
            (height, width), (rows, columns) = size, walk.size
            raise ValueError(f"log: expected video of {width}x{height}, got {columns}x{rows}")
        mend = f"start the server with --cache {walk.cache}"
        check_same("log", self.generator.cache, walk.cache, mend)
        return walk

    def choose_format(self, formats: list[str]) -> str:
        """Returns the format of the frames for a client that takes these."""
        if "h264" in formats and self.generator.height > self.settings.h264_above:
            return "h264"
        return next((name for name in formats if name != "h264"), "jpeg")

    async def read_upload(self, data: bytes) -> Upload:
        """Reads an image, an action log or a saved world. ValueError, in one line."""
        loop = asyncio.get_running_loop()
        if data.lstrip()[:1] == b"{":
            read = self._read_walk
        else:
            # Eight bytes of length come before the JSON of safetensors
            read = read_saved if data[8:9] == b"{" else self._read_image
        return await loop.run_in_executor(self._decoding, read, data)

    def _read_image(self, data: bytes) -> np.ndarray:
        generator = self.generator
        return read_upload(data, self.settings.upload_pixels, generator.height, generator.width)

    def _read_walk(self, data: bytes) -> Walk:
        walk = load_walk(data.decode(errors="replace").splitlines())
        self.generator.check_first_frame(walk.first_frame)
        for name, given in (("steps", walk.steps), ("branches", len(walk.branches))):
            if given > (most := getattr(self.settings, name)):
                raise ValueError(f"walk: expected at most {most} {name}, got {given}")
        if walk.digest == self.digest:
            self._check_controls(walk)
        return walk

    def _check_controls(self, walk: Walk) -> None:
        """ValueError, with its place, for a pose or control that does not drive the model."""
        self.generator.check_first_pose(walk.pose)
        for number, branch in enumerate(walk.branches):
            for index, step in enumerate(branch.steps, start=branch.start + 1):
                try:
                    for made in (step, *step.redone):
                        self.generator.check_control(made.control)
                except ValueError as error:
                    raise ValueError(f"walk: branch {number}, step {index}: {error}") from None

    def welcome(self, token: str, resumed: bool, image_format: str) -> protocol.Welcome:
        """Returns the answer to a hello."""
        generator, settings = self.generator, self.settings
        names = protocol.Limits.model_fields
        return protocol.Welcome(
            version=self.version,
            model=self.name,
            digest=self.digest,
            driven_by=self.driven_by,
            figure=figure_facts() if self.driven_by == "pose" else None,
            width=generator.width,
            height=generator.height,
            fps=generator.fps,
            frames_per_step=generator.frames_per_step,
            format=image_format,
            prompts=list(generator.themes),
            gallery=[
                protocol.Picture(
                    name=name, url=f"gallery/{quote(name, safe='')}", prompt=start.prompt
                )
                for name, start in self.gallery.items()
            ],
            ranges={"yaw": YAW_RANGE, "forward": FORWARD_RANGE},
            token=token,
            resumed=resumed,
            capacity=settings.sessions,
            batch=settings.batch,
            limits=protocol.Limits(**{name: getattr(settings, name) for name in names}),
        )


def figure_facts() -> protocol.FigureFacts:
    """Returns what a client needs to know of the figure that it drives."""
    colours = ["#{:02x}{:02x}{:02x}".format(*limb_colour(n)) for n in range(len(LIMBS))]
    return protocol.FigureFacts(
        points=list(POINTS), limbs=list(LIMBS), colours=colours, motions=list(PRESETS)
    )


def read_gallery(
    folder: Path, generator: StreamingGenerator, more: Path | None
) -> dict[str, Start]:
    """Returns the starts on offer: the prompt alone if the model needs no more, the model's sample,
    its gallery, and the images of a folder; the name of a file is its prompt there."""
    files = [(p.stem, p, p.stem.replace("-", " ")) for p in sorted(more.iterdir())] if more else []
    entries = load_config(folder).get("gallery", [])
    files = [
        (Path(e["image"]).stem, folder / Path(e["image"]).name, e["prompt"]) for e in entries
    ] + files
    with contextlib.suppress(ValueError):  # a model without a sample
        files.insert(0, ("sample", generator.sample_image(), generator.sample_prompt))
    gallery: dict[str, Start] = {}
    if generator.few_step:
        gallery["prompt"] = Start(None, encode_png(blank(generator)), generator.sample_prompt)
    for name, file, prompt in files if generator.takes_picture else ():
        pixels, _ = fit_image(load_image(file), generator.height, generator.width)
        gallery[name] = Start(pixels, encode_png(pixels), prompt)
    return gallery
