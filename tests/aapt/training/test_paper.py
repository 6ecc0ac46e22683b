"""`paper_8b` against every number of the paper (docs/method.md#1, #2, #6, #7, #8 and #12)."""

import dataclasses

import pytest
import torch

from aapt.model.presets import aapt_8b
from aapt.runs import plan
from aapt.training.curriculum import Source
from aapt.training.recipes import paper_8b, paper_8b_640

from ..helpers import CONFIG

WIDE, LARGE, SMALL = "736x416", "1280x720", "640x352"
TALL = "720x1280"
OFF = {  # our switches for small models (docs/method.md#12)
    "whole_clips": False,
    "mixed_with": None,
    "mixed_share": 0.0,
    "lead_segments": 0,
    "lead_power": 1,
    "discriminator_warmup": 0,  # one update of the discriminator to one of the generator
    "max_norm": None,
    "corruption": None,
    "mismatch": 0,
    "mismatched_gain": 0,
    "regression": 0,
    "regression_segments": None,
    "palette": 0,
    "rows": 0,
    "adversarial": 1,
    "noised": False,
    "frozen_trunk": False,
    "discriminator_lora": None,
}
# Every weight trains, with moments in float32, in the memory of the GPU.
WHOLE = {"lora": None, "state_bits": 32, "offload": False}


def constant(learning_rate):
    return {"learning_rate": learning_rate, "warmup": 0, "decay": "constant"}


def clips(name, frames, shortest=None):
    window = {"frames": frames, "shortest": shortest, "first_frame": "always"}
    return {"clips": name, "weight": 1, **window}


def phase(steps, batch, *sources):
    return {"steps": steps, "batch": batch, "sources": sources}


LAST_SOURCES = clips(WIDE, 90, shortest=30), clips(LARGE, 30)  # six latent frames to a second
ADAM = {"schedule": constant(1e-5), "weight_decay": 0.01, "betas": (0.9, 0.999), "max_norm": None}
DIFFUSION = {
    **ADAM,
    **WHOLE,
    "curriculum": {
        "phases": (
            phase(20_000, 256, clips(WIDE, 30)),
            phase(6_000, 128, clips(WIDE, 30), clips(LARGE, 30)),
            phase(4_000, 32, *LAST_SOURCES),
        )
    },
    "start": None,
    "forcing": "teacher",
    "shift": 24,
    "caption_dropout": 0.1,
    "muon": False,
    "average": None,
    "sampling_steps": 32,
    "guidance": 10,
}
CONSISTENCY = {
    **ADAM,
    **WHOLE,
    "curriculum": {"phases": (phase(5_000, 32, *LAST_SOURCES),)},
    "start": "diffusion",
    "forcing": "teacher",
    "shift": 24,
    "times": 32,
    "distance": "pseudo_huber",
    "step_weight": False,
}
ADVERSARIAL = {
    **OFF,
    **WHOLE,
    "clips": (clips(WIDE, 60, shortest=30), clips(LARGE, 30)),
    "steps": 500,
    "batch": 256,
    "segment_frames": None,
    "shortest_segment": None,
    "segments": 1,
    "overlap_frames": 0,
    "overlap_loss": False,
    "first_frame": "always",
    "generator_schedule": constant(3e-6),
    "discriminator_schedule": constant(3e-6),
    "start": "consistency",
    "discriminator_start": "diffusion",
    "loss": "relativistic",
    "penalized": "both",
    "perturb_known": True,
    "penalty": 1000,
    "perturbation": 0.1,
    "alpha": 0.9,
    "average": 0.995,
    "forcing": "student",
    "judgement": "frame",
    "pooling": "query",
    "discriminator_recycled": True,
    "discriminator_layout": "targets",
}
EXTENSION = {
    **ADVERSARIAL,
    "batch": 64,
    "segments": 2,
    "overlap_frames": 6,
    "overlap_loss": True,
    "generator_schedule": constant(1e-5),
    "discriminator_schedule": constant(1e-5),
    "start": "adversarial",
    "discriminator_start": "adversarial",
}
STAGES = {
    "diffusion": DIFFUSION,
    "consistency": CONSISTENCY,
    "adversarial": ADVERSARIAL,
    "extension": EXTENSION,
    "extension-5": {
        **EXTENSION,
        "segments": 6,
        "start": "extension",
        "discriminator_start": "extension",
    },
}


@pytest.mark.parametrize("name", STAGES)
def test_every_number_of_a_stage(name):
    assert dataclasses.asdict(paper_8b().stages[name]) == STAGES[name]


def test_stages_follow_each_other():
    recipe = paper_8b()
    assert list(recipe.stages) == list(STAGES)
    assert recipe.model == aapt_8b() and recipe.camera is None and recipe.data == {}
    assert recipe.raw_starts


def test_the_supplement_trains_stage_three_at_one_size():
    recipe, other = paper_8b_640(), paper_8b()
    for name, stage in recipe.stages.items():
        expected = other.stages[name]
        if name not in ("diffusion", "consistency"):
            source = Source(SMALL, frames=60, shortest=30)
            expected = dataclasses.replace(expected, clips=(source,))
        assert stage == expected
    assert dataclasses.replace(recipe, name="paper-8b", stages=other.stages) == other


def test_every_number_of_the_generator():
    expected = {
        "width": 3072,
        "heads": 24,
        "head_dim": 128,
        "depth": 36,
        "mlp_ratio": 4,
        "latent_channels": 16,
        "condition_channels": 0,
        "patch": 2,
        "window_frames": 30,
        "grid_windows": ((45, 80, 15),),
        "reference_grid": (26, 46),
        "sink_distance": "absolute",
        "recycle": True,
        "residual_head": False,
        "output_clamp": None,
    }
    model = aapt_8b()
    assert {name: getattr(model, name) for name in expected} == expected
    assert model.input_channels == 32


@pytest.mark.parametrize(
    ("clips", "size", "tokens", "window"),
    [
        (WIDE, (52, 92), 1196, 30),
        (LARGE, (90, 160), 3600, 15),
        (TALL, (160, 90), 3600, 15),
        (SMALL, (44, 80), 880, 30),
    ],
)
def test_resolutions(clips, size, tokens, window):
    recipe = paper_8b()
    assert plan.latent_size(recipe, clips) == size
    rows, columns = recipe.model.token_grid(*size)
    assert rows * columns == tokens and recipe.model.window((rows, columns)) == window


def test_seconds_of_a_rollout():
    """736x416 and 640x352 are rolled out as long as the paper says; 1280x720 starts from 5 s."""
    seconds = {}
    for name in ("adversarial", "extension", "extension-5"):
        (load,) = plan.workloads(paper_8b_640(), name, paper_8b_640().stages[name])
        (large,) = plan.workloads(paper_8b(), name, paper_8b().stages[name])
        assert large.size == (90, 160)
        seconds[name] = load.total_frames / 6, large.total_frames / 6
    assert seconds == {"adversarial": (10, 5), "extension": (19, 9), "extension-5": (55, 25)}


def test_the_optimizers_have_these_numbers():
    """The stages build them around a smaller model."""
    small = dataclasses.replace(CONFIG, condition_channels=0)
    recipe = dataclasses.replace(paper_8b(), model=small)
    for name in recipe.stages:
        for network, part in plan.meta_stage(recipe, name).trained.items():
            (group,) = part.optimizer.param_groups
            if name in ("diffusion", "consistency"):
                assert type(part.optimizer) is torch.optim.AdamW and part.average is None
                assert group["weight_decay"] == 0.01 and group["betas"] == (0.9, 0.999)
            else:
                assert type(part.optimizer) is torch.optim.RMSprop and group["alpha"] == 0.9
                assert group["weight_decay"] == group["momentum"] == 0
                decay = part.average and part.average.decay
                assert decay == {"generator": 0.995, "discriminator": None}[network]


def test_heads_of_the_discriminator():
    """They follow blocks 16, 26 and 36 of 36 (docs/method.md#12)."""
    model = dataclasses.replace(CONFIG, condition_channels=0, depth=aapt_8b().depth)
    recipe = dataclasses.replace(paper_8b(), model=model)
    stage = plan.meta_stage(recipe, "adversarial")
    assert [tap + 1 for tap in stage.discriminator.taps] == [16, 26, 36]
