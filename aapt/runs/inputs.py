"""What a run is given: encoded clips, and weights to start from. `inputs.json` in its folder keeps
what they were, beside the recipe, so that a result can be traced and a run never changes them."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint import file_digest, write_json
from ..data.clips import Clips
from ..data.latent_shards import LatentShards, Mixture, ray_deviation, read_index
from ..model.config import CameraConfig
from ..vae import CausalVAE
from ..vae.folder import load_vae

ANY_SET = ""
INPUTS = "inputs.json"


@dataclass(frozen=True)
class Inputs:
    """latents: folders of `aapt encode` by set; under ANY_SET those that have the others' as
    buckets. weights: what the first stage starts from, None for random ones."""

    latents: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    weights: Path | None = None

    def buckets(self, name: str) -> list[tuple[Path, str]]:
        """Where the clips of a set are. ValueError if they are nowhere."""
        found = []
        for folder in self.latents.get(name, ()):
            known = list(read_index(folder)["buckets"])
            if name not in known and len(known) != 1:
                raise ValueError(
                    f"latents: expected a bucket {name}, or one for it, in {folder}, "
                    f"got {', '.join(known) or 'none yet'}"
                )
            found.append((folder, name if name in known else known[0]))
        if not found:
            anywhere = self.latents.get(ANY_SET, ())
            found = [(at, name) for at in anywhere if name in read_index(at)["buckets"]]
        if not found:
            among = ", ".join(map(str, self.latents.get(ANY_SET, ())))
            raise ValueError(
                f"latents: expected the folder with clips of {name}, got none"
                + (f" in {among}" if among else "")
            )
        return found

    def entries(self, name: str) -> list[dict[str, Any]]:
        """What the index of each folder says of a set."""
        return [read_index(folder)["buckets"][bucket] for folder, bucket in self.buckets(name)]

    def clips(self, name: str, camera: CameraConfig | None) -> Clips:
        """A set; one that is in several folders is drawn from all of them."""
        parts = [LatentShards(*place, camera) for place in self.buckets(name)]
        return parts[0] if len(parts) == 1 else Mixture(parts)

    def check(self, name: str, condition_channels: int, camera: CameraConfig | None) -> str:
        """ValueError unless clips of a set are moved by what a model is conditioned on. Returns the
        digest of the autoencoder that made them."""
        digests = set()
        for folder, _ in self.buckets(name):
            encoding = read_index(folder)["encoding"]
            digests.add(encoding["vae"])
            wanted = "camera" if camera else "pose" if condition_channels else None
            if wanted and encoding["motion"] != wanted:
                raise ValueError(
                    f"{folder}: expected clips with {wanted} motion, got {encoding['motion']}"
                )
        if len(digests) > 1:
            raise ValueError(f"{name}: expected latents of one autoencoder, got {len(digests)}")
        return digests.pop()

    def camera(self, camera: CameraConfig, sets: Sequence[str]) -> CameraConfig:
        """`camera` with ray origins and directions of unit deviation over the clips of `sets`
        (SPEC 10), which walks at twice their pace, whatever their unit of length."""
        entries = [entry for name in sets for entry in self.entries(name)]
        deviation = ray_deviation([shard for entry in entries for shard in entry["shards"]])
        if deviation is None:
            raise ValueError("latents: expected clips with camera motion, got none")
        origin, direction = deviation
        if not (origin and direction):
            raise ValueError(
                "latents: expected a camera that moves and turns, got one that does not"
            )
        return replace(
            camera,
            forward_step=2 * origin,
            origin_deviation=origin,
            direction_deviation=direction,
        )

    def long_captions(self, name: str, limit: int) -> tuple[int, int]:
        """How many clips of a set have a caption of more than `limit` bytes, as far as its folders
        know, and how many clips it has."""
        parts = self.entries(name)
        lengths = [part.get("caption_bytes", {}).items() for part in parts]
        long = sum(clips for part in lengths for length, clips in part if int(length) > limit)
        return long, sum(part["clips"] for part in parts)

    def autoencoder(self, name: str) -> CausalVAE:
        """What the latents of a set are decoded by."""
        return load_vae(self.buckets(name)[0][0])

    def facts(self, sets: Sequence[str], starts: bool) -> dict[str, Any]:
        """What stages that draw from `sets` depend on; the weights only if one of them `starts`."""
        facts: dict[str, Any] = {
            "latents": {
                name: [
                    {"folder": str(at), "bucket": bucket, "sha256": _bucket_digest(at, bucket)}
                    for at, bucket in self.buckets(name)
                ]
                for name in sets
            }
        }
        if starts:
            facts["weights"] = None
            if self.weights is not None:
                facts["weights"] = {"file": str(self.weights), "sha256": file_digest(self.weights)}
        return facts


def claim_inputs(folder: Path, facts: dict[str, Any]) -> str | None:
    """Add facts to `inputs.json` of a run; else say which of them differs from what it says."""
    path = folder / INPUTS
    kept = json.loads(path.read_text()) if path.is_file() else {"latents": {}}
    known = copy.deepcopy(kept)
    for name, parts in facts["latents"].items():
        before = known["latents"].setdefault(name, parts)
        if _contents(before) != _contents(parts):
            return (
                f"{path}: latents {name}: expected {_names(before)} as before, got {_names(parts)}"
            )
    if "weights" in facts:
        before = known.setdefault("weights", facts["weights"])
        ours, theirs = ([part] if part else [] for part in (facts["weights"], before))
        if _contents(ours) != _contents(theirs):
            return f"{path}: weights: expected {_names(theirs)} as before, got {_names(ours)}"
    if known != kept:
        write_json(path, known)
    return None


def _contents(parts: list[dict[str, str]]) -> list[tuple[str | None, str]]:
    """Of inputs, wherever they lie."""
    return [(part.get("bucket"), part["sha256"]) for part in parts]


def _names(parts: list[dict[str, str]]) -> str:
    named = [f"{part.get('folder') or part['file']} ({part['sha256'][:8]})" for part in parts]
    return ", ".join(named) or "none"


def _bucket_digest(folder: Path, bucket: str) -> str:
    """Of how clips were encoded, and of their shards' own digests."""
    index = read_index(folder)
    said = json.dumps([index["encoding"], index["buckets"][bucket]["shards"]])
    return hashlib.sha256(said.encode()).hexdigest()
