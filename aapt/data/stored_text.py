"""Embeddings of captions that `aapt encode --text` has stored beside the latents."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .latent_shards import DataError, read_index


class StoredText:
    """Looks up the embeddings of the captions of encoded clips, and of the empty prompt.

    An instance is a `UMT5TextEncoder.source`, so that no trainer holds the text encoder. Only the
    places of the embeddings are in memory; the embeddings are read when they are asked for.

    folders: of `aapt encode --text`. DataError if one holds no embeddings, if two were made by
    different encoders, or if a shard is damaged.
    """

    def __init__(self, folders: Sequence[str | Path]):
        self.encoder: dict[str, Any] | None = None
        self._places: dict[str, tuple[Path, int, int]] = {}
        for folder in map(Path, folders):
            index = read_index(folder)
            encoder = index["encoding"].get("text")
            if encoder is None:
                raise DataError(
                    f"{folder}: expected embeddings of captions, got none; encode the videos anew "
                    "with --text FOLDER"
                )
            if self.encoder not in (None, encoder):
                raise DataError(
                    f"{folder}: expected embeddings of one text encoder, got {encoder} after "
                    f"{self.encoder}; encode with one --text"
                )
            self.encoder = encoder
            for bucket in index["buckets"].values():
                for shard in bucket["shards"]:
                    self._add(folder / shard["file"])

    def _add(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                captions = json.loads(shard.metadata()["texts"])
                ends = shard.get_tensor("text_ends").tolist()
        except (SafetensorError, OSError, LookupError, ValueError) as error:
            raise DataError(f"{path}: expected a whole shard with embeddings: {error}") from None
        for caption, start, end in zip(captions, [0, *ends], ends):
            self._places.setdefault(caption, (path, start, end))

    def __deepcopy__(self, memo: dict) -> "StoredText":
        return self  # copies of a model read the embeddings from here too

    def __call__(self, prompt: str) -> Tensor:
        """Embeddings (n, width) of a caption's n tokens. DataError for an unknown caption."""
        if prompt not in self._places:
            raise DataError(
                f"text: expected a caption of the encoded clips or the empty prompt, got {prompt!r}"
            )
        path, start, end = self._places[prompt]
        try:
            with safe_open(path, framework="pt") as shard:
                return shard.get_slice("text")[start:end]
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: expected a whole shard with embeddings: {error}") from None
