"""UMT5: equal to diffusers' prompts and to the published arithmetic, from both layouts."""

import builtins
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from aapt.checkpoint import CheckpointError
from aapt.model.config import ModelConfig
from aapt.model.text import ByteTextEncoder
from aapt.model.text_encoders import text_encoder
from aapt.model.umt5 import NATIVE_TOKENIZER, NATIVE_WEIGHTS, UMT5TextEncoder, UMT5Weights
from aapt.model.world_model import WorldModel

SAID = 'expected {}, which UMT5 needs, got none; pip install "aapt\\[wan\\]"'
WORDS = ["a", "fox", "in", "snow", "the", "sea", "at", "noon", "&", "caf\u00e9"]
PROMPTS = ["a fox in snow", "", "  the sea\tat &amp;amp; noon ", "caf\u00c3\u00a9", "a " * 30]
WIDTH, HEADS, HEAD, FFN, LAYERS, BUCKETS = 24, 3, 5, 40, 2, 32


def packages():
    return pytest.importorskip(
        "transformers", reason='transformers: not installed; pip install "aapt[wan]"'
    ), pytest.importorskip("ftfy", reason='ftfy: not installed; pip install "aapt[wan]"')


def save_tokenizer(folder):
    """A tokenizer of ten words that ends prompts as T5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = [("</s>", vocabulary["</s>"])]
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=end)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def native():
    """Random weights under the names of Wan's file (Wan-Video/Wan2.1, wan/modules/t5.py)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    inner = HEADS * HEAD
    tensors = {
        "token_embedding.weight": normal(len(WORDS) + 3, WIDTH),
        "norm.weight": normal(WIDTH),
    }
    for n in range(LAYERS):
        tensors |= {f"blocks.{n}.attn.{x}.weight": normal(inner, WIDTH) for x in "qkv"}
        tensors |= {
            f"blocks.{n}.attn.o.weight": normal(WIDTH, inner),
            f"blocks.{n}.norm1.weight": 1 + normal(WIDTH),
            f"blocks.{n}.norm2.weight": 1 + normal(WIDTH),
            f"blocks.{n}.ffn.gate.0.weight": normal(FFN, WIDTH),
            f"blocks.{n}.ffn.fc1.weight": normal(FFN, WIDTH),
            f"blocks.{n}.ffn.fc2.weight": normal(WIDTH, FFN),
            f"blocks.{n}.pos_embedding.embedding.weight": normal(BUCKETS, HEADS),
        }
    return tensors


@pytest.fixture(scope="module")
def native_folder(native, tmp_path_factory):
    packages()
    folder = tmp_path_factory.mktemp("native")
    torch.save(native, folder / NATIVE_WEIGHTS)
    save_tokenizer(folder / NATIVE_TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def pipeline_folder(native_folder, tmp_path_factory):
    """The network as transformers saves it."""
    folder = tmp_path_factory.mktemp("pipeline")
    UMT5Weights(native_folder, dtype=torch.float32).network.save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")
    return folder


def bucket(distance: int) -> int:
    """The row of the position table for a key that many tokens after its query: exact up to 8,
    logarithmic up to 128, and 16 rows for each direction (Raffel et al., 2020)."""
    half, n = BUCKETS // 2, abs(distance)
    if n >= half // 2:
        n = half // 2 + int(math.log(n / (half // 2)) / math.log(128 / (half // 2)) * (half // 2))
    return min(n, half - 1) + (half if distance > 0 else 0)


def plain_umt5(weights, ids):
    """UMT5's encoder in float64: T5 with a table of positions per layer."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    x, length = w["token_embedding.weight"][ids], len(ids)
    rows = torch.tensor([[bucket(key - query) for key in range(length)] for query in range(length)])
    for n in range(LAYERS):
        block = f"blocks.{n}"
        h = norm(x, f"{block}.norm1")
        q, k, v = (
            (h @ w[f"{block}.attn.{name}.weight"].T).view(length, HEADS, HEAD).transpose(0, 1)
            for name in "qkv"
        )
        bias = w[f"{block}.pos_embedding.embedding.weight"][rows].permute(2, 0, 1)
        seen = (q @ k.transpose(1, 2) + bias).softmax(-1) @ v  # without a scale
        x = x + seen.transpose(0, 1).flatten(1) @ w[f"{block}.attn.o.weight"].T
        h = norm(x, f"{block}.norm2")
        gate = F.gelu(h @ w[f"{block}.ffn.gate.0.weight"].T, approximate="tanh")
        h = gate * (h @ w[f"{block}.ffn.fc1.weight"].T)
        x = x + h @ w[f"{block}.ffn.fc2.weight"].T
    return norm(x, "norm")


@pytest.mark.parametrize("layout", ["native", "pipeline"])
def test_embeddings_are_those_of_the_published_arithmetic(request, native, layout):
    folder = request.getfixturevalue(f"{layout}_folder")
    weights = UMT5Weights(folder, dtype=torch.float64)
    for prompt, words in [("a fox in snow", "a fox in snow"), ("caf\u00c3\u00a9", "caf\u00e9")]:
        ids = torch.tensor([*(3 + WORDS.index(word) for word in words.split()), 1])
        expected = plain_umt5(native, ids)
        assert (weights.embed(prompt) - expected).abs().max() <= 1e-6 * expected.abs().max()
    long = torch.tensor([3 + n % len(WORDS) for n in range(300)] + [1])
    prompt = " ".join(WORDS[n % len(WORDS)] for n in range(300))
    assert (weights.embed(prompt) - plain_umt5(native, long)).abs().max() <= 1e-6


def test_prompts_are_those_of_diffusers(pipeline_folder):
    """Cleaning, tokens, truncation, trimming and padding, against the pipeline's own code."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers: not installed")
    weights = UMT5Weights(pipeline_folder, dtype=torch.float64, tokens=20)
    encoder = UMT5TextEncoder(20, WIDTH).double()
    encoder.source = weights.embed
    theirs = SimpleNamespace(
        tokenizer=weights.tokenizer,
        text_encoder=weights.network,
        _execution_device=torch.device("cpu"),
    )
    expected = diffusers.WanPipeline._get_t5_prompt_embeds(
        theirs, list(PROMPTS), max_sequence_length=20
    )
    embeddings, lengths = encoder(PROMPTS)
    assert lengths.tolist() == [5, 1, 6, 2, 20]
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-6)
    assert not embeddings[0, 5:].any()


def test_bfloat16_is_no_further_from_float64(pipeline_folder):
    exact, ours = (
        UMT5Weights(pipeline_folder, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)
    )
    for prompt in PROMPTS:
        ids = ours.tokenizer(prompt, return_tensors="pt", padding="max_length", max_length=40)
        padded = ours.network(ids.input_ids, ids.attention_mask).last_hidden_state[0]
        wanted = exact.embed(prompt)
        if len(wanted) == ids.attention_mask.sum():
            errors = [
                (x.double() - wanted).square().mean()
                for x in (ours.embed(prompt), padded[: len(wanted)])
            ]
            assert errors[0] <= 1.2 * errors[1]


def test_each_prompt_is_encoded_once(pipeline_folder, monkeypatch):
    weights = UMT5Weights(pipeline_folder, keep=False)
    encoder = UMT5TextEncoder(20, WIDTH)
    asked = []
    encoder.source = lambda prompt: asked.append(prompt) or weights.embed(prompt)
    first, _ = encoder(["a fox", "the sea"])
    again, _ = encoder(["the sea", "a fox"])
    assert asked == ["a fox", "the sea"] and torch.equal(again, first.flip(0))
    assert "network" not in vars(weights)  # freed
    assert torch.equal(weights.embed("a fox"), first[0, :3].bfloat16())
    monkeypatch.setattr("aapt.model.umt5.KEPT", 2)
    encoder(["noon"])  # in place of the oldest
    encoder(["the sea", "a fox"])
    assert asked[2:] == ["noon", "a fox"]


def test_embeddings_follow_the_model(pipeline_folder):
    encoder = UMT5TextEncoder(8, WIDTH)
    encoder.source = UMT5Weights(pipeline_folder).embed
    assert encoder(["a"])[0].dtype == torch.float32
    assert encoder.bfloat16()(["a"])[0].dtype == torch.bfloat16


CONFIG = dict(
    width=32, heads=2, head_dim=16, depth=1, latent_channels=4, text_width=WIDTH, text_tokens=6,
    window_frames=2, reference_grid=(2, 2), rope_axes=(4, 6, 6),
)  # fmt: skip


def test_a_world_model_names_its_text_encoder():
    bytes_model = WorldModel(ModelConfig(**CONFIG), None)
    model = WorldModel(ModelConfig(**CONFIG, text_encoder="umt5"), None)
    assert isinstance(bytes_model.text_encoder, ByteTextEncoder)
    given = {name for name in bytes_model.state_dict() if not name.startswith("text_encoder")}
    assert set(model.state_dict()) == given  # no weights of its own
    with pytest.raises(ValueError, match="text: expected UMT5's weights or stored embeddings, got"):
        model.conditions(None, ["a"], (4, 4))
    model.text_encoder.source = lambda prompt: torch.ones(2, WIDTH)
    conditions = model.conditions(None, ["a"], (4, 4))
    assert conditions.text.shape == (1, 6, WIDTH) and conditions.text_lens.tolist() == [2]
    with pytest.raises(ValueError, match="text_encoder: expected one of bytes, umt5, got 'clip'"):
        text_encoder("clip", 4, 8)


@pytest.mark.parametrize("shape", [(2, WIDTH + 1), (7, WIDTH), (WIDTH,)])
def test_embeddings_of_another_size(shape):
    encoder = UMT5TextEncoder(6, WIDTH)
    encoder.source = lambda prompt: torch.ones(shape)
    with pytest.raises(
        ValueError, match=f"text: expected embeddings of up to 6 tokens and {WIDTH}"
    ):
        encoder(["a"])


def test_folders_that_are_not_umt5(native, native_folder, tmp_path):
    packages()
    with pytest.raises(
        CheckpointError, match="expected UMT5, as text_encoder/ and tokenizer/ or as"
    ):
        UMT5Weights(tmp_path)
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(CheckpointError, match="tokenizer: expected UMT5's, got "):
        UMT5Weights(tmp_path)
    save_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="text_encoder: expected UMT5's, got "):
        UMT5Weights(tmp_path).embed("a")

    def load(change):
        path = tmp_path / "native"
        save_tokenizer(path / NATIVE_TOKENIZER)
        tensors = dict(native)
        change(tensors)
        torch.save(tensors, path / NATIVE_WEIGHTS)
        return UMT5Weights(path).network

    with pytest.raises(CheckpointError, match="layer_norm.weight, which is missing"):
        load(lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(CheckpointError, match="expected UMT5's tensor shared.weight, which is mi"):
        load(lambda tensors: tensors.pop("token_embedding.weight"))
    with pytest.raises(CheckpointError, match="tensor surplus belongs to no parameter"):
        load(lambda tensors: tensors.update(surplus=torch.zeros(2)))
    with pytest.raises(CheckpointError, match=r"wo.weight: expected \(24, 40\), got \(24, 41\)"):
        load(lambda tensors: tensors.update({"blocks.1.ffn.fc2.weight": torch.zeros(24, 41)}))


@pytest.mark.parametrize("package", ["transformers", "ftfy"])
def test_missing_packages_are_named(package, tmp_path, monkeypatch):
    """Also where they are installed."""
    found = builtins.__import__

    def without(name, *arguments, **options):
        if name == package:
            raise ImportError(name)
        return found(name, *arguments, **options)

    from aapt.model.umt5 import clean_prompt

    for name in ("text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=SAID.format(package)):
        UMT5Weights(tmp_path) if package == "transformers" else clean_prompt("a")
