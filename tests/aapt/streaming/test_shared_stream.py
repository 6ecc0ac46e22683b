"""A stream whose frames are shared among ranks, against one rank, through the public interface."""

import numpy as np
import pytest

from aapt import Control, StreamingGenerator
from aapt.model.ulysses import Ulysses
from aapt.runs.parallel import Parallel

from ..runs import ranks
from .test_generator import HEIGHT, WIDTH, build

PICTURE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def make(cache: str = "model") -> StreamingGenerator:
    model, vae = build()
    generator = StreamingGenerator(model.double(), vae.double(), height=HEIGHT, width=WIDTH)
    generator.use_cache(cache)
    return generator


def walk(generator: StreamingGenerator) -> np.ndarray:
    """Return the pixels of a stream beyond its window, with a new prompt on the way."""
    with generator.open(PICTURE, "ab", seed=3) as stream:
        frames = [stream.step(Control(forward=1.0, yaw=0.1 * i)) for i in range(5)]
        stream.prompt = "cd"
        snapshot = stream.snapshot()
        frames.append(stream.step(Control(forward=1.0)))
        stream.restore(snapshot)
        assert np.array_equal(stream.step(Control(forward=1.0)), frames[-1])
    return np.concatenate(frames)


def shared(context: int, cache: str) -> np.ndarray:
    parallel = Parallel.from_environment(context)
    generator = make(cache)
    generator.open(PICTURE, "ab").close()  # its memory has all heads
    generator.share_tokens(parallel.context)
    frames = walk(generator)
    parallel.wait()
    return frames


@pytest.mark.parametrize("cache", ["model", "float8-past"])
def test_two_ranks_make_the_frames_of_one(cache):
    expected = walk(make(cache))
    for frames in ranks.run(2, shared, 2, cache):
        assert frames.shape == expected.shape == (24, HEIGHT, WIDTH, 3)
        # Sums in another order may round a pixel the other way
        assert np.abs(frames.astype(int) - expected.astype(int)).max() <= 1
        assert (frames != expected).mean() < 1e-3


def test_a_group_that_does_not_divide_the_heads_is_refused():
    three = Ulysses()
    three.size = 3
    with pytest.raises(ValueError, match="^context: expected a divisor of the model's 2 heads, "):
        make().share_tokens(three)
