"""Wan-type transformers: against diffusers' own, streaming == parallel, gradients, the cache."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from aapt.model.wan import WanTransformer

from ..helpers import SIZE, WAN

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


def diffusers_model() -> nn.Module:
    pytest.importorskip("diffusers")
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
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


def clip(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, text whose padding is zero, its lengths, and times."""
    torch.manual_seed(1)
    x, text = torch.randn(2, 4, CLIP, *SIZE), torch.randn(2, 5, 8)
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
