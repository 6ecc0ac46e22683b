"""Inputs of a run: encoded clips, and weights to start from.

`inputs.json` in the run's folder records them, so that a result can be traced and a resumed run
never continues with other inputs. They may move: contents are compared, by size and time of change
first, and by SHA-256 if these differ.
"""

import copy
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint import (
    CheckpointError,
    file_digest,
    load_config,
    reading_config,
    tuples,
    write_json,
)
from ..data.clips import Clips
from ..data.latent_shards import LatentShards, Mixture, ray_deviation, read_index
from ..model.config import CameraConfig, ModelConfig
from ..training.recipe import Recipe, StageConfig
from ..vae import CausalVAE
from ..vae.folder import ORIGINAL, load_vae

ANY_SET = ""
INPUTS = "inputs.json"
# What the weights of a checkpoint must share with the model that starts from them.
SHARED = (
    *("block", "width", "heads", "head_dim", "depth", "mlp_width", "text_width", "text_encoder"),
    *("latent_channels", "patch", "rope_axes", "rope_theta"),
)


@dataclass(frozen=True)
class Inputs:
    """Paths of the inputs of a run.

    Attributes:
        latents: Folders of `aapt encode` by the name of a set. Folders under ANY_SET serve every
            other set that is the name of one of their buckets.
        weights: Weights of the first stage, a safetensors file or a checkpoint's folder; None for
            random weights.
        discriminator_weights: Weights of the first discriminator, for stages that start no other
            way; None for `weights`.
        vae: The autoencoder that encodes rendered clips, a bundled model or a checkpoint folder;
            None for the recipe's.
    """

    latents: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    weights: Path | None = None
    discriminator_weights: Path | None = None
    vae: str | Path | None = None

    def buckets(self, name: str) -> list[tuple[Path, str]]:
        """Find the clips of a set: folders, and a bucket in each. ValueError if there are none."""
        found = []
        for folder in self.latents.get(name, ()):
            known = list(read_index(folder)["buckets"])
            if name not in known and len(known) != 1:
                raise ValueError(
                    f"latents: expected a bucket {name}, or a single bucket, in {folder}, "
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
                + f"; pass --latents {name}=FOLDER of aapt encode"
            )
        return found

    def entries(self, name: str) -> list[dict[str, Any]]:
        """Read the entry of a set from the index of each of its folders."""
        return [read_index(folder)["buckets"][bucket] for folder, bucket in self.buckets(name)]

    def clips(self, name: str, camera: CameraConfig | None) -> Clips:
        """Open a set. If several folders have it, clips are drawn from all of them."""
        parts = [LatentShards(*place, camera) for place in self.buckets(name)]
        return parts[0] if len(parts) == 1 else Mixture(parts)

    def check(self, name: str, condition_channels: int, camera: CameraConfig | None) -> str:
        """Check that the clips of a set have the motion that the model is conditioned on.

        Returns the digest of the autoencoder that encoded them. ValueError if their motion is of
        another kind, or if several autoencoders encoded them.
        """
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

    def fps(self, name: str) -> int:
        """Return the video frames per second of a set's clips. ValueError if they differ."""
        rates = {read_index(folder)["encoding"]["fps"] for folder, _ in self.buckets(name)}
        if len(rates) > 1:
            raise ValueError(f"{name}: expected clips of one rate, got {sorted(rates)} fps")
        return rates.pop()

    @staticmethod
    def check_one_encoding(digests: Mapping[str, str], rates: Mapping[str, int]) -> None:
        """Check that the sets of a run are of one autoencoder and of one rate.

        digests, rates: the autoencoder's digest and the video frames per second, by set. ValueError
        naming the sets.
        """
        if len(set(digests.values())) > 1:
            raise ValueError(
                f"latents: expected those of one autoencoder for {', '.join(digests)}, "
                f"got {len(set(digests.values()))}"
            )
        if len(set(rates.values())) > 1:
            raise ValueError(
                f"latents: expected those of one rate for {', '.join(rates)}, "
                f"got {sorted(set(rates.values()))} fps"
            )

    def starts(self, stages: Iterable[StageConfig]) -> set[str]:
        """Return which weights of the run's start stages need: "weights", and
        "discriminator_weights" of a discriminator that starts from no stage."""
        needed = set()
        for config in stages:
            if getattr(config, "discriminator_start", "") is None:
                needed.add("discriminator_weights")
                needed |= set() if self.discriminator_weights else {"weights"}
            if config.start is None:
                needed.add("weights")
        return needed

    def vae_of(self, recipe: Recipe) -> str | Path:
        """Return the autoencoder of a recipe that makes none."""
        return recipe.autoencoder if self.vae is None else self.vae

    def check_vae(self, recipe: Recipe) -> None:
        """Check that the autoencoder that a run is given has the recipe's shape.

        ValueError if it has another one or is missing, or for a recipe that takes none.
        """
        if not recipe.autoencoder:
            if self.vae is not None:
                raise ValueError(f"vae: expected none for the recipe {recipe.name}, got {self.vae}")
            return
        source, wanted = self.vae_of(recipe), recipe.vae
        try:
            config = load_vae(source, ORIGINAL).config
        except CheckpointError as error:
            if self.vae is not None:
                raise
            raise ValueError(
                f"vae: expected the autoencoder of {source}, got none; run `aapt train {source}` "
                f"and pass --vae runs/{source}/{source}"
            ) from error
        if config != wanted:
            cells = [f"{c.space_factor}x{c.space_factor} pixels" for c in (wanted, config)]
            raise ValueError(
                f"vae: expected an autoencoder of cells of {cells[0]} in the shape of the recipe, "
                f"got cells of {cells[1]} in {source}"
            )

    def check_weights(self, recipe: Recipe) -> None:
        """Check that weights given as checkpoints are of the recipe's model, which may have more
        input channels.

        ValueError names every field that differs, and how a recipe takes its value. ValueError also
        for a discriminator's weights that no stage starts from. CheckpointError for a folder of
        another project.
        """
        if self.discriminator_weights and "discriminator_weights" not in self.starts(
            recipe.stages.values()
        ):
            raise ValueError(
                f"discriminator_weights: expected none for {recipe.name}, whose discriminator "
                f"starts from a stage, got {self.discriminator_weights}; leave them away"
            )
        model = replace(recipe.model, mlp_width=recipe.model.mlp_hidden)
        for name in ("weights", "discriminator_weights"):
            folder = getattr(self, name)
            if folder is None or not folder.is_dir():
                continue
            try:
                with reading_config(folder):
                    given = ModelConfig(**tuples(load_config(folder)["model"]))
            except CheckpointError as error:
                raise CheckpointError(f"{error}; pass a folder of aapt convert") from None
            given = replace(given, mlp_width=given.mlp_hidden)
            differ = [key for key in SHARED if getattr(given, key) != getattr(model, key)]
            if differ:
                ours, theirs = (
                    ", ".join(f"{key} {getattr(each, key)}" for key in differ)
                    for each in (model, given)
                )
                raise ValueError(
                    f"{name}: expected a model of {ours}, as the recipe has it, got {theirs} in "
                    f"{folder}; change the recipe with --set model.FIELD=VALUE"
                )
            if not model.can_start_from(given.input_channels):
                raise ValueError(
                    f"{name}: expected a model of at most {model.input_channels} input channels, "
                    f"as the recipe has them, got {given.input_channels} in {folder}; pass a model "
                    "without conditions"
                )

    def camera(self, camera: CameraConfig, sets: Sequence[str]) -> CameraConfig:
        """Scale a camera to the clips of `sets`, whatever their unit of length.

        Ray origins and directions then have unit deviation (docs/method.md#10). One step forward
        is twice the deviation of the origins.
        """
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
        """Count the clips of a set with a caption of more than `limit` bytes, and all its clips.

        Folders of older versions do not record the length of captions; their clips count as short.
        """
        parts = self.entries(name)
        lengths = [part.get("caption_bytes", {}).items() for part in parts]
        long = sum(clips for part in lengths for length, clips in part if int(length) > limit)
        return long, sum(part["clips"] for part in parts)

    def autoencoder(self, name: str) -> CausalVAE:
        """Load the autoencoder that decodes the latents of a set."""
        return load_vae(self.buckets(name)[0][0])

    def claim(self, folder: Path, sets: Sequence[str], starts: Collection[str]) -> str | None:
        """Record in a run's folder the inputs of stages that draw from `sets`.

        starts: the weights that one of the stages starts from, "weights" or
        "discriminator_weights"; others are not recorded. Returns how an input differs from the
        recorded one, None if none does.
        """
        record = read_record(folder)
        before = copy.deepcopy(record)
        for name in sets:
            parts = [_bucket(*place) for place in self.buckets(name)]
            recorded = record["latents"].get(name, parts)
            if _contents(recorded) != _contents(parts):
                return (
                    f"{folder / INPUTS}: latents {name}: expected {_names(recorded)} as before, "
                    f"got {_names(parts)}"
                )
            for part, old in zip(parts, recorded):
                if part["stamp"] != old.get("stamp", part["stamp"]):
                    if changed := _changed_shard(part):
                        return changed
                old["stamp"] = part["stamp"]
            record["latents"][name] = recorded
        for name in sorted(starts):
            recorded, path = record.get(name), getattr(self, name)
            weights = path and _weights(path, recorded)
            if name in record and _contents([recorded]) != _contents([weights]):
                return (
                    f"{folder / INPUTS}: {name}: expected {_names([recorded])} as before, "
                    f"got {_names([weights])}"
                )
            record[name] = weights
        if record != before:
            write_json(folder / INPUTS, record)
        return None


def claim_clips(folder: Path, sha256: str) -> str | None:
    """Record the digest of the clips that a run has cut from videos, or say that it differs."""
    if not _recorded(folder, "clips", sha256):
        return f"{folder / INPUTS}: videos: expected the clips of before, got others"
    return None


def claim_vae(folder: Path, sha256: str) -> str | None:
    """Record the digest of the autoencoder that a run was given, or say that it differs."""
    if not _recorded(folder, "vae", sha256):
        return f"{folder / INPUTS}: vae: expected the autoencoder of before, got another"
    return None


def _recorded(folder: Path, part: str, sha256: str) -> bool:
    """Record the digest of a part; False if the record has another digest of it."""
    record = read_record(folder)
    if record.setdefault(part, {"sha256": sha256})["sha256"] != sha256:
        return False
    write_json(folder / INPUTS, record)
    return True


def read_record(folder: Path) -> dict[str, Any]:
    """Read `inputs.json` of a run's folder, empty if there is none."""
    path = folder / INPUTS
    return json.loads(path.read_text()) if path.is_file() else {"latents": {}}


def _bucket(folder: Path, bucket: str) -> dict[str, str]:
    """The record of a bucket: the digest of its index entry, and a stamp of its files.

    The stamp is a digest of the sizes and times of change of all shards.
    """
    index = read_index(folder)
    shards = index["buckets"][bucket]["shards"]
    files = [folder / shard["file"] for shard in shards]
    status = [(file.name, file.stat()) for file in files if file.is_file()]
    stamp = [(name, found.st_size, found.st_mtime_ns) for name, found in status]
    return {
        "folder": str(folder),
        "bucket": bucket,
        "sha256": _digest([index["encoding"], shards]),
        "stamp": _digest(stamp),
    }


def _changed_shard(part: Mapping[str, str]) -> str | None:
    """Compare the bytes of every shard of a bucket with the index; name the first that differs."""
    folder = Path(part["folder"])
    for shard in read_index(folder)["buckets"][part["bucket"]]["shards"]:
        path = folder / shard["file"]
        if file_digest(path) != shard["sha256"]:
            return f"{path}: expected the bytes that were encoded, got others; encode again"
    return None


def _file(path: Path, recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """The record of a file. Its bytes are read only if it is not the recorded file, unchanged."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    record = {"file": str(path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    if recorded and record.items() <= recorded.items():
        return dict(recorded)
    return record | {"sha256": file_digest(path)}


def weights_file(path: Path) -> Path:
    """Return the file of weights: of a checkpoint's folder, or the path itself."""
    return path / "model.safetensors" if path.is_dir() else path


def _weights(path: Path, recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """The record of weights: of their file and, if it is a checkpoint's, where the weights are from
    and the folder of the text encoder, which a checkpoint that is trained from them keeps."""
    record = _file(weights_file(path), recorded)
    if not path.is_dir():
        return record
    config = load_config(path)
    kept = {"converted": config["converted"]} if "converted" in config else {}
    if "text" in config:
        kept["text"] = str((path / config["text"]).resolve())
    return record | {"checkpoint": kept}


def _contents(parts: Sequence[Mapping[str, Any] | None]) -> list[tuple[str | None, str]]:
    """Buckets and digests of inputs, without the places where they are stored."""
    return [(part.get("bucket"), part["sha256"]) for part in parts if part]


def _names(parts: Sequence[Mapping[str, Any] | None]) -> str:
    named = [
        f"{part.get('folder') or part['file']} ({part['sha256'][:8]})" for part in parts if part
    ]
    return ", ".join(named) or "none"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
