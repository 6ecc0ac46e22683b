"""Settings of a server: limits of its visitors, and of a deployment of many servers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.caches import MODEL, check_name
from ..placement import placement


@dataclass(frozen=True)
class Settings:
    """Limits and places of one server.

    Attributes:
        sessions: Worlds played at once; later visitors wait in line.
        history_mib: Budget of each world's snapshots, in MiB.
        snapshot_seconds: Video time between two snapshots.
        idle_seconds: A world without input ends after these.
        keep_seconds: A world whose connection is lost can be resumed within these.
        upload_bytes, upload_pixels: Largest upload, and the largest image in it.
        uploads: Uploads kept for each connection; the oldest goes first.
        message_bytes, messages_per_second: Largest message of a client, and its steady rate; bursts
            may have twice the messages of a second.
        save_bytes: Largest snapshot that a client is given.
        steps, branches: Most steps and branches of a world. Work per step grows with the branches.
        record_steps: Most steps of one recording.
        quality: Of JPEG and WebP, 1 to 100.
        h264_above: Video of more rows is sent as H.264 to clients that take it.
        token: Visitors must give it, if there is one: letters, digits and . _ ~ -.
        hosts: Names by which the server may be called; empty for any.
        origins: Origins of other sites whose pages may connect.
        gallery: Folder of more first frames, if any.
        batch: Steps of several worlds that are due at once are made in one pass. Faster, but a
            world no longer has the bits of a run alone.
    """

    sessions: int = 4
    history_mib: int = 256
    snapshot_seconds: float = 2.0
    idle_seconds: float = 600.0
    keep_seconds: float = 60.0
    upload_bytes: int = 16 << 20
    upload_pixels: int = 50_000_000
    uploads: int = 4
    message_bytes: int = 1 << 16
    messages_per_second: float = 240.0
    save_bytes: int = 8 << 20
    steps: int = 50_000
    branches: int = 1_000
    record_steps: int = 3_600
    quality: int = 88
    h264_above: int = 480
    token: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    gallery: Path | None = None
    batch: bool = False

    def __post_init__(self):
        for name in ("sessions", "history_mib", "uploads", "steps", "branches", "record_steps"):
            least = 0 if name == "history_mib" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        # It stands in an address and in a cookie, and an empty one would let everybody in.
        if self.token is not None and not re.fullmatch(r"[A-Za-z0-9._~-]+", self.token):
            raise ValueError("token: expected letters, digits and . _ ~ -, got none or others")


@dataclass(frozen=True)
class Deployment:
    """One server per replica of Ray Serve.

    Attributes:
        model: A bundled model or a checkpoint folder.
        placement: Device, dtype, size and cache, as `StreamingGenerator.from_pretrained` takes
            them.
        replicas: The most replicas.
        settings: Those of each replica.
    """

    model: str
    placement: dict[str, Any]
    replicas: int
    settings: Settings

    @property
    def gpus(self) -> int:
        """GPUs of a replica."""
        return int(self.placement["device"].startswith("cuda"))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Deployment":
        """Reads environment variables: AAPT_REPLICAS, and as options of `aapt serve` AAPT_MODEL,
        AAPT_DEVICE, AAPT_DTYPE, AAPT_SIZE, AAPT_CACHE, AAPT_SESSIONS (worlds per replica),
        AAPT_BATCH (0 or 1) and AAPT_TOKEN. ValueError, by the variable's name, for a value that
        means nothing."""

        def count(name: str, default: str) -> int:
            text = environment.get(name, default)
            if not text.isdecimal() or not int(text):
                raise ValueError(f"{name}: expected a number of at least 1, got {text}")
            return int(text)

        device, sessions = environment.get("AAPT_DEVICE", "cpu"), count("AAPT_SESSIONS", "4")
        batch = environment.get("AAPT_BATCH", "0")
        if batch not in ("0", "1"):
            raise ValueError(f"AAPT_BATCH: expected 0 or 1, got {batch}")
        try:
            placed = placement(device, environment.get("AAPT_DTYPE"), environment.get("AAPT_SIZE"))
            placed["cache"] = check_name(environment.get("AAPT_CACHE", MODEL))
            token = environment.get("AAPT_TOKEN")
            settings = Settings(sessions=sessions, token=token, batch=batch == "1")
        except ValueError as error:
            name, _, reason = str(error).partition(":")
            raise ValueError(f"AAPT_{name.upper()}:{reason}") from None
        model = environment.get("AAPT_MODEL", "tiny-world")
        return cls(model, placed, count("AAPT_REPLICAS", "2"), settings)
