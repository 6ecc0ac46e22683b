"""Wan's weights in our network: the same latents and pictures as diffusers' module."""

import copy
import json

import pytest
import torch

from aapt.checkpoint import CheckpointError, read_tensors, save_config, save_tensors
from aapt.vae import CausalVAE, load_wan, wan, wan22
from aapt.vae.folder import load_vae, save_vaes
from aapt.vae.wan_statistics import DEVIATION, MEAN
from aapt.vae.wan_weights import WEIGHTS

diffusers = pytest.importorskip("diffusers", reason="diffusers: not installed; pip install it")

SHAPES = {
    "2.1": dict(base_dim=8),
    "2.2": dict(
        base_dim=8,
        decoder_base_dim=16,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=list(MEAN[48]),
        latents_std=list(DEVIATION[48]),
    ),
}


@pytest.fixture(scope="module", params=SHAPES)
def theirs(request):
    """Random everywhere: at initialisation norms are one and biases small."""
    torch.manual_seed(0)
    module = diffusers.AutoencoderKLWan(**SHAPES[request.param]).requires_grad_(False).eval()
    for name, parameter in module.named_parameters():
        spread = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.normal_(std=spread)
        if name.endswith("gamma"):
            parameter += 1
    return module


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return load_wan(folder).requires_grad_(False)


def statistics(theirs):
    """Mean and deviation of the latents, as broadcast over them."""
    config = theirs.config
    shape = (1, config.z_dim, 1, 1, 1)
    return (torch.tensor(x).view(shape) for x in (config.latents_mean, config.latents_std))


def assert_as_close(actual, plain, exact, factor):
    """No further from float64 than diffusers is in the same precision, within a factor."""
    errors = [(x.double() - exact).square().mean().sqrt() for x in (actual, plain)]
    assert errors[0] <= factor * errors[1] + 1e-9 * exact.abs().max()


def in_precision(module, dtype):
    return copy.deepcopy(module).to(dtype)


def video_of(theirs, frames, height, width):
    """Video of a latent of height x width."""
    space = theirs.config.scale_factor_spatial
    return torch.randn(1, 3, frames, height * space, width * space)


def encoded(theirs, video, dtype):
    return in_precision(theirs, dtype).encode(video.to(dtype)).latent_dist.mean


def decoded(theirs, latent, dtype):
    return in_precision(theirs, dtype).decode(latent.to(dtype)).sample


def encode_in_chunks(vae, video, plan):
    state, latents = None, []
    for chunk in video.split(plan, dim=2):
        latent, state = vae.encode_frames(chunk, state)
        latents.append(latent)
    return torch.cat(latents, dim=2)


def decode_in_chunks(vae, latent, plan):
    state, video = None, []
    for chunk in latent.split(plan, dim=2):
        frames, state = vae.decode_frame(chunk, state)
        video.append(frames)
    return torch.cat(video, dim=2)


@pytest.mark.parametrize("plan", [(9,), (1, 4, 4), (5, 4)], ids=str)
def test_encoding_equals_diffusers(theirs, ours, plan):
    video = video_of(theirs, 9, 3, 2)
    exact = encoded(theirs, video, torch.float64)
    mean, std = (x.double() for x in statistics(theirs))
    latent = encode_in_chunks(in_precision(ours, torch.float64), video.double(), plan)
    # Our statistics were rounded to float32 in the loaded model
    assert (latent * std + mean - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("plan", [(1, 1, 1), (1, 2), (3,)], ids=str)
def test_decoding_equals_diffusers(theirs, ours, plan):
    latent = torch.randn(1, theirs.config.z_dim, 3, 3, 2)
    exact = decoded(theirs, latent, torch.float64)
    mean, std = (x.double() for x in statistics(theirs))
    given = (latent.double() - mean) / std
    video = decode_in_chunks(in_precision(ours, torch.float64), given, plan)
    assert (video.clamp(-1, 1) - exact).abs().max() <= 1e-6


# In float32 oneDNN convolves ours by another algorithm on AVX-512: 1.56, and 1.26 on AVX2
@pytest.mark.parametrize("dtype, factor", [(torch.float32, 2.0), (torch.bfloat16, 1.0)])
def test_no_further_from_float64_than_diffusers(theirs, ours, dtype, factor):
    mean, std = statistics(theirs)
    # Several, because the error of one is a matter of the order in which a processor sums
    video = torch.cat([video_of(theirs, 5, 3, 2) for _ in range(8)])
    latent = torch.randn(8, theirs.config.z_dim, 2, 3, 2)
    plain, exact = (encoded(theirs, video, kind) for kind in (dtype, torch.float64))
    actual = in_precision(ours, dtype).encode(video.to(dtype))
    assert_as_close(actual, (plain.double() - mean) / std, (exact - mean) / std, factor)
    # The picture alone: diffusers clamps
    plain, exact = (decoded(theirs, latent, kind) for kind in (dtype, torch.float64))
    given = ((latent - mean) / std).to(dtype)
    actual = in_precision(ours, dtype).decode(given).clamp(-1, 1)
    assert_as_close(actual, plain, exact, factor)


@pytest.mark.parametrize(
    "shape, published",
    [
        (wan(), {}),
        (wan22(), SHAPES["2.2"] | dict(base_dim=160, decoder_base_dim=256)),
    ],
    ids=SHAPES,
)
def test_published_shape(shape, published):
    """Parameters of the published network, without its encoder's projection, folded into the last
    convolution, and without the variance that this gives beside the mean."""
    with torch.device("meta"):
        ours = CausalVAE(shape)
        theirs = diffusers.AutoencoderKLWan(**published)
    dropped = sum(p.numel() for p in theirs.quant_conv.parameters())
    dropped += sum(p.numel() for p in theirs.encoder.conv_out.parameters()) // 2
    counts = [sum(p.numel() for p in module.parameters()) for module in (ours, theirs)]
    assert counts[0] + dropped == counts[1]


def test_our_folder_gives_the_same_bits(ours, tmp_path):
    save_config(tmp_path, save_vaes(tmp_path, {"vae": ours}))
    loaded = load_vae(tmp_path)
    latent = torch.randn(1, ours.config.latent_channels, 2, 2, 3)
    assert loaded.config == ours.config
    assert torch.equal(loaded.decode(latent), ours.decode(latent))


def rewritten(folder, tmp_path, change_config=None, change_tensors=None):
    config = json.loads((folder / "config.json").read_text())
    tensors = read_tensors(folder / WEIGHTS)
    if change_config:
        change_config(config)
    if change_tensors:
        change_tensors(tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_tensors(tmp_path / WEIGHTS, tensors)
    return tmp_path


def test_bad_folders_are_named(folder, theirs, tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: expected a Wan VAE's configuration"):
        load_wan(tmp_path)

    def load(**changes):
        return load_wan(rewritten(folder, tmp_path, **changes))

    version = "2.2" if theirs.config.is_residual else "2.1"
    wanted = rf"dim_mult: expected \[1, 2, 4, 4\], as in Wan {version}, got \[1, 2\]"
    with pytest.raises(CheckpointError, match=wanted):
        load(change_config=lambda config: config.update(dim_mult=[1, 2]))
    with pytest.raises(
        CheckpointError, match="expected tensor post_quant_conv.bias, which is miss"
    ):
        load(change_tensors=lambda tensors: tensors.pop("post_quant_conv.bias"))
    with pytest.raises(CheckpointError, match="tensor surplus belongs to no parameter"):
        load(change_tensors=lambda tensors: tensors.update(surplus=torch.zeros(1)))
    shape = tuple(theirs.decoder.conv_in.weight.shape)
    wanted = rf"decoder.conv_in.weight: expected \({shape[0]}, {shape[1]}, 3, 3, 3\), got"
    with pytest.raises(CheckpointError, match=wanted):
        load(
            change_tensors=lambda tensors: tensors.update(
                {"decoder.conv_in.weight": torch.zeros(*shape[:4], 1)}
            )
        )
    rows = 2 * theirs.config.z_dim
    with pytest.raises(
        CheckpointError, match=rf"encoder.conv_out.bias: expected {rows} rows, as q"
    ):
        load(
            change_tensors=lambda tensors: tensors.update({"encoder.conv_out.bias": torch.zeros(1)})
        )
    with pytest.raises(CheckpointError, match=r"decoder.conv_out.weight, which is missing; pass W"):
        load(change_tensors=lambda tensors: tensors.pop("decoder.conv_out.weight"))
    (tmp_path / WEIGHTS).write_bytes(b"\x00" * 5)
    with pytest.raises(CheckpointError, match="truncated or foreign file"):
        load_wan(tmp_path)


# Wan's own layout, written here by hand: ModelTC/LightX2V, video_encoders/hf/wan/{vae,vae_2_2}.py.
PARTS = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
MIDDLE = {"resnets.0": "middle.0", "attentions.0": "middle.1", "resnets.1": "middle.2"}


def native_name(name: str, residual: bool) -> str:
    """Wan's own name of a tensor of diffusers'."""
    if name.startswith(("quant_conv", "post_quant_conv")):
        return name.replace("post_quant_conv", "conv2").replace("quant_conv", "conv1")
    side, part, *rest = name.split(".")
    if part in ENDS:
        return ".".join([side, ENDS[part], *rest])
    if part == "mid_block":
        place, rest = MIDDLE[".".join(rest[:2])], rest[2:]
    elif residual:
        group = "downsamples" if side == "encoder" else "upsamples"
        last = 2 if side == "encoder" else 3
        inner, after = (rest[2], rest[3:]) if rest[1] == "resnets" else (last, rest[2:])
        place, rest = f"{group}.{rest[0]}.{group}.{inner}", after
    elif side == "encoder":
        place, rest = f"downsamples.{rest[0]}", rest[1:]
    else:
        inner = int(rest[2]) if rest[1] == "resnets" else 3
        place, rest = f"upsamples.{4 * int(rest[0]) + inner}", rest[3:]
    if rest[0] == "conv_shortcut":
        rest[0] = "shortcut"
    return ".".join([side, place, *[PARTS.get(part, part) for part in rest]])


@pytest.fixture(scope="module")
def native(theirs):
    """The tensors under Wan's own names."""
    residual = theirs.config.is_residual
    return {native_name(name, residual): x for name, x in theirs.state_dict().items()}


@pytest.mark.parametrize("wrapper", [None, "state_dict", "gen_model"])
def test_files_in_wans_own_layout(native, ours, wrapper, tmp_path):
    path = tmp_path / "vae.pth"
    torch.save({wrapper: native} if wrapper else native, path)
    loaded = load_vae(path)
    assert loaded.config == ours.config
    # Not bit for bit: the projection that is folded in rounds by the alignment of its memory
    torch.testing.assert_close(loaded.state_dict(), ours.state_dict())


def test_pruned_decoders(theirs, native, ours, tmp_path):
    """LightVAE: fewer channels, and in Matrix-Game 3's files diffusers' names, tensors of the
    distillation, and perhaps no encoder."""
    path = tmp_path / "light.safetensors"
    save_tensors(path, {name: x for name, x in native.items() if not name.startswith("encoder")})
    decoder = load_wan(path)
    latent = torch.randn(1, theirs.config.z_dim, 2, 2, 3)
    assert torch.equal(decoder.decode(latent), ours.decode(latent))
    with pytest.raises(ValueError, match="encoder: expected an autoencoder, got a decoder alone; "):
        decoder.encode(video_of(theirs, 1, 1, 1))

    tensors = {name: x.clone() for name, x in theirs.state_dict().items()}
    tensors["dynamic_feature_projection_heads.0.weight"] = torch.zeros(3)
    path = tmp_path / "MG-LightVAE.pth"
    torch.save({"generator": tensors}, path)
    assert torch.equal(load_wan(path).decode(latent), ours.decode(latent))


def test_bad_files_are_named(native, tmp_path):
    path = tmp_path / "vae.pth"
    with pytest.raises(CheckpointError, match="vae.pth: expected a checkpoint folder or one of"):
        load_vae(path)
    path.write_bytes(b"PK nothing")
    with pytest.raises(CheckpointError, match="vae.pth: expected a file of torch.save with tens"):
        load_vae(path)
    torch.save({"decoder.conv1.weight": 3}, path)
    with pytest.raises(CheckpointError, match="decoder.conv1.weight: expected a tensor, got int"):
        load_vae(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="expected tensors by name, got list"):
        load_vae(path)
    torch.save({"model.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="decoder.conv_out.weight, which is missing; pass Wa"):
        load_vae(path)
    torch.save({**native, "more": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="tensor more belongs to no parameter"):
        load_vae(path)
