"""Launches of a streaming step, counted: every operation but views is one kernel on a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aapt.model.float8 import quantise_blocks
from aapt.model.layers import CacheStep, Residual
from aapt.streaming.student import StudentRollout

from ..helpers import PROMPTS, SIZE, controls, latents, tiny_model

VIEWS = ("view", "_unsafe_view", "t", "unbind", "select", "alias", "detach", "unsqueeze", "slice")
VIEWS += ("expand", "permute")


class Launches(TorchDispatchMode):
    """Names of the operations that are no views, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def make_rollout(in_8_bits=False):
    model = tiny_model()
    if in_8_bits:
        quantise_blocks(model.transformer)
    conditions = model.conditions(controls(1), PROMPTS, SIZE)
    recycled = latents(1)
    text = (conditions.text, conditions.text_lens)
    with torch.no_grad():
        return StudentRollout(model.transformer, *text, recycled), conditions.condition


def launches_of_a_block(rollout, condition) -> list[str]:
    model, constants = rollout.model, rollout.constants
    index = rollout.cache.step[None]
    with torch.no_grad():
        video = model.patchify(latents(1), rollout.last, condition, index)
        rotation = model.positions(index, model.config.token_grid(*SIZE), constants.places)
        caches = [CacheStep(rollout.cache, rotation)]
        updated = Residual(video, torch.randn_like(video), constants.modulation[0][2])
        with Launches() as launches:
            model.blocks[1].step(updated, constants.modulation[1], caches, 1)
    return launches.names


def test_nine_launches_per_block():
    names = launches_of_a_block(*make_rollout())
    attention = ["modulated_norm", "addmm", "kv_append", "cached_attention", "addmm"]
    assert names == [*attention, "modulated_norm", "mm", "bias_gelu", "addmm"]


def test_ten_launches_per_block_in_8_bits():
    """Only what attention returns is rounded in a launch of its own; products are emulated here."""
    names = launches_of_a_block(*make_rollout(in_8_bits=True))
    ours = [name for name in names if hasattr(torch.ops.aapt, name)]
    attention = ["modulated_norm_e4m3", "kv_append", "cached_attention", "quantise_rows"]
    assert ours == [*attention, "modulated_norm_e4m3", "bias_gelu_e4m3"]
    assert names.count("mm") + names.count("addmm") == 4


def test_a_step_computes_nothing_that_never_changes():
    """Beside its blocks a step has the frame's tokens, its time in the rotation, and the end."""
    rollout, condition = make_rollout()
    depth, noise = rollout.model.config.depth, latents(1)
    with torch.no_grad(), Launches() as launches:
        rollout.infer(noise, rollout.last, condition)
    for name in ("silu", "arange", "exp", "rsqrt", "layer_norm", "native_layer_norm", "gelu"):
        assert name not in launches.names
    assert launches.names.count("modulated_norm") == 2 * depth + 1
    assert len(launches.names) - 9 * depth <= 17


def test_a_prompt_keeps_the_addresses_of_constants():
    """A captured step reads them. Their values follow the weights."""
    rollout, condition = make_rollout()
    before = [x.data_ptr() for x in rollout.constants.tensors()]
    old = [x.clone() for x in rollout.constants.tensors()]
    config = rollout.model.config
    text = torch.randn(2, config.text_tokens, config.text_width, dtype=rollout.last.dtype)
    with torch.no_grad():
        rollout.model.out_modulation.bias.add_(1)
        rollout.set_text(text, torch.ones(2, dtype=torch.int64))
    assert [x.data_ptr() for x in rollout.constants.tensors()] == before
    shift, scale = rollout.constants.out_modulation
    changed = [not torch.equal(x, y) for x, y in zip(rollout.constants.tensors(), old, strict=True)]
    assert sum(changed) == 2 and shift.isfinite().all() and scale.isfinite().all()
