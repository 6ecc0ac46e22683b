"""The transformer: counts, streaming == parallel, causality, prompts, ablations."""

import dataclasses

import pytest
import torch

from aapt.config import ModelConfig
from aapt.model import VideoTransformer
from aapt.recipes import aapt_8b
from aapt.student_forcing import StudentRollout, parallel_pass

from .helpers import CONFIG, PROMPTS, SIZE, controls, latents, tiny_model


def run_parallel(model, x, recycled, conditions, t=None):
    t = torch.ones(len(x), dtype=x.dtype) if t is None else t
    return model.transformer(x, recycled, *conditions, t)


@pytest.mark.parametrize("sink_distance", ["absolute", "clamped"])
def test_streaming_equals_parallel(sink_distance):
    """One frame at a time through the ring, far past its wrap (window 2, 9 frames)."""
    model = tiny_model(sink_distance=sink_distance)
    frames = 9
    x, recycled = latents(frames), latents(frames)
    conditions = model.conditions(controls(frames), PROMPTS, SIZE)
    with torch.no_grad():
        expected = run_parallel(model, x, recycled, conditions)
        rollout = StudentRollout(
            model.transformer, conditions.text, conditions.text_lens, recycled[:, :, :1]
        )
        time = torch.ones(2, dtype=x.dtype)
        for i in range(frames):
            at = slice(i, i + 1)
            out = model.transformer.step(
                x[:, :, at], recycled[:, :, at], conditions.condition[:, :, at], time, rollout.cache
            )
            torch.testing.assert_close(out, expected[:, :, at], rtol=1e-9, atol=1e-10)


def test_absolute_and_clamped_differ_only_past_the_window():
    frames = 6
    x, recycled = latents(frames), latents(frames)
    out = {}
    for distance in ("absolute", "clamped"):
        model = tiny_model(sink_distance=distance)
        conditions = model.conditions(controls(frames) * 0, PROMPTS, SIZE)
        out[distance] = run_parallel(model, x, recycled, conditions)
    same = CONFIG.window_frames + 2  # distances 0 .. N + 1 are not clamped
    torch.testing.assert_close(out["absolute"][:, :, :same], out["clamped"][:, :, :same])
    assert (out["absolute"] - out["clamped"])[:, :, same:].abs().max() > 1e-6


def test_frames_see_no_future():
    model = tiny_model()
    x, recycled, conditions = latents(5), latents(5), None
    conditions = model.conditions(controls(5), PROMPTS, SIZE)
    before = run_parallel(model, x, recycled, conditions)
    x[:, :, 3] += 1
    after = run_parallel(model, x, recycled, conditions)
    torch.testing.assert_close(before[:, :, :3], after[:, :, :3], rtol=0, atol=1e-12)
    assert (before - after)[:, :, 3].abs().max() > 1e-4


def test_text_lens_hide_the_padding():
    model = tiny_model()
    x, recycled = latents(3), latents(3)
    conditions = model.conditions(controls(3), PROMPTS, SIZE)
    text = conditions.text.clone()
    text[0, conditions.text_lens[0] :] += 5
    changed = conditions._replace(text=text)
    torch.testing.assert_close(
        run_parallel(model, x, recycled, conditions),
        run_parallel(model, x, recycled, changed),
        rtol=0,
        atol=1e-12,
    )


def test_text_stream_alone_gives_the_joint_pass_its_keys():
    """The streaming path computes text once; a prompt must act as it does in training."""
    model = tiny_model()
    conditions = model.conditions(controls(1), PROMPTS, SIZE)
    x, recycled = latents(1), latents(1)
    other = model.conditions(controls(1) * 0, ["zz", "y"], SIZE)
    out = run_parallel(model, x, recycled, conditions)
    swapped = run_parallel(
        model, x, recycled, conditions._replace(text=other.text, text_lens=other.text_lens)
    )
    assert (out - swapped).abs().max() > 1e-5


def test_no_recycling_uses_the_user_frame_alone():
    model = tiny_model(recycle=False)
    x, recycled = latents(4), latents(4)
    conditions = model.conditions(controls(4), PROMPTS, SIZE)
    before = run_parallel(model, x, recycled, conditions)
    later = recycled.clone()
    later[:, :, 1:] += 1
    torch.testing.assert_close(before, run_parallel(model, x, later, conditions))
    first = recycled.clone()
    first[:, :, 0] += 1
    assert (before - run_parallel(model, x, first, conditions)).abs().max() > 1e-4


def test_student_forcing_gradient_equals_the_recurrent_one():
    """SPEC 8: two passes give the gradient of back-propagating through the cached rollout.

    The recurrent reference is written out here: each step is a parallel pass over all frames so
    far whose recycled inputs are the detached outputs; its last frame is the step's output.
    """
    frames = 6
    model = tiny_model(sink_distance="clamped", residual_head=True, output_clamp=4.0)
    first, noise, weight = latents(1), latents(frames), latents(frames)
    motion = controls(frames)

    conditions = model.conditions(motion, PROMPTS, SIZE)
    outputs, recycled = [], [first]
    time = torch.ones(2, dtype=first.dtype)
    from aapt.model import clean

    for i in range(frames):
        inputs = torch.cat(recycled, dim=2)
        x = noise[:, :, : i + 1]
        seen = conditions._replace(condition=conditions.condition[:, :, : i + 1])
        output = clean(model.config, run_parallel(model, x, inputs, seen), x, inputs, time)
        outputs.append(output[:, :, -1:])
        recycled.append(outputs[-1].detach())
    (torch.cat(outputs, dim=2) * weight).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    conditions = model.conditions(motion, PROMPTS, SIZE)
    rollout = StudentRollout(model.transformer, conditions.text, conditions.text_lens, first)
    segment = rollout.roll(noise, conditions.condition)
    fake = parallel_pass(model.transformer, segment, conditions.text, conditions.text_lens)
    torch.testing.assert_close(fake, torch.cat(outputs, dim=2), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(fake, segment.output, rtol=1e-9, atol=1e-10)
    (fake * weight).sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            scale = expected[name].norm().clamp(min=1e-12)
            assert (parameter.grad - expected[name]).norm() / scale < 1e-9, name
        else:
            assert parameter.grad is None or parameter.grad.abs().max() == 0, name


def test_later_segments_continue_from_the_cache():
    """Rolled in two segments, the parallel passes give what one long rollout gives."""
    model = tiny_model(sink_distance="clamped")
    frames = 8
    noise, first = latents(frames), latents(1)
    conditions = model.conditions(controls(frames), PROMPTS, SIZE)
    rays, text, text_lens = conditions
    with torch.no_grad():
        whole = StudentRollout(model.transformer, text, text_lens, first).roll(noise, rays).output
    rollout = StudentRollout(model.transformer, text, text_lens, first)
    for frames_of in (slice(0, 5), slice(5, 8)):
        segment = rollout.roll(noise[:, :, frames_of], rays[:, :, frames_of])
        fake = parallel_pass(model.transformer, segment, text, text_lens)
        torch.testing.assert_close(fake, whole[:, :, frames_of], rtol=1e-9, atol=1e-10)
    fake.sum().backward()
    assert model.transformer.video_in.weight.grad.abs().max() > 0


def test_checkpointing_changes_nothing():
    model = tiny_model()
    x, recycled = latents(3), latents(3)
    conditions = model.conditions(controls(3), PROMPTS, SIZE)
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        model.transformer.checkpoint_blocks = checkpointed
        conditions = model.conditions(controls(3) * 0, PROMPTS, SIZE)
        run_parallel(model, x, recycled, conditions).square().sum().backward()
        grads.append(model.transformer.blocks[0].video.qkv.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_aapt_8b_has_the_papers_size():
    """SPEC 2: 8.15 B in the block matrices of both streams, 8.2-8.35 B in all."""
    with torch.device("meta"):
        model = VideoTransformer(aapt_8b())
    matrices = sum(
        p.numel()
        for n, p in model.named_parameters()
        if n.startswith("blocks.") and p.ndim == 2 and "modulation_bias" not in n
    )
    dropped = 9 * 3072**2  # the last text projection and MLP
    assert matrices + dropped == pytest.approx(8.15e9, rel=0.001)
    assert 8.1e9 < sum(p.numel() for p in model.parameters()) < 8.35e9
    assert aapt_8b().token_grid(52, 92) == (26, 46)


def test_bad_input_is_named():
    model = tiny_model()
    conditions = model.conditions(controls(3), PROMPTS, SIZE)
    with pytest.raises(ValueError, match="expected 32 channels together, got 8"):
        run_parallel(model, latents(3), latents(3), conditions._replace(condition=None))
    with pytest.raises(ValueError, match="latent size: expected multiples of 2, got 5 x 6"):
        model.transformer(
            torch.randn(2, 4, 1, 5, 6), None, None, conditions.text, conditions.text_lens, None
        )
    with pytest.raises(ValueError, match="prefix: expected keys and values exactly when"):
        model.transformer(
            latents(3), latents(3), *conditions, torch.ones(2).double(), start_frame=3
        )
    with pytest.raises(ValueError, match="width: expected heads"):
        dataclasses.replace(CONFIG, width=30)
    with pytest.raises(ValueError, match="rope_axes: expected three even numbers"):
        ModelConfig(**{**dataclasses.asdict(CONFIG), "rope_axes": (4, 4, 4)})
