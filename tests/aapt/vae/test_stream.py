"""A stream through the decoder in fixed memory: the same pixels as without, streams that stay
apart. Where there is no CUDA device a stand-in for a graph replays from the same addresses."""

import copy

import pytest
import torch

from aapt.vae import DecoderStream, stream

from .test_autoencoder import CONFIGS, make_vae


def stand_in(function, device, pool=None):
    """Replays as a graph does: one output tensor, inputs and states at the addresses of the
    capture."""
    out = function()
    return lambda: out.copy_(function())


@pytest.fixture(params=["eager", "replayed"])
def replays(request, monkeypatch):
    if request.param == "replayed":
        monkeypatch.setattr(stream, "capture", stand_in)
    return request.param == "replayed"


def expected(vae, latents):
    """The stream as `decode_frame` makes it."""
    frames, state = [], None
    for latent in latents:
        pixels, state = vae.decode_frame(latent, state, pixels=True)
        frames.append(pixels)
    return torch.cat(frames, dim=2)


def play(decoder, latents):
    return torch.cat([decoder.decode(latent).clone() for latent in latents], dim=2)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_are_those_of_decode_frame(replays, name, batch):
    vae = make_vae(CONFIGS[name])
    latents = torch.randn(4, batch, vae.config.latent_channels, 1, 3, 5)
    decoder = DecoderStream(vae, latents[0].shape)
    assert torch.equal(play(decoder, latents), expected(vae, latents))
    assert decoder.frames == 4


@pytest.mark.parametrize("name", ["tiny", "wan"])
def test_interleaved_streams_equal_each_alone(replays, name):
    vae = make_vae(CONFIGS[name])
    latents = torch.randn(2, 3, 1, 16, 1, 3, 4)
    decoders = [DecoderStream(vae, latents[0, 0].shape) for _ in range(2)]
    frames = [[], []]
    for step in range(3):
        for i, decoder in enumerate(decoders):
            frames[i].append(decoder.decode(latents[i, step]).clone())
    for i in range(2):
        assert torch.equal(torch.cat(frames[i], dim=2), expected(vae, latents[i]))


def test_reset_forgets_the_past(replays):
    vae = make_vae(CONFIGS["tiny"])
    latents = torch.randn(3, 1, 16, 1, 3, 4)
    decoder = DecoderStream(vae, latents[0].shape)
    once = play(decoder, latents)
    decoder.reset()
    assert torch.equal(play(decoder, latents), once)


def test_memory_stays_where_it_is(replays):
    vae = make_vae(CONFIGS["light"])
    latents = torch.randn(5, 1, 16, 1, 2, 3)
    decoder = DecoderStream(vae, latents[0].shape)
    addresses = [part.data_ptr() for part in decoder._states.tensors]
    frames = [decoder.decode(latent) for latent in latents]
    assert [part.data_ptr() for part in decoder._states.tensors] == addresses
    if replays:  # one output tensor for the first step, one for the others
        assert len({pixels.data_ptr() for pixels in frames}) == 2


def test_a_state_can_be_replaced_in_place():
    vae = make_vae(CONFIGS["wan"])
    latents = torch.randn(3, 1, 16, 1, 2, 3)
    _, state = vae.decode_frame(latents[0])
    video, wanted = vae.decode_frame(latents[1], state)
    again, returned = vae.decode_frame(latents[1], state, state_out=state)
    assert torch.equal(again, video)
    for old, new, same in zip(state, wanted, returned, strict=True):
        assert same is old and torch.equal(old, new)


def test_changed_weights_are_packed_again():
    """Frozen weights are packed once for small pictures; a copy of the network packs its own."""
    vae = make_vae(CONFIGS["tiny"])
    latents = torch.randn(2, 1, 16, 1, 3, 4)
    before = expected(vae, latents)
    for parameter in vae.decoder.parameters():
        parameter.mul_(1.5)
    after = expected(vae, latents)
    assert torch.equal(after, expected(copy.deepcopy(vae), latents))
    assert not torch.equal(after, before)


def test_any_precision_and_any_mode(replays):
    """Made under inference mode and used outside of it, with latents of the model's precision."""
    vae = make_vae(CONFIGS["tiny"])
    latents = torch.randn(2, 1, 16, 1, 3, 4).bfloat16()
    with torch.inference_mode():
        decoder = DecoderStream(vae, latents[0].shape)
    assert torch.equal(play(decoder, latents), expected(vae, latents.float()))


def test_not_a_number_becomes_black(replays):
    vae = make_vae(CONFIGS["tiny"])
    latent = torch.full((1, 16, 1, 3, 4), torch.nan)
    assert (DecoderStream(vae, latent.shape).decode(latent) == 0).all()


def test_other_shapes_are_refused_and_change_nothing(replays):
    vae = make_vae(CONFIGS["tiny"])
    for shape in ((1, 4, 1, 3, 4), (1, 16, 2, 3, 4), (1, 16, 3, 4), (1, 16, 1, 0, 4)):
        with pytest.raises(ValueError, match=r"shape: expected \(batch, 16, 1, height, width\), g"):
            DecoderStream(vae, shape)
    latents = torch.randn(2, 1, 16, 1, 3, 4)
    decoder = DecoderStream(vae, latents[0].shape)
    first = decoder.decode(latents[0]).clone()
    with pytest.raises(ValueError, match=r"latent: expected \(1, 16, 1, 3, 4\) in this stream, go"):
        decoder.decode(torch.randn(1, 16, 1, 3, 5))
    second = decoder.decode(latents[1])
    assert torch.equal(torch.cat([first, second], dim=2), expected(vae, latents))


def test_nothing_has_a_gradient_where_graphs_are_captured(monkeypatch):
    seen = []

    def capture(function, device, pool=None):
        seen.append(torch.is_grad_enabled())
        return function

    monkeypatch.setattr(stream, "capture", capture)
    vae = make_vae(CONFIGS["tiny"]).requires_grad_(True)
    DecoderStream(vae, (1, 16, 1, 3, 4))
    with torch.inference_mode():
        DecoderStream(vae, (1, 16, 1, 3, 4))
    assert seen == [False] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["light", "wan", "tiny"])
def test_graphs_on_a_device(name, dtype):
    """Replays equal eager steps bit for bit, alternate with another stream, and allocate
    nothing."""
    vae = make_vae(CONFIGS[name]).to("cuda", dtype)
    latents = torch.randn(2, 4, 1, 16, 1, 3, 5, dtype=dtype, device="cuda")
    wanted = [expected(vae, stream_latents) for stream_latents in latents]
    decoders = [DecoderStream(vae, latents[0, 0].shape) for _ in range(2)]
    frames, memory = [[], []], torch.cuda.memory_allocated()
    for step in range(4):
        for i, decoder in enumerate(decoders):
            frames[i].append(decoder.decode(latents[i, step]).cpu())
    assert torch.cuda.memory_allocated() == memory
    for i in range(2):
        assert torch.equal(torch.cat(frames[i], dim=2), wanted[i].cpu())
