"""Distances in feature space: named features, and the user's networks."""

import builtins
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aapt.data.tiny_world.rendered_clips import sample_clip
from aapt.data.tiny_world.themes import THEMES
from aapt.evaluate.features import FAINT, describe, feature_distance
from aapt.evaluate.pretrained import PretrainedDistance
from aapt.media.figures import MissingLibrary

HEIGHT, WIDTH = 40, 64


@pytest.fixture(scope="module")
def real():
    """Render clips of two frames from all themes: (72, 2, H, W, 3)."""
    videos = [
        sample_clip(70 + i, 10, theme=i % len(THEMES), height=HEIGHT, width=WIDTH).video
        for i in range(12)
    ]
    return torch.cat([video[1:].unflatten(0, (-1, 6))[:, -2:] for video in videos])


def each_frame(clips, change):
    """Change every frame as an image (N, 3, H, W) in 0 to 255."""
    frames = clips.flatten(0, 1).permute(0, 3, 1, 2).float()
    changed = change(frames).round().clamp(0, 255).to(torch.uint8)
    return changed.permute(0, 2, 3, 1).unflatten(0, clips.shape[:2])


def blurred(clips, radius):
    size = 2 * radius + 1
    pad = (radius,) * 4
    return each_frame(clips, lambda x: F.avg_pool2d(F.pad(x, pad, "replicate"), size, 1))


def noisy(clips, strength):
    return each_frame(clips, lambda x: x + strength * torch.randn_like(x))


def tinted(clips, strength):
    shift = torch.tensor([strength, 0.0, -strength])[:, None, None]
    return each_frame(clips, lambda x: x + shift)


def washed_out(clips, share):
    return each_frame(clips, lambda x: x.lerp(x.mean(dim=(1, 2, 3), keepdim=True), share))


def tiled(clips, width):
    return each_frame(clips, lambda x: x[..., :width].repeat(1, 1, 1, WIDTH // width))


def frozen(clips, share):
    """Let a share of the clips stand still."""
    clips = clips.clone()
    still = round(share * len(clips))
    clips[:still, 1] = clips[:still, 0]
    return clips


@pytest.mark.parametrize(
    ("degrade", "levels"),
    [
        (blurred, (1, 2, 4)),
        (noisy, (4, 12, 36)),
        (tinted, (12, 30, 75)),
        (washed_out, (0.2, 0.5, 0.9)),
        (tiled, (32, 16, 8)),
        (frozen, (0.2, 0.5, 1.0)),
    ],
)
def test_the_distance_grows_with_every_degradation(real, degrade, levels):
    """Compare with the distance by chance: half of the clips from all of them."""
    features = describe(real)
    chance = feature_distance(features[::2], features)
    found = [feature_distance(describe(degrade(real, level)), features) for level in levels]
    assert feature_distance(features, features) == 0
    assert found == sorted(found) and found[0] > chance > 0 and found[-1] > 1.5 * found[0]


def test_features_have_names():
    """Check two colours, one above the other: only the edge between them changes."""
    clip = torch.zeros(1, 2, 48, 64, 3, dtype=torch.uint8)
    clip[:, :, 24:] = torch.tensor([255, 102, 0], dtype=torch.uint8)
    (features,) = describe(clip)
    assert features.shape == (54,)
    across, below, later, colour = features[:12].view(4, 3)  # top, middle, bottom at full size
    still = math.log(FAINT)
    for values in (across, later, colour):
        assert values.tolist() == pytest.approx([still] * 3, abs=1e-5)
    step = (255 + 102) / 3 / 255 / 16  # luma changes in one of the 16 rows of the middle third
    edge = below.tolist()
    assert edge == pytest.approx([still, math.log(step + FAINT), still], abs=1e-3)
    luma, red_green, yellow_blue = features[45:].view(3, 3)
    assert luma.tolist()[::2] == pytest.approx([-0.5, (255 + 102) / 3 / 255 - 0.5], abs=1e-5)
    assert red_green.tolist()[::2] == pytest.approx([0, 0.6], abs=1e-5)
    assert yellow_blue.tolist()[::2] == pytest.approx([0, 0.7], abs=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (17, 29), (80, 128)])
def test_features_of_any_size_are_finite(size):
    clips = torch.randint(0, 256, (2, 2, *size, 3), dtype=torch.uint8)
    assert describe(clips).shape == (2, 54) and describe(clips).isfinite().all()


def test_feature_distance_against_numpy():
    random = np.random.default_rng(0)
    made, true = random.normal(1, 2, (30, 5)), random.normal(0, 1, (40, 5))
    true[:, 4] = 3.0  # never varies: the least deviation counts
    scale = np.maximum(true.std(axis=0), 0.02)
    error = (made.mean(axis=0) - true.mean(axis=0)) ** 2 + (
        made.std(axis=0) - true.std(axis=0)
    ) ** 2
    expected = np.sqrt((error / scale**2).mean())
    found = feature_distance(torch.tensor(made), torch.tensor(true))
    assert found == pytest.approx(expected)
    assert feature_distance(torch.tensor(made[:1]), torch.tensor(true)) > 0  # one video is enough
    with pytest.raises(ValueError, match=r"features: expected \(N, 5\), .*got \(30, 4\)"):
        feature_distance(torch.tensor(made[:, :4]), torch.tensor(true))


# Networks.


class OfFrames(nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False):
        assert return_features
        return images.float().mean(dim=(2, 3)) / 255


class OfClips(nn.Module):
    def forward(
        self,
        clips: torch.Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ):
        assert rescale and resize and return_features
        assert clips.shape[2] == 16 and clips.dtype == torch.float32
        return clips.mean(dim=(3, 4)).flatten(1)[:, ::8] / 255


class OfNothing(nn.Module):
    def forward(self, images: torch.Tensor):
        return images.float()


def save(folder, network):
    path = folder / "network.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        torch.jit.script(network).save(str(path))
    return path


def frechet(a, b):
    """Compute the distance of two Gaussians by eigenvalues of the product of covariances."""
    a, b = a.double().numpy(), b.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
    gap = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    return gap + np.trace(first) + np.trace(second) - 2 * roots


def videos(frames=33):
    random = torch.Generator().manual_seed(0)
    light = torch.randint(60, 200, (5, frames, 1, 1, 3), generator=random)
    return (light + torch.randint(-40, 40, (5, frames, 8, 12, 3), generator=random)).byte()


def test_fid_of_all_frames(tmp_path):
    fid = PretrainedDistance("fid", save(tmp_path, OfFrames()))
    made, true = videos(), videos().flip(-1) // 2
    colours = [video.double().mean(dim=(2, 3)).flatten(0, 1) / 255 for video in (made, true)]
    assert fid(made, true) == pytest.approx(frechet(*colours), rel=1e-4)
    assert fid(true, true) == pytest.approx(0, abs=1e-6)
    assert fid(made[:1, :1], true) is None


def test_fvd_of_clips_of_sixteen_frames(tmp_path):
    fvd = PretrainedDistance("fvd", save(tmp_path, OfClips()))
    made, true = videos(), videos().flip(0) // 2
    features = [
        video[:, :32].unflatten(1, (2, 16)).flatten(0, 1).double().mean(dim=(2, 3)) / 255
        for video in (made, true)
    ]
    features = [x.transpose(1, 2).flatten(1)[:, ::8] for x in features]  # colour by colour
    assert fvd(made, true) == pytest.approx(frechet(*features), rel=1e-3)
    assert fvd.frames == 16 and fvd(made[:, :15], true[:, :15]) is None


def test_files_without_a_network_are_refused(tmp_path):
    with pytest.raises(ValueError, match="fid: expected a TorchScript file, got .*no such file"):
        PretrainedDistance("fid", tmp_path / "none.pt")
    with pytest.raises(ValueError, match="fid: expected a TorchScript file, got .*: File name too"):
        PretrainedDistance("fid", tmp_path / (300 * "a"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"fvd: expected a TorchScript file, got .*text\.pt"):
        PretrainedDistance("fvd", tmp_path / "text.pt")


def test_a_network_that_returns_something_else_is_refused(tmp_path):
    fid = PretrainedDistance("fid", save(tmp_path, OfNothing()))
    with pytest.raises(ValueError, match=r"network.pt to return features \(N, D\), got \(1, 3, 8,"):
        fid(videos(), videos())
    fvd = PretrainedDistance("fvd", save(tmp_path, OfFrames()))
    with pytest.raises(ValueError, match=r"fvd: expected .*network.pt to return features"):
        fvd(videos(), videos())


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_torchmetrics(name, *args):
        if name.startswith("torchmetrics"):
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_torchmetrics)
    with pytest.raises(MissingLibrary, match=r"installed, for fid; pip install 'aapt\[train\]'"):
        PretrainedDistance("fid", tmp_path)
