"""Memory of a stream's cache, before there is one."""

import copy

import torch

from ..model.caches import CacheChoice
from ..model.config import FewStepConfig, SamplingConfig
from .generator import StreamingGenerator


def cache_bytes(generator: StreamingGenerator, name: str, dtype: torch.dtype) -> int:
    """Returns the bytes of keys, values and counters of one stream of a generator, with the cache
    of this name and a model of `dtype`. Nothing is allocated.

    Guidance doubles them, and a diffusion model has a cache for each time of its schedule.
    """
    transformer, sampling = copy.copy(generator.model.transformer), generator.sampling
    transformer.cache_choice = CacheChoice(name)
    size, place = generator.latent_size, {"dtype": dtype, "device": torch.device("meta")}
    if isinstance(sampling, SamplingConfig):
        return sampling.steps * transformer.new_cache(sampling.branches, size, **place).bytes
    if not isinstance(sampling, FewStepConfig):
        return transformer.new_cache(1, size, **place).bytes
    rows = 1 + len(sampling.negatives)
    found = transformer.new_cache(rows, size, **place).bytes
    if sampling.rolling:
        config = transformer.config
        unfinished = (len(sampling.times) - 1) * config.chunk * config.latent_channels
        found += transformer.new_cache(rows, size, pinned=False, **place).bytes
        found += rows * unfinished * size[0] * size[1] * dtype.itemsize
    return found
