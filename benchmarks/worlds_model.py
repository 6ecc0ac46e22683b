"""Predicts the minutes of `make gpu PART=worlds`, stage by stage; nothing is measured.

    python -m benchmarks.worlds_model

Counted: the operations of one update that have a kernel, forward and backward, on tiny images and
two clips, because their number depends on neither. Operations of arithmetic are counted by
`aapt.runs.plan`. Assumed: the host's time per operation, and the share of the peak that products of
this size reach. An update takes the longer of both.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

from aapt.evaluate.breakdown import has_kernel
from aapt.runs.build_stage import build_stage
from aapt.runs.loop import RunOptions, parts
from aapt.runs.parallel import Parallel
from aapt.runs.plan import H100, plan
from aapt.runs.run import Run, run
from aapt.training.recipe import Recipe
from aapt.training.tiny_recipes import on_a_gpu, tiny_world

CLIPS, UPDATES = 8, 0.8  # times the clips per update, share of the updates
OPERATION_SECONDS = 10e-6  # of the host, for an eager operation with its share of autograd: assumed
PEAK_SHARE = 0.1  # of the peak, in products of 192 channels: assumed


class Counter(TorchDispatchMode):
    """Counts the operations that have a kernel."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += has_kernel(function)
        return function(*args, **(kwargs or {}))


def operations(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """Yield every stage of a generator with the operations of its last update.

    The stages run one update each, in a temporary folder.
    """
    options = RunOptions(save_every=None, sample_every=None)
    with tempfile.TemporaryDirectory() as folder:
        for name, config in recipe.stages.items():
            made = [*recipe.data] if name == next(iter(recipe.stages)) else []
            first = ["encoder", *made, name] if made else [name]
            run(recipe, Path(folder), first, workers=1, options=options, report=lambda line: None)
            worker = Run(recipe, Path(folder), options=options)
            stage = build_stage(config, worker)
            with Counter() as counter:
                for random, share in parts(stage, 0, stage.steps - 1, Parallel.single(), None):
                    stage.accumulate(worker.sets, random, stage.steps - 1, share)
                stage.update(stage.steps - 1)
            yield name, counter.operations


def main() -> None:
    from .bench_worlds import cut_down

    recipe = on_a_gpu(tiny_world(), CLIPS, UPDATES)
    arithmetic = {each.workload.stage: each.flops for each in plan(recipe, 1)}
    total = 0.0
    print(f"{'stage':20} updates  operations  seconds per update  minutes")
    for name, count in operations(as_long(cut_down(recipe), recipe)):
        config = recipe.stages[name]
        updates = config.curriculum.steps if hasattr(config, "curriculum") else config.steps
        host = count * OPERATION_SECONDS
        seconds = max(host, arithmetic[name] / (H100.flops * PEAK_SHARE))
        total += updates * seconds
        print(f"{name:20} {updates:7} {count:11} {seconds:19.3f} {updates * seconds / 60:8.1f}")
    print(f"{'all':60} {total / 60:8.1f}")


def as_long(small: Recipe, recipe: Recipe) -> Recipe:
    """A cut-down recipe with the frames and segments of the whole one, and clips that hold them."""
    frames = {name: data.latent_frames for name, data in recipe.data.items()}
    data = {n: replace(each, latent_frames=frames[n]) for n, each in small.data.items()}
    stages = {}
    for name, config in small.stages.items():
        whole = recipe.stages[name]
        if hasattr(config, "curriculum"):
            phases = [replace(p, batch=2, steps=1) for p in whole.curriculum.phases]
            curriculum = replace(whole.curriculum, phases=tuple(phases))
            stages[name] = replace(config, curriculum=curriculum)
        else:
            changes = {"segment_frames": whole.segment_frames}
            stages[name] = replace(config, **changes)
    return replace(small, data=data, stages=stages)


if __name__ == "__main__":
    main()
