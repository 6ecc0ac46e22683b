"""Wan-type transformers: against diffusers' own, streaming == parallel, gradients, the cache."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from aapt.model.discriminator import Discriminator
from aapt.model.wan import TextBesideCache, WanTransformer
from aapt.model.world_model import WorldModel
from aapt.streaming.student import StudentRollout
from aapt.training.forcing import parallel_pass

from ..helpers import SIZE, WAN, latents, tiny_model, wan_transformer
from ..plain_wan import PlainWan

TEXT_LENS = (3, 5)


def halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k from pairs of neighbours, which diffusers rotates, to halves."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def from_diffusers(theirs: nn.Module) -> WanTransformer:
    """Our model with the weights of a `WanTransformer3DModel`."""
    given, c = theirs.state_dict(), theirs.config
    heads, dim = c.num_attention_heads, c.attention_head_dim
    config = dataclasses.replace(
        WAN,
        width=heads * dim,
        heads=heads,
        head_dim=dim,
        depth=c.num_layers,
        mlp_width=c.ffn_dim,
        text_width=c.text_dim,
        text_tokens=5,
        rope_axes=(dim - 4 * (dim // 6), 2 * (dim // 6), 2 * (dim // 6)),
        latent_channels=c.in_channels,
        sink_frames=0,
    )
    ours = WanTransformer(config).to(given["proj_out.weight"].dtype)
    embedder = "condition_embedder"
    linear = {
        "text_in.0": f"{embedder}.text_embedder.linear_1",
        "text_in.2": f"{embedder}.text_embedder.linear_2",
        "time.up": f"{embedder}.time_embedder.linear_1",
        "time.down": f"{embedder}.time_embedder.linear_2",
        "video_modulation": f"{embedder}.time_proj",
        "video_out": "proj_out",
    }
    patches = given["patch_embedding.weight"][:, :, 0].permute(0, 2, 3, 1).flatten(1)
    made = {
        "video_in.weight": patches,
        "video_in.bias": given["patch_embedding.bias"],
        "out_table": given["scale_shift_table"][0],
    }
    for i in range(config.depth):
        a, b = f"blocks.{i}", f"blocks.{i}"
        linear |= {
            f"{a}.video.out": f"{b}.attn1.to_out.0",
            f"{a}.cross.q": f"{b}.attn2.to_q",
            f"{a}.cross.out": f"{b}.attn2.to_out.0",
            f"{a}.cross.norm": f"{b}.norm2",
            f"{a}.video.mlp_up": f"{b}.ffn.net.0.proj",
            f"{a}.video.mlp_down": f"{b}.ffn.net.2",
        }
        for kind in ("weight", "bias"):
            q, k, v = (given[f"{b}.attn1.to_{name}.{kind}"] for name in "qkv")
            made[f"{a}.video.qkv.{kind}"] = torch.cat([halves(q, heads), halves(k, heads), v])
            pair = [given[f"{b}.attn2.to_{name}.{kind}"] for name in "kv"]
            made[f"{a}.cross.text_kv.{kind}"] = torch.cat(pair)
        for name in "qk":
            weight = given[f"{b}.attn1.norm_{name}.weight"]
            made[f"{a}.video.{name}_norm"] = halves(weight, heads).view(heads, -1)
            made[f"{a}.cross.{name}_norm"] = given[f"{b}.attn2.norm_{name}.weight"]
        made[f"{a}.video.modulation_bias"] = given[f"{b}.scale_shift_table"][0]
    for name, other in linear.items():
        made |= {f"{name}.{kind}": given[f"{other}.{kind}"] for kind in ("weight", "bias")}
    ours.load_state_dict(made)
    return ours


def diffusers_model(channels: int = 4) -> nn.Module:
    pytest.importorskip("diffusers")
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=channels,
        text_dim=8,
        ffn_dim=40,
        num_layers=3,
    )
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):  # ones would hide a wrong order
            nn.init.uniform_(parameter, 0.5, 2)
    return model.requires_grad_(False)


class Sinusoids(nn.Module):
    """Wan's sinusoids of t in float64, where diffusers computes them in float32."""

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep.double()[:, None] / 10_000 ** (torch.arange(128).double() / 128)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


CLIP = 7  # frames


def clip(dtype: torch.dtype, channels: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, text whose padding is zero, its lengths, and times."""
    torch.manual_seed(1)
    x, text = torch.randn(2, channels, CLIP, *SIZE), torch.randn(2, 5, 8)
    for row, length in enumerate(TEXT_LENS):
        text[row, length:] = 0
    return x.to(dtype), text.to(dtype), torch.tensor(TEXT_LENS), torch.tensor([1.0, 0.8333])


def bidirectional(ours: WanTransformer, x, text, text_lens, t) -> Tensor:
    return ours(x, None, None, text, text_lens, t, causal=False)


def test_diffusers_wan_in_float64(monkeypatch):
    """Its layers compute in float32 by calls of `float`, which here mean float64."""
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor.double())
    theirs = diffusers_model().double()
    theirs.condition_embedder.timesteps_proj = Sinusoids()
    x, text, text_lens, t = clip(torch.float64)
    t = t.double()
    expected = theirs(x, 1000 * t, text).sample
    actual = bidirectional(from_diffusers(theirs), x, text, text_lens, t)
    assert expected.std() > 0.3
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_frame", [False, True])
def test_diffusers_wan_of_48_channels_and_times_per_token(monkeypatch, per_frame):
    """Wan 2.2-5B takes a time per token, that of the token's frame; an image is frame 0, at time
    0."""
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor.double())
    theirs = diffusers_model(channels=48).double()
    theirs.condition_embedder.timesteps_proj = Sinusoids()
    x, text, text_lens, t = clip(torch.float64, channels=48)
    t = t.double()[:, None].repeat(1, CLIP)
    t[:, 0] *= 0 if per_frame else 1
    tokens = (1000 * t).repeat_interleave(SIZE[0] * SIZE[1] // 4, dim=1)
    expected = theirs(x, tokens, text).sample
    ours = from_diffusers(theirs)
    actual = bidirectional(ours, x, text, text_lens, t if per_frame else t[:, 0])
    assert expected.std() > 0.3 and ours.config.latent_channels == 48
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_farther_from_float64_than_diffusers(dtype):
    theirs, clip64 = diffusers_model(), clip(torch.float64)
    exact = bidirectional(from_diffusers(theirs).double(), *clip64)
    theirs.to(dtype)
    x, text, text_lens, t = clip(dtype)
    errors = [
        (out.double() - exact).norm() / exact.norm()
        for out in (
            bidirectional(from_diffusers(theirs), x, text, text_lens, t),
            theirs(x, 1000 * t, text).sample,
        )
    ]
    assert errors[0] < 1.1 * errors[1]


def whole_chunks(net, cache, layer) -> list[Tensor]:
    """The cache's keys and values without the part of a chunk that it still has."""
    sink, kept = net.config.sink_frames, net.config.window_frames + 1 - net.config.chunk
    tokens = SIZE[0] * SIZE[1] // 4
    pair = (x.unflatten(1, (-1, tokens)) for x in cache.prefix(layer))
    return [torch.cat([x[:, :sink], x[:, sink:][:, -kept:]], dim=1).flatten(1, 2) for x in pair]


@pytest.mark.parametrize("sink_distance", ["absolute", "clamped"])
@pytest.mark.parametrize(("chunk", "window", "sink"), [(1, 2, 1), (1, 2, 0), (3, 5, 3), (2, 3, 0)])
@pytest.mark.parametrize("per_frame", [False, True])
def test_streaming_equals_parallel(chunk, window, sink, sink_distance, per_frame):
    """Chunk after chunk through the ring, past its wrap, in two segments; also where each frame has
    a time of its own."""
    net = wan_transformer(
        chunk=chunk, window_frames=window, sink_frames=sink, sink_distance=sink_distance
    )
    frames = chunk * 7
    x, text, t = latents(frames), torch.randn(2, 4, 8).double(), torch.rand(2, frames).double()
    t = t if per_frame else t[:, 0]
    text_lens = torch.tensor([2, 4])

    def times(start: int, stop: int) -> Tensor:
        return t[:, start:stop] if per_frame else t

    with torch.no_grad():
        expected = net(x, None, None, text, text_lens, t)
        cache = net.new_cache(2, SIZE, dtype=torch.float64)
        for layer, pair in enumerate(net.encode_text(text, text_lens, t)):
            cache.write_text(layer, *pair)
        steps = []
        for start in range(0, frames, chunk):
            if start == 5 * chunk:
                prefix = [whole_chunks(net, cache, layer) for layer in range(net.config.depth)]
            part = x[:, :, start : start + chunk]
            steps.append(net.step(part, None, None, times(start, start + chunk), cache))
        torch.testing.assert_close(torch.cat(steps, dim=2), expected, rtol=1e-9, atol=1e-10)
        start = 5 * chunk
        rest = (x[:, :, start:], None, None, text, text_lens, times(start, frames))
        continued = net(*rest, prefix=prefix, start_frame=start)
    torch.testing.assert_close(continued, expected[:, :, start:], rtol=1e-9, atol=1e-10)


def test_times_of_frames_that_cannot_be(monkeypatch):
    """One for each frame, of a text without a time, on ranks that have whole frames."""
    net, x, t = wan_transformer(), latents(3), torch.ones(2, 3).double()
    inputs = (torch.randn(2, 4, 8).double(), torch.tensor([2, 4]))
    words = r"^t: expected one time per clip \(B,\), or with block 'wan' on one rank one per frame "
    with pytest.raises(ValueError, match=words + r"\(B, 3\), got \(2, 2\)$"):
        net(x, None, None, *inputs, t[:, :2])
    with pytest.raises(ValueError, match=words + r"\(B, 1\), got \(2, 3\)$"):
        net.step(x[:, :, :1], None, None, t, net.new_cache(2, SIZE, dtype=torch.float64))
    monkeypatch.setattr(net.context, "size", 2)
    with pytest.raises(ValueError, match=words):
        net(x, None, None, *inputs, t)
    joint = tiny_model().transformer
    with pytest.raises(ValueError, match=words):
        joint(x, x, None, *inputs, t)


def test_a_step_is_made_again_until_it_advances():
    net = wan_transformer(window_frames=3)
    text, text_lens, t = torch.randn(2, 6, 8).double(), torch.tensor([6, 6]), torch.ones(2)
    caches = [net.new_cache(2, SIZE, dtype=torch.float64) for _ in range(2)]
    for cache in caches:
        for layer, pair in enumerate(net.encode_text(text, text_lens, t)):
            cache.write_text(layer, *pair)
    with torch.no_grad():
        for _ in range(6):
            x = latents(1)
            net.step(latents(1), None, None, 0.5 * t, caches[0], advance=False)
            again, once = (net.step(x, None, None, t, cache) for cache in caches)
            assert torch.equal(again, once)
    assert [int(cache.step) for cache in caches] == [6, 6]


def test_padding_is_zero_and_is_attended_to():
    """Wan attends to all rows of its text, zero where the prompt has ended."""
    net = wan_transformer()
    x, t, text = latents(2), torch.ones(2), torch.randn(2, 4, 8).double()
    lens = torch.tensor([2, 4])
    padded = torch.zeros(2, 6, 8).double()
    padded[0, :2], padded[1, :4] = text[0, :2], text[1]
    whole = torch.tensor([6, 6])
    torch.testing.assert_close(
        net(x, None, None, text, lens, t), net(x, None, None, padded, whole, t)
    )
    longer = net(x, None, None, text, torch.tensor([4, 4]), t)
    assert (longer - net(x, None, None, text, lens, t))[0].abs().max() > 1e-4
    with pytest.raises(ValueError, match="text: expected at most 6 tokens, got 7"):
        net(x, None, None, torch.zeros(2, 7, 8).double(), whole, t)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(
    ("segments", "sink_distance"), [((5,), "clamped"), ((4, 3), "clamped"), ((4, 1, 3), "absolute")]
)
def test_student_forcing_gradient_equals_dense_autograd(segments, sink_distance):
    """docs/method.md#8: two passes give the gradient of back-propagating through a list of keys and
    values, from segment to segment detached."""
    net = wan_transformer(recycle=True, sink_distance=sink_distance, output_clamp=4.0)
    frames = sum(segments)
    first, noise, weight = latents(1), latents(frames), latents(frames)
    text, text_lens = torch.randn(2, 6, 8).double(), torch.tensor([3, 6])
    time = torch.ones(2)
    plain = PlainWan(net, text, text_lens, relative=sink_distance == "clamped")
    outputs, last = [], first
    for count in segments:
        plain.keys = [[(k.detach(), v.detach()) for k, v in layer] for layer in plain.keys]
        plain.set_text(text, text_lens)
        loss = 0.0
        for i in range(len(outputs), len(outputs) + count):
            x = noise[:, :, i : i + 1]
            velocity, made = plain.run(x, time, last)
            plain.keep(made)
            outputs.append(4 * torch.tanh((x - velocity) / 4))
            loss = loss + (outputs[-1] * weight[:, :, i : i + 1]).sum()
            last = outputs[-1].detach()
        loss.backward()
    expected = gradients(net)
    net.zero_grad()

    rollout, start = StudentRollout(net, text, text_lens, first), 0
    for count in segments:
        part = slice(start, start := start + count)
        segment = rollout.roll(noise[:, :, part], None)
        fake = parallel_pass(net, segment, text, text_lens)
        # Our angles are float32, those of the list float64
        torch.testing.assert_close(fake, torch.cat(outputs[part], dim=2), rtol=0, atol=1e-6)
        torch.testing.assert_close(fake, segment.output, rtol=1e-9, atol=1e-10)
        (fake * weight[:, :, part]).sum().backward()
    actual = gradients(net)
    assert set(actual) == set(expected) and "blocks.2.cross.text_kv.weight" in actual
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() < 1e-6 * gradient.norm(), name


def test_checkpointing_changes_nothing():
    net = wan_transformer()
    text, text_lens, x = torch.randn(2, 6, 8).double(), torch.tensor([3, 6]), latents(3)
    grads = []
    for checkpointed in (False, True):
        net.zero_grad()
        net.checkpoint_blocks = checkpointed
        net(x, None, None, text, text_lens, torch.ones(2)).square().sum().backward()
        grads.append(gradients(net))
    assert set(grads[0]) == {name for name, _ in net.named_parameters()}
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("judgement", ["frame", "clip"])
def test_a_discriminator_of_wan(judgement):
    """Everything learns but what makes the velocity, and a frame's logit sees no later frame."""
    world = WorldModel(dataclasses.replace(WAN, recycle=True), None)
    world.transformer = wan_transformer(recycle=True)
    discriminator = Discriminator(world, judgement).double()
    text, text_lens = torch.randn(2, 6, 8).double(), torch.tensor([3, 6])
    x, previous, t = latents(4), latents(4), torch.rand(2)
    logits = discriminator(x, previous, None, text, text_lens, t)
    assert logits.shape == ((2, 4) if judgement == "frame" else (2, 1))
    logits.square().sum().backward()
    frozen = {n for n, p in discriminator.named_parameters() if not p.requires_grad}
    outputs = {"out_table", "video_out.weight", "video_out.bias"}
    assert frozen == {f"world.transformer.{name}" for name in outputs}
    learnt = {name for name, _ in discriminator.named_parameters()} - frozen
    byte_encoder = {name for name in learnt if "text_encoder" in name}  # text is given here
    assert set(gradients(discriminator)) == learnt - byte_encoder
    changed = x.clone()
    changed[:, :, 2] += 1
    difference = discriminator(changed, previous, None, text, text_lens, t) - logits
    if judgement == "frame":
        assert difference[:, :2].abs().max() < 1e-12 < difference[:, 2].abs().min()
    else:
        assert difference.abs().min() > 1e-12


def test_the_cache_has_the_text_beside_the_frames():
    net = wan_transformer()
    cache = net.new_cache(2, SIZE, dtype=torch.float64)
    assert isinstance(cache, TextBesideCache) and cache.text_tokens == 0
    k, v = torch.randn(2, 2, 6, 2, 16).double()
    cache.write_text(1, k, v)
    twin = cache.clone()
    cache.words.zero_()
    assert torch.equal(twin.words[0, 1], k) and torch.equal(twin.words[1, 1], v)
    cache.load(twin)
    assert torch.equal(cache.words, twin.words)
    assert cache.bytes == 2 * cache.k.nbytes + cache.words.nbytes + 8 + 2 * 8
    cache.reset()
    assert torch.equal(cache.words, twin.words)
    other = wan_transformer(text_tokens=7).new_cache(2, SIZE, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cache: expected one with words \(2, 3, 2, 6, 2, 16\)"):
        cache.load(other)
    with pytest.raises(ValueError, match=r"^v: expected \(2, 6, 2, 16\), got \(2, 5, 2, 16\)"):
        cache.write_text(0, k, v[:, :5])
    with pytest.raises(IndexError, match="layer: expected 0 ... 2, got 3"):
        cache.write_text(3, k, v)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "unet"}, "block: expected 'mmdit' or 'wan', got 'unet'"),
        ({"chunk": 0}, "chunk: expected 1 or more, got 0"),
        ({"chunk": 2, "first_chunk": 0}, "first_chunk: expected 1 or more, got 0"),
        ({"mlp_width": 0}, "mlp_width: expected 1 or more, got 0"),
        ({"sink_frames": -1}, "sink_frames: expected 0 or more, got -1"),
        ({"chunk": 2, "recycle": True}, "chunk: expected 1 in a model with recycled channels"),
        ({"chunk": 4}, r"chunk: expected at most window_frames \+ 1 = 3, got 4 after 4"),
        (
            {"chunk": 2, "grid_windows": ((2, 3, 0),)},
            r"chunk: expected at most window_frames \+ 1 = 1, got 2 after 2",
        ),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WAN, **changes)


@pytest.mark.parametrize(
    ("changes", "frames", "message"),
    [
        ({}, 3, "frames: expected a multiple of the chunk, 2, in a pass over all frames, got 3"),
        ({"window_frames": 2}, 4, r"window_frames \+ 1: expected a multiple of the chunk, 2,"),
        ({"sink_frames": 1}, 4, "sink_frames: expected a multiple of the chunk, 2, .* got 1"),
        ({"first_chunk": 1}, 4, "first_chunk: expected 2 like chunk in a pass over all .* got 1"),
    ],
)
def test_what_runs_in_steps_alone(changes, frames, message):
    net = wan_transformer(**{"chunk": 2, "window_frames": 3, "sink_frames": 2, **changes})
    text, text_lens = torch.randn(2, 6, 8).double(), torch.tensor([3, 6])
    with pytest.raises(ValueError, match=message):
        net(latents(frames), None, None, text, text_lens, torch.ones(2))
