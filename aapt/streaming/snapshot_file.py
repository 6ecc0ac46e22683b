"""A snapshot as a safetensors file, so that another process can go on from it."""

import json
from dataclasses import replace

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..model.caches import MODEL, check_name, check_same, name_of
from ..model.transformer import KVCache
from .snapshot import Snapshot

FACTS = ("seed", "steps", "prompt")
MOST_STEPS = 2**31


def snapshot_tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    """Returns the tensors of a snapshot by name, not copied. ValueError for a stream opened with
    `recache`, whose past is not stored."""
    if snapshot.past is not None:
        raise ValueError("snapshot: expected one of a stream without recache, got one with it")
    tensors = {"latent": snapshot.latent}
    tensors |= {f"cache.{name}": tensor for name, tensor in snapshot.cache.tensors().items()}
    tensors |= {f"decoder.{n}": tensor for n, tensor in enumerate(snapshot.decoder.states)}
    tensors |= {f"skeleton.{n}": tensor for n, tensor in enumerate(snapshot.skeleton)}
    return tensors


def write_snapshot(snapshot: Snapshot, more: dict[str, Tensor], facts: dict[str, str]) -> bytes:
    """Returns the file of a snapshot, with more tensors and facts of the caller in it."""
    tensors = {name: x.cpu().contiguous() for name, x in snapshot_tensors(snapshot).items()}
    own = {name: getattr(snapshot, name) for name in FACTS}
    own |= {"decoded": snapshot.decoder.frames, "cache": name_of(snapshot.cache)}
    return safetensors.torch.save(tensors | more, {"snapshot": json.dumps(own), **facts})


def read_file(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and facts of a safetensors file in memory. ValueError for any other."""
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        facts = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"snapshot: expected a safetensors file: {error}"[:160]) from None
    return tensors, facts


@torch.no_grad()
def load_snapshot(like: Snapshot, tensors: dict[str, Tensor], facts: dict[str, str]) -> Snapshot:
    """Returns a snapshot made of a file's tensors and facts.

    like: a snapshot of the stream that it is for, which gives names, shapes and dtypes. ValueError
    names the tensor that is missing or has another form, and what it should be; CacheError the
    cache, if it is another.
    """
    try:
        own = json.loads(facts["snapshot"])
        seed, steps, decoded = (int(own[name]) for name in ("seed", "steps", "decoded"))
        prompt, name = str(own["prompt"]), str(own.get("cache", MODEL))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            "snapshot: expected seed, steps, prompt and decoded in its facts"
        ) from None
    if min(seed, steps, decoded) < 0 or max(seed, steps, decoded) >= 2**63:
        raise ValueError(f"snapshot: expected counts below 2**63, got {seed, steps, decoded}")
    mend = f"restore it in a stream of cache {check_name(name)}"
    check_same("snapshot", name_of(like.cache), name, mend)
    with torch.inference_mode(False):
        cache = like.cache.clone()
        decoder = replace(
            like.decoder, frames=decoded, states=tuple(map(torch.clone, like.decoder.states))
        )
        made = replace(
            like,
            seed=seed,
            steps=steps,
            prompt=prompt,
            latent=like.latent.clone(),
            cache=cache,
            decoder=decoder,
            skeleton=tuple(map(torch.clone, like.skeleton)),
        )
        for name, ours in snapshot_tensors(made).items():
            theirs = tensors.get(name)
            if theirs is None or (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
                given = "none" if theirs is None else f"{tuple(theirs.shape)} {theirs.dtype}"
                raise ValueError(
                    f"snapshot: expected {name} {tuple(ours.shape)} {ours.dtype}, got {given}"
                )
            ours.copy_(theirs)
    for part in getattr(made.cache, "parts", (made.cache,)):
        _check_counters(part)
    return made


def _check_counters(cache: KVCache) -> None:
    """Raises ValueError unless the counters keep every read within the cache."""
    step, lens = int(cache.step), cache.text_lens
    if not 0 <= step < MOST_STEPS:
        raise ValueError(f"snapshot: expected cache.step below {MOST_STEPS}, got {step}")
    finished = max(0, step - cache.sink_frames)  # frames of the past
    if cache.past is not None and int(cache.past.step) != finished:
        raise ValueError(
            f"snapshot: expected cache.past.step {finished} at step {step}, "
            f"got {int(cache.past.step)}"
        )
    if lens.min() < 0 or lens.max() > cache.text_tokens:
        raise ValueError(
            f"snapshot: expected cache.text_lens up to {cache.text_tokens}, got {lens.tolist()}"
        )
