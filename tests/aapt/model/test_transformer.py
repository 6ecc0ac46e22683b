"""The transformer: counts, streaming == parallel, causality, prompts, ablations."""

import dataclasses

import pytest
import torch
from torch import Tensor

import aapt.model.layers
from aapt.model.config import ModelConfig
from aapt.model.layers import Residual
from aapt.model.mmdit import MMDiT
from aapt.model.presets import aapt_8b
from aapt.model.transformer import clean, velocity
from aapt.streaming.student import StudentRollout
from aapt.training.forcing import parallel_pass

from ..helpers import CONFIG, PROMPTS, SIZE, controls, latents, tiny_model, wan_transformer


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


def test_text_stream_alone_gives_the_joint_pass_its_keys(monkeypatch):
    """The streaming path computes text once: block for block what the joint pass attends to."""
    model = tiny_model()
    conditions = model.conditions(controls(3), PROMPTS, SIZE)
    time = torch.full((2,), 0.7).double()
    pairs = model.transformer.encode_text(conditions.text, conditions.text_lens, time)
    attended, attend = [], aapt.model.layers.block_causal_attention

    def record(q, k, v, layout, **options):
        attended.append((k[:, : layout.text_tokens], v[:, : layout.text_tokens]))
        return attend(q, k, v, layout, **options)

    monkeypatch.setattr(aapt.model.layers, "block_causal_attention", record)
    run_parallel(model, latents(3), latents(3), conditions, time)
    assert len(pairs) == len(attended) == CONFIG.depth
    for alone, joint in zip(pairs, attended, strict=True):
        torch.testing.assert_close(alone, joint, rtol=1e-12, atol=1e-12)


def test_prompts_matter():
    model = tiny_model()
    conditions = model.conditions(controls(1), PROMPTS, SIZE)
    x, recycled = latents(1), latents(1)
    _, text, text_lens = model.conditions(controls(1), ["zz", "y"], SIZE)
    out = run_parallel(model, x, recycled, conditions)
    other = run_parallel(model, x, recycled, conditions._replace(text=text, text_lens=text_lens))
    assert (out - other).flatten(1).abs().amax(1).min() > 1e-5


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


def test_outputs_become_velocities_and_clean_frames():
    """v = net, or x_t - x_prev - net; x_0 = x_t - t v, softly clamped (docs/method.md#2, #7 and
    #12)."""
    output, x_t, recycled = latents(3), latents(3), latents(3)
    t = torch.tensor([0.25, 1.0]).double()
    plain, residual = CONFIG, dataclasses.replace(CONFIG, residual_head=True)
    torch.testing.assert_close(velocity(plain, output, x_t, recycled), output)
    torch.testing.assert_close(velocity(residual, output, x_t, recycled), x_t - recycled - output)
    x_0 = clean(plain, output, x_t, recycled, t)
    torch.testing.assert_close(x_0[0], x_t[0] - 0.25 * output[0])
    torch.testing.assert_close(x_0[1], x_t[1] - output[1])
    x_0 = clean(residual, output, x_t, recycled, t)
    torch.testing.assert_close(x_0[0], 0.75 * x_t[0] + 0.25 * (recycled + output)[0])
    torch.testing.assert_close(x_0[1], (recycled + output)[1])
    clamped = clean(dataclasses.replace(plain, output_clamp=2.0), output, x_t, recycled, t)
    torch.testing.assert_close(clamped, 2 * torch.tanh(clean(plain, output, x_t, recycled, t) / 2))


def norm_and_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    (a, b), cos, sin = x.chunk(2, dim=-1), cos[:, None].double(), sin[:, None].double()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def recurrent_frame(net, x, recycled, condition, index, words, text_lens, past) -> Tensor:
    """Frame `index` against the text `words` (pairs of every block) and the frames in `past`
    (pairs of every block of every frame), which it is appended to. The raw output."""
    frame = torch.tensor([index])
    at = net.positions(frame, net.config.token_grid(*SIZE))
    time, modulation, _ = net.modulations(torch.ones(2).double())
    video = net.patchify(x, recycled, condition, frame)
    past.append([])
    recent = range(max(1, index - net.config.window_frames), index + 1) if index else ()
    for layer, block in enumerate(net.blocks):
        weights = block.video
        shared = weights.modulation(modulation)
        _, normed = Residual(video).norm(*shared[:2], weights.qkv)
        q, k, v = weights.project(normed).unbind(2)
        past[index].append((norm_and_rotate(k, weights.k_norm, at.cos, at.sin), v))
        sink_cos, sink_sin = (at.cos, at.sin) if at.cos_sink is None else (at.cos_sink, at.sin_sink)
        q_sink = norm_and_rotate(q, weights.q_norm, sink_cos, sink_sin)
        q = norm_and_rotate(q, weights.q_norm, at.cos, at.sin)
        text_k, text_v = words[layer]
        scores = [torch.einsum("bqhd,bkhd->bhqk", q, text_k)]
        hidden = torch.arange(text_k.shape[1]) >= text_lens[:, None]
        scores[0] = scores[0].masked_fill(hidden[:, None, None], -torch.inf)
        scores.append(torch.einsum("bqhd,bkhd->bhqk", q_sink, past[0][layer][0]))
        scores += [torch.einsum("bqhd,bkhd->bhqk", q, past[i][layer][0]) for i in recent]
        values = torch.cat([text_v, past[0][layer][1], *(past[i][layer][1] for i in recent)], 1)
        share = (torch.cat(scores, -1) / net.config.head_dim**0.5).softmax(-1)
        video = weights.mix(video, torch.einsum("bhqk,bkhd->bqhd", share, values), shared).sum()
    return net.unpatchify(Residual(video), net.output_modulation(time), (1, *SIZE))


def gradients(model) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(
    ("segments", "sink_distance"),
    [((6,), "clamped"), ((4, 3), "clamped"), ((4, 1, 3), "absolute")],
)
def test_student_forcing_gradient_equals_the_recurrent_one(segments, sink_distance):
    """docs/method.md#8: two passes give the value and the gradient of back-propagating through the
    cached rollout, in one segment and over several with the visual past detached in between.

    The recurrent reference is written out here, frame by frame with plain softmax. Text is
    embedded anew with gradient in every segment, and every recycled frame is detached.
    """
    model = tiny_model(sink_distance=sink_distance, residual_head=True, output_clamp=4.0)
    net, frames = model.transformer, sum(segments)
    first, noise, weight = latents(1), latents(frames), latents(frames)
    rays = model.conditions(controls(frames), PROMPTS, SIZE).condition
    time = torch.ones(2).double()

    outputs, past, last = [], [], first
    for count in segments:
        past = [[(k.detach(), v.detach()) for k, v in frame] for frame in past]
        text, text_lens = model.text_encoder(PROMPTS)
        words = net.encode_text(text, text_lens, time)
        loss = 0.0
        for i in range(len(past), len(past) + count):
            x = noise[:, :, i : i + 1]
            raw = recurrent_frame(net, x, last, rays[:, :, i : i + 1], i, words, text_lens, past)
            outputs.append(clean(model.config, raw, x, last, time))
            loss = loss + (outputs[-1] * weight[:, :, i : i + 1]).sum()
            last = outputs[-1].detach()
        loss.backward()
    expected = gradients(model)
    model.zero_grad()

    text, text_lens = model.text_encoder(PROMPTS)
    rollout = StudentRollout(net, text, text_lens, first)
    start = 0
    for count in segments:
        part = slice(start, start := start + count)
        segment = rollout.roll(noise[:, :, part], rays[:, :, part])
        fake = parallel_pass(net, segment, *model.text_encoder(PROMPTS))
        torch.testing.assert_close(fake, torch.cat(outputs[part], dim=2), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(fake, segment.output, rtol=1e-9, atol=1e-10)
        (fake * weight[:, :, part]).sum().backward()
    actual = gradients(model)
    assert set(actual) == set(expected) and "text_encoder.position" in actual
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() < 1e-9 * gradient.norm(), name


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
    """docs/method.md#2: 8.15 B in the block matrices of both streams, 8.2-8.35 B in all."""
    with torch.device("meta"):
        model = MMDiT(aapt_8b())
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


@pytest.mark.parametrize("family", ["mmdit", "mmdit without recycling", "wan"])
def test_caches_at_different_steps_share_a_pass(family):
    """A step against caches of one clip each is each clip's step alone."""
    if family == "wan":
        net = wan_transformer()
    else:
        net = tiny_model(recycle=family == "mmdit").transformer
    config, generator = net.config, torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def clip():
        channels = config.latent_channels, config.latent_channels, config.condition_channels
        x, recycled, condition = (random(1, each, 1, *SIZE) for each in channels)
        return x, recycled, condition if config.condition_channels else None

    time = torch.ones(1, dtype=torch.float64)
    caches = [net.new_cache(1, SIZE, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        for number, cache in enumerate(caches):
            lens = torch.tensor([number + 2])
            text = random(1, config.text_tokens, config.text_width)
            for layer, pair in enumerate(net.encode_text(text, lens, time)):
                cache.write_text(layer, *pair, lens)
            for _ in range(2 * number):
                net.step(*clip(), time, cache)
        alone = [cache.clone() for cache in caches]
        for _ in range(5):
            clips = [clip() for _ in caches]
            expected = [net.step(*each, time, cache) for each, cache in zip(clips, alone)]
            parts = (None if part[0] is None else torch.cat(part) for part in zip(*clips))
            constants = net.step_constants(time, SIZE).expand(3)
            made = net.step(*parts, time.expand(3), caches, constants)
            torch.testing.assert_close(made, torch.cat(expected), rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(caches, alone):
        for tensor, other in zip(ours.tensors().values(), theirs.tensors().values()):
            torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-10)
