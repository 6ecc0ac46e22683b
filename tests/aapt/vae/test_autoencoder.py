"""The autoencoder: shapes, streaming equal to the whole clip, published sizes."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from aapt.vae import (
    CausalVAE,
    VAEConfig,
    decoder_work,
    flops_per_latent_frame,
    light,
    original,
    tiny,
    tiny_fine,
    tiny_light,
    total,
    wan,
    wan22,
)
from aapt_kernels import causal_conv3d


def shrunken(config: VAEConfig) -> VAEConfig:
    """The same network with a sixteenth of the channels."""
    return replace(
        config,
        encoder_channels=tuple(c // 16 for c in config.encoder_channels),
        decoder_channels=tuple(c // 16 for c in config.decoder_channels),
    )


CONFIGS = {
    "tiny": tiny(),
    "light": shrunken(light()),
    "original": shrunken(original()),
    "replicate": replace(shrunken(light()), padding="replicate"),
    "wan": wan(6),
    "wan22": wan22(6, 8),
    "lapped": replace(tiny_light(), decoder_channels=(8, 8, 16)),
    "fine": replace(tiny_fine(), decoder_channels=(8, 16)),
}


def make_vae(config: VAEConfig, dtype: torch.dtype = torch.float32) -> CausalVAE:
    """Every weight drawn afresh: at initialisation the residual branches are zero."""
    torch.manual_seed(0)
    vae = CausalVAE(config).to(dtype)
    with torch.no_grad():
        for p in vae.parameters():
            p.normal_(std=p[0].numel() ** -0.5) if p.ndim == 5 else p.normal_(p.mean().item(), 0.2)
        vae.latent_mean.normal_()
        vae.latent_std.uniform_(0.5, 2)
    return vae.requires_grad_(False)


def decode_chunks(vae: CausalVAE, latent: torch.Tensor, plan) -> torch.Tensor:
    video, state = [], None
    for chunk in latent.split(list(plan), dim=2):
        frames, state = vae.decode_frame(chunk, state)
        video.append(frames)
    return torch.cat(video, dim=2)


@pytest.mark.parametrize("plan", [(1, 1, 1, 1), (1, 3), (1, 2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_decoding_equals_the_whole_clip(name, plan):
    vae = make_vae(CONFIGS[name])
    latent = torch.randn(1, vae.config.latent_channels, 4, 3, 5)
    whole = vae.decode(latent)
    chunked = decode_chunks(vae, latent, plan)
    exact = make_vae(CONFIGS[name], torch.float64)
    exact.load_state_dict(vae.state_dict())
    error = (whole - exact.decode(latent.double())).abs().max()
    # Both round on the way, independently: as far from each other as each is from the truth.
    assert (chunked - whole).abs().max() <= 4 * error
    assert error <= 1e-4 * whole.abs().max()


def encode_chunks(vae: CausalVAE, video: torch.Tensor, plan) -> torch.Tensor:
    latents, state = [], None
    for chunk in video.split(list(plan), dim=2):
        latent, state = vae.encode_frames(chunk, state)
        latents.append(latent)
    return torch.cat(latents, dim=2)


@pytest.mark.parametrize("plan", [(1, 4, 4, 4), (5, 8), (1, 8, 4)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_chunked_encoding_equals_the_whole_clip(name, plan):
    vae = make_vae(CONFIGS[name], torch.float64)
    space = vae.config.space_factor
    video = torch.randn(1, 3, 13, 2 * space, 3 * space, dtype=torch.float64)
    whole = vae.encode(video)
    assert whole.shape == (1, vae.config.latent_channels, 4, 2, 3)
    torch.testing.assert_close(encode_chunks(vae, video, plan), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_states_are_resumed_and_replaced_in_place(name):
    """A state can be resumed twice, and given buffers receive the new one."""
    vae = make_vae(CONFIGS[name])
    space = vae.config.space_factor
    first, second = torch.randn(1, 3, 5, space, 2 * space), torch.randn(1, 3, 4, space, 2 * space)
    _, state = vae.encode_frames(first)
    state = tuple(part.clone() for part in state)
    once, wanted = vae.encode_frames(second, state)
    again, returned = vae.encode_frames(second, state, state_out=state)
    assert torch.equal(once, again)
    for old, new, same in zip(state, wanted, returned, strict=True):
        assert same is old and torch.equal(old, new)


def test_frames_that_no_encoder_takes():
    vae = make_vae(tiny())
    with pytest.raises(
        ValueError, match=r"video: expected \(batch, 3, 1 \+ 4n, height, width\) wit"
    ):
        vae.encode_frames(torch.randn(1, 3, 4, 8, 8))
    _, state = vae.encode_frames(torch.randn(1, 3, 1, 8, 8))
    for frames in (1, 0, 5):
        with pytest.raises(
            ValueError, match=r"video: expected \(batch, 3, 4n, height, width\) with"
        ):
            vae.encode_frames(torch.randn(1, 3, frames, 8, 8), state)


@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_frames_of_a_chunk_are_those_of_the_whole_clip(name, last):
    """And so are all frames of the chunk after it."""
    vae = make_vae(CONFIGS[name], torch.float64)
    latent = torch.randn(1, vae.config.latent_channels, 20, 3, 5, dtype=torch.float64)
    whole = vae.decode(latent)
    _, state = vae.decode_frame(latent[:, :, :1])
    video, state = vae.decode_frame(latent[:, :, 1:17], state, last=last)
    torch.testing.assert_close(video, whole[:, :, 65 - 4 * last : 65])
    after, _ = vae.decode_frame(latent[:, :, 17:], state)
    torch.testing.assert_close(after, whole[:, :, 65:])


def test_the_last_frames_cost_less_than_all(monkeypatch):
    vae, sizes = make_vae(tiny()), []
    latent = torch.randn(1, 16, 13, 3, 5)
    _, state = vae.decode_frame(latent[:, :, :1])

    def counting(x, *args, **kwargs):
        sizes.append(x.shape[2])
        return causal_conv3d(x, *args, **kwargs)

    monkeypatch.setattr("aapt.vae.layers.causal_conv3d", counting)
    vae.decode_frame(latent[:, :, 1:], state, last=1)
    # By hand, from the end: 4 frames of the finest scale, and its block sees 2 before them; these 6
    # are 3 of the middle scale, whose two blocks see 2 each; these 7 are 4 of the coarsest, whose
    # block and first convolution see 2 each. After them the linear skip.
    assert sizes == [8, 6, 6, 4, 7, 7, 5, 5, 3, 6, 6, 4, 1]


@pytest.mark.parametrize("last", [0, 3])
def test_last_frames_that_are_not_there(last):
    vae = make_vae(tiny())
    latent = torch.randn(1, 16, 2, 3, 5)
    _, state = vae.decode_frame(latent)
    with pytest.raises(ValueError, match=f"last: expected 1 to 2 frames after a state, got {last}"):
        vae.decode_frame(latent, state, last=last)
    with pytest.raises(ValueError, match="got 1 without one"):
        vae.decode_frame(latent, last=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_latent_frame_reaches_the_video(name):
    """An output that ignored the state, or the latent, would pass the chunking test."""
    vae = make_vae(CONFIGS[name], torch.float64)
    latent = torch.randn(1, vae.config.latent_channels, 3, 3, 5, dtype=torch.float64)
    before = vae.decode(latent)
    latent[:, :, 1] += 1
    change = (vae.decode(latent) - before).abs().amax((0, 1, 3, 4))
    assert (change[:1] == 0).all() and (change[1:] > 0).all()


def test_interleaved_streams_equal_each_alone():
    vae = make_vae(tiny())
    latents = torch.randn(2, 1, 16, 3, 4, 5)
    alone = [decode_chunks(vae, latent, (1, 1, 1)) for latent in latents]
    states, videos = [None, None], ([], [])
    for frame in range(3):
        for stream in (0, 1):
            chunk = latents[stream][:, :, frame : frame + 1]
            video, states[stream] = vae.decode_frame(chunk, states[stream])
            videos[stream].append(video)
    for stream in (0, 1):
        assert torch.equal(torch.cat(videos[stream], dim=2), alone[stream])


def test_old_state_can_be_resumed():
    vae = make_vae(tiny())
    first, second = torch.randn(2, 1, 16, 1, 4, 5)
    _, state = vae.decode_frame(first)
    once, _ = vae.decode_frame(second, state)
    again, _ = vae.decode_frame(second, state)
    assert torch.equal(once, again)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("frames, height, width", [(1, 3, 5), (2, 1, 3), (4, 5, 2)])
def test_shapes(name, frames, height, width):
    vae = make_vae(CONFIGS[name])
    space, channels = vae.config.space_factor, vae.config.latent_channels
    video = torch.randn(2, 3, 1 + 4 * (frames - 1), space * height, space * width)
    latent = vae.encode(video)
    assert latent.shape == (2, channels, frames, height, width)
    assert vae.decode(latent).shape == video.shape


@pytest.mark.parametrize("name", CONFIGS)
def test_first_frame_is_encoded_on_its_own(name):
    vae = make_vae(CONFIGS[name], torch.float64)
    space = vae.config.space_factor
    video = torch.randn(1, 3, 9, 2 * space, 3 * space, dtype=torch.float64)
    latent = vae.encode(video)
    torch.testing.assert_close(vae.encode(video[:, :, :1]), latent[:, :, :1])
    video[:, :, 5:] = 0  # the last latent frame's own four video frames
    changed = (vae.encode(video) - latent).abs().amax((0, 1, 3, 4))
    assert (changed[:2] == 0).all() and changed[2] > 0


def test_first_step_gives_one_frame_and_later_steps_four():
    vae = make_vae(tiny())
    latent = torch.randn(1, 16, 1, 10, 16)
    video, state = vae.decode_frame(latent)
    assert video.shape == (1, 3, 1, 80, 128)
    video, _ = vae.decode_frame(latent, state)
    assert video.shape == (1, 3, 4, 80, 128)


@pytest.mark.parametrize("name", ["tiny", "light", "lapped"])
def test_pixels_are_the_video_in_bytes(name):
    vae = make_vae(CONFIGS[name])
    latent = torch.randn(1, 16, 2, 3, 4)
    video, state = vae.decode_frame(latent)
    bytes_, state_too = vae.decode_frame(latent, pixels=True)
    levels = (video * 127.5 + 127.5).clamp(0, 255)
    assert bytes_.dtype == torch.uint8 and (bytes_ - levels).abs().max() <= 0.5 + 1e-3
    assert all(torch.equal(a, b) for a, b in zip(state, state_too, strict=True))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_lapped_map_is_the_least_squares_of_its_windows(noise):
    """Against numpy on windows gathered one by one, with noise as further rows of no target."""
    vae = make_vae(replace(tiny_light(), latent_channels=2, decoder_channels=(4, 4, 4)))
    videos = torch.rand(3, 1, 3, 13, 32, 40).cumsum(3) / 8 - 1
    vae.fit_lapped(videos, noise)
    frames, height, width, latents = 4, 4, 5, [vae.encode(video)[0].numpy() for video in videos]
    std, mean = (x.numpy()[:, 0, 0, 0] for x in (vae.latent_std, vae.latent_mean))
    windows, targets = [], []
    for latent, video in zip(latents, videos):
        padded = torch.cat([video[0][:, :1].expand(-1, 3, -1, -1), video[0]], dim=1).numpy()
        for t, i, j in product(range(frames), range(height), range(width)):
            around = product((t - 1, t), (i - 1, i, i + 1), (j - 1, j, j + 1))
            inside = [
                (max(a, 0), np.clip(b, 0, height - 1), np.clip(c, 0, width - 1))
                for a, b, c in around
            ]
            windows.append([*(latent[:, a, b, c] * std + mean for a, b, c in inside), [1.0]])
            patch = padded[:, 4 * t : 4 * t + 4, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            targets.append(patch.flatten())
    rows = np.array([np.concatenate(window) for window in windows], np.float64)
    unsure = np.diag(np.append(np.tile(std, 18), 0)) * noise * len(rows) ** 0.5
    solved = np.linalg.lstsq(
        np.concatenate([rows, unsure]),
        np.concatenate([targets, np.zeros((37, len(targets[0])))]),
    )[0]
    expected = (rows @ solved).reshape(3, frames, height, width, 3, 4, 8, 8)
    expected = expected.transpose(0, 4, 1, 5, 2, 6, 3, 7).reshape(3, 3, 16, 32, 40)[:, :, 3:]
    found = torch.cat([vae.decode(vae.encode(video)) for video in videos]).numpy()
    assert np.abs(found - expected).max() < 2e-3


def test_a_lapped_map_makes_what_it_is_asked_for():
    """The map is linear in its target: to make twice the videos is to make them and double them."""
    vae = make_vae(replace(tiny_light(), latent_channels=2, decoder_channels=(4, 4, 4)))
    videos = torch.rand(3, 1, 3, 13, 32, 40).cumsum(3) / 8 - 1
    latent = vae.encode(videos[0])
    vae.fit_lapped(videos, 0.1)
    made = vae.decode(latent)
    vae.fit_lapped(videos, 0.1, lambda video: 2 * video - 0.5)
    assert torch.allclose(vae.decode(latent), 2 * made - 0.5, atol=1e-3)


def test_a_lapped_map_needs_patches_to_fit():
    with pytest.raises(ValueError, match="lapped: expected False without linear_skip, got True"):
        replace(light(), lapped=True)


def test_latents_are_normalised():
    vae = make_vae(shrunken(light()))
    video = torch.randn(1, 3, 5, 16, 16)
    latent = vae.encode(video)
    vae.latent_mean.zero_()
    vae.latent_std.fill_(1)
    raw = vae.encode(video)
    vae.latent_mean += 2
    vae.latent_std *= 3
    torch.testing.assert_close(vae.encode(video), (raw - 2) / 3)
    torch.testing.assert_close(vae.decode((raw - 2) / 3), vae.decoder(raw, None)[0])
    assert not torch.allclose(latent, raw)


def test_a_few_steps_of_training_reduce_the_error():
    torch.manual_seed(0)
    vae = CausalVAE(shrunken(light()))
    optimizer = torch.optim.Adam(vae.parameters(), 3e-3)
    video = torch.rand(1, 3, 1, 1, 1).expand(2, 3, 5, 16, 16) - torch.rand(2, 1, 5, 1, 1)
    errors = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            reconstruction = vae.decode(vae.encode(video))
        error = (reconstruction.float() - video).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert all(p.grad is not None for p in vae.parameters())
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    "config, height, width, tflop",
    [
        (light(), 416, 736, 4.9),
        (light(), 720, 1280, 15.1),
        (original(), 416, 736, 20.7),
        (original(), 720, 1280, 62.5),
    ],
)
def test_decoder_flops_are_the_published_ones(config, height, width, tflop):
    _, decoder = flops_per_latent_frame(config, height, width)
    assert decoder / 1e12 == pytest.approx(tflop, rel=0.05)


@pytest.mark.parametrize("config, millions", [(light(), 80), (original(), 150)])
def test_decoder_parameters_are_the_published_ones(config, millions):
    with torch.device("meta"):
        decoder = CausalVAE(config).decoder
    assert sum(p.numel() for p in decoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


class Counter:
    """Counts what every call of the two costly functions multiplies and moves."""

    def __init__(self, monkeypatch):
        self.flops = self.bytes = self.state_bytes = 0
        attention = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr("aapt.vae.layers.causal_conv3d", self._wrap(causal_conv3d, self._conv))
        monkeypatch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            self._wrap(attention, self._attention),
        )

    def run(self, function, *args, **kwargs):
        self.flops = self.bytes = self.state_bytes = 0
        return function(*args, **kwargs)

    def _wrap(self, function, count):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            count(out, *args, **kwargs)
            return out

        return call

    def _conv(self, outputs, x, weight, bias, *, state=None, norm_weight=None, residual=None, **_):
        out, _ = outputs
        self.flops += 2 * weight.numel() * out.shape[2:].numel()
        state_bytes = 2 * state.numel() if state is not None else 0
        given = [t for t in (x, weight, bias, norm_weight, residual) if t is not None]
        self.bytes += state_bytes + 2 * sum(t.numel() for t in given)
        self.bytes += out.numel() * (1 if out.dtype == torch.uint8 else 2)
        self.state_bytes += state_bytes

    def _attention(self, out, q, k, v):
        self.flops += 4 * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        self.bytes += 2 * sum(t.numel() for t in (q, k, v, out))


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_count_what_runs(name, monkeypatch):
    """Against a count of the multiplications of every call; of the encoder, long minus short."""
    config = CONFIGS[name]
    vae = make_vae(config)
    counter = Counter(monkeypatch)
    height, width = 3 * config.space_factor, 5 * config.space_factor
    counter.run(vae.encode, torch.randn(1, 3, 5, height, width))
    short = counter.flops
    counter.run(vae.encode, torch.randn(1, 3, 9, height, width))
    long = counter.flops
    latent = torch.randn(1, config.latent_channels, 1, 3, 5)
    _, state = vae.decode_frame(latent)
    counter.run(vae.decode_frame, latent, state)
    assert (long - short, counter.flops) == flops_per_latent_frame(config, height, width)


@pytest.mark.parametrize("name", CONFIGS)
def test_work_is_what_runs(name, monkeypatch):
    config = CONFIGS[name]
    decoder = make_vae(config).decoder
    counter = Counter(monkeypatch)
    latent = torch.randn(1, config.latent_channels, 1, 3, 5)
    _, state = decoder(latent, None)
    counter.run(decoder, latent, state, pixels=True)
    work = total(decoder_work(config, 3 * config.space_factor, 5 * config.space_factor))
    assert (counter.flops, counter.bytes) == (work.flops, work.bytes)
    assert counter.state_bytes == work.state_bytes == 2 * sum(s.numel() for s in state)
    assert work.parameters == sum(p.numel() for p in decoder.parameters())


@pytest.mark.parametrize(
    "config, height, width, tflop, gigabytes",
    [
        (light(), 416, 736, 3.62, 4.7),
        (light(), 720, 1280, 11.18, 13.9),
        (original(), 416, 736, 15.93, 11.7),
        (original(), 720, 1280, 48.24, 34.5),
    ],
)
def test_folded_decoder_costs_what_is_published(config, height, width, tflop, gigabytes):
    work = total(decoder_work(config, height, width))
    assert work.folded_flops / 1e12 == pytest.approx(tflop, rel=0.01)
    assert work.bytes / 1e9 == pytest.approx(gigabytes, rel=0.03)


def test_tiny_fits_its_budget():
    encoder, decoder = flops_per_latent_frame(tiny(), 80, 128)
    assert (encoder + decoder) / 4 < 450e6 and encoder < decoder
    assert sum(p.numel() for p in CausalVAE(tiny()).parameters()) < 2e6


def test_compiles_without_graph_breaks():
    vae = make_vae(tiny())
    latent = torch.randn(1, 16, 1, 3, 4)
    _, state = vae.decode_frame(latent)
    compiled = torch.compile(vae.decode_frame, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(latent, state), vae.decode_frame(latent, state))


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 12, 16), (1, 1, 5, 16, 16)])
def test_bad_video_is_named(shape):
    with pytest.raises(ValueError) as error:
        make_vae(tiny()).encode(torch.zeros(shape))
    message = "video: expected (batch, 3, 1 + 4n, height, width) with height and width multiples"
    assert message in str(error.value) and str(shape) in str(error.value)


def test_bad_latent_state_and_config_are_named():
    vae = make_vae(tiny())
    with pytest.raises(ValueError, match=r"latent: expected \(batch, 16, time, .*got \(1, 4, 1"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2))
    _, state = vae.decode_frame(torch.zeros(1, 16, 1, 2, 2))
    with pytest.raises(ValueError, match=r"state: expected \(2, 16, 2, 2, 2\).*got \(1, 16"):
        vae.decode_frame(torch.zeros(2, 16, 1, 2, 2), state)
    with pytest.raises(ValueError, match="decoder_blocks: expected 3 scales for 2 strides, got"):
        replace(tiny(), decoder_blocks=(1, 2))
    with pytest.raises(
        ValueError, match="upsample: expected one of nearest, shuffle, separate, got 'cubic'"
    ):
        replace(tiny(), upsample="cubic")
