"""Settings of a server: limits of its visitors, and the address at which it listens."""

from dataclasses import dataclass
from pathlib import Path


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
        steps: Most steps of a world.
        record_steps: Most steps of one recording.
        quality: Of JPEG and WebP, 1 to 100.
        h264_above: Video of more rows is sent as H.264 to clients that take it.
        token: Visitors must give it, if there is one.
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
    record_steps: int = 3_600
    quality: int = 88
    h264_above: int = 480
    token: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    gallery: Path | None = None
    batch: bool = False

    def __post_init__(self):
        for name in ("sessions", "history_mib", "uploads", "steps", "record_steps"):
            least = 0 if name == "history_mib" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
