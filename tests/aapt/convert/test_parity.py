"""Converted checkpoints make the latents of a plain Wan on the weights they were made from."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aapt.checkpoint import load_config, tuples
from aapt.convert import wan_layout
from aapt.convert.job import convert
from aapt.convert.kinds import KINDS
from aapt.model.config import FewStepConfig, ModelConfig, sampling_config
from aapt.model.wan import WanTransformer
from aapt.model.world_model import WorldModel
from aapt.streaming.few_step import FewStepRollout

from .plain_native import PlainNativeWan, random_weights

SIZE = (4, 6)
LENGTHS = (3, 5)
# Rolling ones are in ../streaming/test_rolling.py; their layout is that of the others
STREAMS = [
    name
    for name, kind in KINDS.items()
    if isinstance(kind.sampling, FewStepConfig) and not kind.sampling.rolling
]


def load(folder: Path) -> WanTransformer:
    """The transformer of a converted checkpoint, float64."""
    net = WanTransformer(ModelConfig(**tuples(load_config(folder)["model"]))).double()
    prefix, tensors = "transformer.", load_file(folder / "model.safetensors")
    assert all(name.startswith(prefix) for name in tensors)
    net.load_state_dict({name.removeprefix(prefix): x for name, x in tensors.items()})
    return net.requires_grad_(False)


def prompts(branches: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Text, its lengths, and the same text as Wan takes it: padded to 512 rows of zeros. With two
    branches the negative prompts follow."""
    lengths = LENGTHS * branches
    text = torch.randn(len(lengths), 5, 24, dtype=torch.float64)
    padded = torch.zeros(len(lengths), 512, 24, dtype=torch.float64)
    for row, length in enumerate(lengths):
        padded[row, :length] = text[row, :length]
    return text, torch.tensor(lengths), padded


def brief(sampling: FewStepConfig) -> FewStepConfig:
    """Sampling in at most four passes, for the time of a test."""
    return dataclasses.replace(sampling, times=sampling.times[:: max(1, len(sampling.times) // 3)])


def noises(kind: str, chunks: int) -> list[Tensor]:
    """The draws of each chunk: one for each time, or one alone for UniPC."""
    preset = KINDS[kind]
    times = [preset.sampling.opening_times, *[preset.sampling.times] * (chunks - 1)]
    draws = [1 if preset.sampling.solver == "unipc" else len(each) for each in times]
    shape = (2, 4, preset.chunk, *SIZE)
    return [torch.randn(count, *shape, dtype=torch.float64) for count in draws]


def latents(
    net: WanTransformer, sampling: FewStepConfig, text: Tensor, lengths: Tensor, drawn: list[Tensor]
) -> Tensor:
    ours = FewStepRollout(net, text, lengths, SIZE, sampling)
    return torch.cat([ours.step(noise) for noise in drawn], dim=2)


def plain_latents(
    weights: dict[str, Tensor], kind: str, padded: Tensor, drawn: list[Tensor]
) -> Tensor:
    preset, made = KINDS[kind], []
    sampling = brief(preset.sampling)
    guidance = None if sampling.guidance == 1 else sampling.guidance
    plain = PlainNativeWan(weights, padded, preset.window_frames, preset.sink_frames)
    for index, noise in enumerate(drawn):
        times = sampling.times if index else sampling.opening_times
        if sampling.solver == "unipc":
            made.append(plain.unipc_chunk(noise[0], times, sampling.refresh, guidance))
        else:
            made.append(plain.chunk(noise, times, sampling.refresh))
    return torch.cat(made, dim=2)


@pytest.mark.parametrize("kind", STREAMS)
def test_a_converted_model_makes_the_latents_of_the_original(tmp_path, kind):
    """Chunk after chunk, until the ring has wrapped."""
    weights = random_weights()
    text, lengths, padded = prompts(branches=1 + len(KINDS[kind].sampling.negatives))
    torch.save({"generator": {f"model.{n}": x for n, x in weights.items()}}, tmp_path / "w.pt")
    convert(tmp_path / "w.pt", tmp_path / "out", kind)
    preset = KINDS[kind]
    sampling = sampling_config(tuples(load_config(tmp_path / "out")["sampling"]))
    assert sampling == preset.sampling
    drawn = noises(kind, (preset.window_frames + preset.sink_frames) // preset.chunk + 2)
    expected = plain_latents(weights, kind, padded, drawn)
    actual = latents(load(tmp_path / "out"), brief(sampling), text, lengths, drawn)
    assert expected.std() > 0.3
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fault", ["neighbours stay", "values before keys", "channels first"])
def test_a_wrong_layout_is_seen(tmp_path, monkeypatch, fault):
    """Each step of the layout matters to the latents."""
    if fault == "neighbours stay":
        monkeypatch.setattr(wan_layout, "to_halves", lambda rows, heads: rows)
    elif fault == "values before keys":
        monkeypatch.setattr(wan_layout, "joined", lambda k, v: torch.cat([v, k]))
    else:
        monkeypatch.setattr(wan_layout, "patch_columns", lambda weight: weight.flatten(1))
    kind, weights, (text, lengths, padded) = "one-forcing", random_weights(), prompts()
    save_file(weights, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "out", kind)
    drawn = noises(kind, 3)
    expected = plain_latents(weights, kind, padded, drawn)
    actual = latents(load(tmp_path / "out"), KINDS[kind].sampling, text, lengths, drawn)
    assert (actual - expected).abs().max() > 0.05


def diffusers_model():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        ffn_dim=96,
        num_layers=2,
    )
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):  # ones would hide a wrong order
            torch.nn.init.uniform_(parameter, 0.5, 2)
    return model.requires_grad_(False)


@pytest.mark.parametrize("shards", [False, True])
def test_a_diffusers_folder(tmp_path, shards):
    """All frames see all frames, as in Wan. diffusers computes its norms and times in float32, so
    float32 is what its model allows."""
    theirs = diffusers_model()
    folder = tmp_path / "pipeline" / "transformer"
    theirs.save_pretrained(folder, max_shard_size="1MB" if shards else "10GB")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == shards
    convert(tmp_path / "pipeline", tmp_path / "out", "wan2.1-t2v")
    x, t = torch.randn(2, 4, 3, *SIZE), torch.tensor([1.0, 0.5])
    text, lengths, padded = prompts()
    expected = theirs(x, 1000 * t, padded.float()).sample
    inputs = (x.double(), None, None, text, lengths, t.double())
    actual = load(tmp_path / "out")(*inputs, causal=False)
    assert expected.std() > 0.3
    torch.testing.assert_close(actual, expected.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("columns", ["zero", "random"])
def test_recycling_widens_the_patch_embedding(tmp_path, columns):
    """With zero columns the model computes what it did, whatever it recycles."""
    weights, (text, lengths, _) = random_weights(), prompts()
    save_file(weights, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "plain", "wan2.1-t2v")
    written = convert(tmp_path / "w.safetensors", tmp_path / "start", "wan2.1-t2v", recycle=columns)
    assert "sampling" not in written
    plain, start = load(tmp_path / "plain"), load(tmp_path / "start")
    config = start.config
    assert config.recycle and config.sink_distance == "clamped"
    assert (config.sink_frames, config.window_frames, config.chunk) == (1, 19, 1)
    x, recycled = torch.randn(2, 2, 4, 3, *SIZE, dtype=torch.float64)
    inputs = (text, lengths, torch.tensor([1.0, 0.5], dtype=torch.float64))
    expected = plain(x, None, None, *inputs, causal=False)
    start.requires_grad_(True)
    actual = start(x, recycled, None, *inputs, causal=False)
    same = torch.allclose(actual, expected, rtol=0, atol=1e-12)
    assert same == (columns == "zero")
    (gradient,) = torch.autograd.grad(actual.square().sum(), start.video_in.weight)
    assert gradient.unflatten(1, (4, 8))[:, :, 4:].abs().min() > 0  # zero columns learn at once
    world = WorldModel(config, None)
    world.load_start(tmp_path / "start" / "model.safetensors")  # as training does
    assert torch.equal(world.transformer.video_in.weight.double(), start.video_in.weight.float())
    again = convert(tmp_path / "w.safetensors", tmp_path / "again", "wan2.1-t2v", recycle=columns)
    assert again == written
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "start")]
    assert files[0] == files[1]


@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("style", ["peft", "down-up"])
def test_a_low_rank_adaptation_is_added(tmp_path, style, alpha):
    """W + alpha / rank up down; alpha is the kind's, 256, unless the file has its own."""
    weights, rank = random_weights(), 2
    factors, expected = {}, dict(weights)
    names = ("lora_A.default", "lora_B.default") if style == "peft" else ("lora_down", "lora_up")
    prefix = "base_model.model." if style == "peft" else "diffusion_model."
    for layer in ("blocks.0.self_attn.q", "blocks.1.cross_attn.k", "blocks.1.ffn.2"):
        outputs, inputs = weights[f"{layer}.weight"].shape
        down, up = torch.randn(rank, inputs).double(), torch.randn(outputs, rank).double()
        factors[f"{prefix}{layer}.{names[0]}.weight"] = down
        factors[f"{prefix}{layer}.{names[1]}.weight"] = up
        if alpha:
            factors[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
        expected[f"{layer}.weight"] = weights[f"{layer}.weight"] + (alpha or 256) / rank * up @ down
    torch.save({"generator": weights}, tmp_path / "base.pt")
    torch.save({"generator_lora": factors}, tmp_path / "lora.pt")
    torch.save({"generator": expected}, tmp_path / "merged.pt")
    convert(tmp_path / "base.pt", tmp_path / "out", "longlive-1.3b", lora=tmp_path / "lora.pt")
    convert(tmp_path / "merged.pt", tmp_path / "expected", "longlive-1.3b")
    actual, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "expected"))
    assert set(actual) == set(merged)
    for name, tensor in merged.items():
        torch.testing.assert_close(actual[name], tensor, msg=name)
