"""Files and folders that a conversion reads: what is found in them, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aapt.checkpoint import CheckpointError
from aapt.convert.job import convert
from aapt.convert.kinds import KINDS
from aapt.convert.names import wan_name
from aapt.convert.tensor_files import find_tensors

from .plain_native import random_weights

MODEL = "model.safetensors"


def converted_bias(folder):
    return load_file(folder / MODEL)["transformer.video_in.bias"]


def test_wrapped_names_and_the_entry(tmp_path):
    """Names that FSDP has wrapped; the kind's entry, or the one that is asked for."""
    first, second = random_weights(), random_weights()
    wrapped = {f"model._fsdp_wrapped_module.{n}": x for n, x in first.items()}
    file = tmp_path / "w.pt"
    torch.save({"generator": second, "generator_ema": wrapped, "step": 3}, file)
    for out, kind, entry, weights in (
        ("averaged", "self-forcing", None, first),
        ("plain", "causal-forcing-chunkwise", None, second),
        ("asked", "self-forcing", "generator", second),
    ):
        convert(file, tmp_path / out, kind, entry=entry)
        assert torch.equal(converted_bias(tmp_path / out), weights["patch_embedding.bias"]), out


@pytest.mark.parametrize(
    ("name", "wans"),
    [
        ("condition_embedder.time_proj.weight", "time_projection.1.weight"),
        ("blocks.3.attn1.to_out.0.bias", "blocks.3.self_attn.o.bias"),
        ("blocks.3.attn2.to_q.weight", "blocks.3.cross_attn.q.weight"),
        ("blocks.3.attn2.norm_k.weight", "blocks.3.cross_attn.norm_k.weight"),
        ("blocks.3.norm2.weight", "blocks.3.norm3.weight"),
        ("blocks.3.scale_shift_table", "blocks.3.modulation"),
        ("scale_shift_table", "head.modulation"),
        ("proj_out.bias", "head.head.bias"),
        ("module.model._fsdp_wrapped_module.head.head.bias", "head.head.bias"),
        ("model.blocks.0._checkpoint_wrapped_module.ffn.0.bias", "blocks.0.ffn.0.bias"),
        ("time_projection.1.weight", "time_projection.1.weight"),
        ("blocks.10.norm3.bias", "blocks.10.norm3.bias"),
    ],
)
def test_names(name, wans):
    assert wan_name(name) == wans


def test_the_precision_of_the_file_stays(tmp_path):
    weights = {name: x.bfloat16() for name, x in random_weights().items()}
    weights["patch_embedding.bias"] = weights["patch_embedding.bias"].float()
    save_file(weights, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "out", "one-forcing")
    kinds = {name: x.dtype for name, x in load_file(tmp_path / "out" / MODEL).items()}
    assert kinds.pop("transformer.video_in.bias") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_stored_tensor_is_read(tmp_path, suffix, dtype):
    """Views, transposed, scalar and empty tensors too, where the format has them."""
    whole = torch.randn(5, 7).to(dtype)
    tensors = {"whole": whole, "scalar": torch.tensor(3.5, dtype=dtype), "empty": whole[:0]}
    file = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        tensors |= {"rows": whole[2:], "turned": whole.t(), "column": whole[:, 3]}
        torch.save(tensors, file)
    else:
        save_file({name: x.clone() for name, x in tensors.items()}, file)
    found = find_tensors(file, ("generator",))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        assert torch.equal(found[name].read(), tensor), name


def test_every_kind_says_where_it_is_from():
    page = (Path(__file__).parents[3] / "docs/open-models.md").read_text()
    for name, kind in KINDS.items():
        assert kind.source and kind.licence and kind.weights, name
        assert f"| `{name}`" in page or f"`, `{name}` |" in page, name
        assert (kind.window_frames + 1) % kind.chunk == kind.sink_frames % kind.chunk == 0, name
    assert KINDS["self-forcing"].licence.startswith("CC-BY-NC-SA-4.0")
    assert KINDS["self-forcing"].sampling.times == pytest.approx((1, 15 / 16, 5 / 6, 5 / 8))


def refuse(weights, tmp_path, words, kind="one-forcing", **options):
    file, out = tmp_path / "w.pt", tmp_path / "out"
    torch.save(weights, file)
    with pytest.raises(ValueError, match=f"^{re.escape(words.format(file=file))}$") as error:
        convert(file, out, kind, **options)
    assert not out.exists()
    return error.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"blocks.1.ffn.0.weight": None},
            "{file}: expected tensor blocks.1.ffn.0.weight, which is missing",
        ),
        (
            {"patch_embedding.weight": None},
            "{file}: expected tensor patch_embedding.weight, which is missing; pass a Wan "
            "transformer",
        ),
        (
            {"blocks.0.self_attn.gate": torch.zeros(3)},
            "{file}: tensor blocks.0.self_attn.gate belongs to no parameter of the model",
        ),
        (
            {"blocks.1.ffn.0.weight": torch.zeros(96, 255)},
            "{file}: blocks.1.ffn.0.weight: expected tensors that make (96, 256) of one dtype, got "
            "(96, 255) of torch.float32",
        ),
        (
            {"blocks.1.self_attn.q.weight": torch.zeros(250, 256, dtype=torch.float64)},
            "{file}: blocks.1.self_attn.q.weight, blocks.1.self_attn.k.weight, "
            "blocks.1.self_attn.v.weight: expected tensors that make (768, 256) of one dtype, got "
            "(250, 256) of torch.float64 and (256, 256) of torch.float64 and (256, 256) of "
            "torch.float64",
        ),
        (
            {"patch_embedding.weight": torch.zeros(256, 36, 1, 2, 2)},
            "{file}: patch_embedding.weight: expected 4 input channels as for text to video, got "
            "36; models that take pictures as channels are not supported",
        ),
        (
            {"patch_embedding.weight": torch.zeros(256, 4, 2, 2, 2)},
            "{file}: patch_embedding.weight: expected (any, any, 1, 2, 2), got (256, 4, 2, 2, 2)",
        ),
        (
            {"time_embedding.0.weight": torch.zeros(256, 128)},
            "{file}: time_embedding.0.weight: expected (256, 256), got (256, 128)",
        ),
        (
            {"blocks.0.self_attn.q.bias": torch.zeros(256, dtype=torch.int32)},
            "{file}: blocks.0.self_attn.q.bias: expected one of torch.float64, torch.float32, "
            "torch.float16, torch.bfloat16, got torch.int32",
        ),
        (
            {"model.patch_embedding.bias": torch.zeros(256)},
            "{file}: expected patch_embedding.bias once, got it again as "
            "model.patch_embedding.bias",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_an_error(tmp_path, change, words):
    weights = random_weights() | change
    weights = {name: x for name, x in weights.items() if x is not None}
    assert isinstance(refuse(weights, tmp_path, words), CheckpointError)


def test_a_width_that_heads_do_not_divide_is_an_error(tmp_path):
    weights = {
        "patch_embedding.weight": torch.zeros(192, 4, 1, 2, 2),
        "head.head.weight": torch.zeros(16, 192),
    }
    words = (
        "{file}: patch_embedding.weight: expected a multiple of 128 rows, the width of a head, "
        "got 192"
    )
    refuse(weights, tmp_path, words)


def test_heads_of_another_width_are_an_error(tmp_path):
    """Only the configuration of a diffusers folder says so."""
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    save_file(random_weights(), folder / MODEL)
    (folder.parent / "model_index.json").write_text("{}")
    config = folder / "config.json"
    config.write_text('{"attention_head_dim": 64}')
    for source in (folder, folder.parent):
        with pytest.raises(CheckpointError) as error:
            convert(source, tmp_path / "out", "wan2.1-t2v")
        assert str(error.value) == f"{config}: attention_head_dim: expected 128, got 64"
    config.write_text('{"attention_head_dim": 128}')
    convert(folder, tmp_path / "out", "wan2.1-t2v")


def test_a_file_without_a_known_entry_is_an_error(tmp_path):
    known = "generator, generator_ema, model"
    words = "{file}: expected tensors, alone or in one of %s, got %s; pass --entry NAME"
    refuse({"critic": random_weights(), "step": 3}, tmp_path, words % (known, "critic, step"))
    refuse([1, 2], tmp_path, words % (known, "list"))
    refuse({"generator": random_weights()}, tmp_path, words % ("ema", "generator"), entry="ema")
    names = ", ".join(KINDS)
    refuse({}, tmp_path, f"kind: expected one of {names}, got 'wan'", kind="wan")


LAYER = "blocks.0.ffn.0"


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (
            {"blocks.0.x.lora_A.weight": torch.zeros(2, 256)},
            "the adaptation of blocks.0.x.weight belongs to no weight",
        ),
        (
            {f"{LAYER}.lora_A.weight": torch.zeros(2, 256)},
            f"expected both factors of {LAYER}.weight, up is missing",
        ),
        (
            {
                f"{LAYER}.lora_A.weight": torch.zeros(2, 256),
                f"{LAYER}.lora_B.weight": torch.zeros(96, 3),
            },
            f"{LAYER}.weight: expected factors of (96, 256), got (96, 3) and (2, 256)",
        ),
        (
            {f"{LAYER}.diff": torch.zeros(2)},
            f"expected names that end in lora_A, lora_B or alpha, got {LAYER}.diff",
        ),
    ],
)
def test_an_adaptation_that_does_not_fit_is_an_error(tmp_path, factors, words):
    lora = tmp_path / "lora.pt"
    torch.save(factors, lora)
    refuse(random_weights(), tmp_path, f"{lora}: {words}", lora=lora)


def test_files_that_cannot_be_read_are_errors(tmp_path):
    def error(source) -> str:
        with pytest.raises(CheckpointError) as caught:
            find_tensors(source, ("generator",))
        return str(caught.value)

    missing = tmp_path / "none.pt"
    assert error(missing) == (
        f"{missing}: expected a file of weights or a folder with one, which is missing"
    )
    assert error(tmp_path) == (
        f"{tmp_path}: expected a file of weights (.safetensors or .pt), which is missing"
    )
    foreign = tmp_path / "foreign.pt"
    foreign.write_bytes(b"no weights")
    words = "expected a file of torch.save with tensors and plain values alone: "
    assert error(foreign).startswith(f"{foreign}: {words}")
    torch.save({"generator": KINDS}, foreign)  # objects are never built
    assert error(foreign).startswith(f"{foreign}: {words}")
    torch.save({"a": torch.zeros(2)}, foreign, _use_new_zipfile_serialization=False)
    assert str(foreign) in error(foreign)
    for name in ("a", "b"):
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    assert error(tmp_path) == (
        f"{tmp_path}: expected one file of weights, got a.safetensors, b.safetensors; pass one"
    )
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "c": "b.safetensors"}}))
    assert error(tmp_path) == (
        f"{tmp_path / 'b.safetensors'}: expected tensor c, as {index.name} says, which is missing"
    )
    index.write_text("{}")
    assert error(index) == f"{index}: expected an index with weight_map, got KeyError('weight_map')"


def test_a_file_that_ends_early_is_an_error(tmp_path):
    file = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(1000)}, file)
    (stored,) = find_tensors(file, ()).values()
    file.write_bytes(file.read_bytes()[: stored.offset + 100])
    with pytest.raises(CheckpointError, match="bytes, got .*; download the file again$"):
        stored.read()


def test_the_source_and_other_checkpoints_are_safe(tmp_path):
    save_file(random_weights(), tmp_path / MODEL)
    with pytest.raises(ValueError, match="^out: expected another file than the source, got "):
        convert(tmp_path / MODEL, tmp_path, "one-forcing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="^out: expected a folder without a checkpoint, got "):
        convert(tmp_path / MODEL, tmp_path, "one-forcing")
