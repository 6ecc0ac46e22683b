"""UMT5, the text encoder of Wan's models, through transformers (the extra `aapt[wan]`).

Its weights are not part of a checkpoint of ours. They are read from a folder in one of two layouts:

    text_encoder/, tokenizer/                          a pipeline of diffusers
    models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/  a folder of Wan's own
"""

import gc
import hashlib
import html
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointError, check_shapes, read_weights

NATIVE_WEIGHTS, NATIVE_TOKENIZER = "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"
TOKENS, WIDTH = 512, 4096  # that Wan's models read
KEPT = 64  # prompts whose embeddings stay in memory, at most 4 MiB each

# transformers' names of the tensors of Wan's file.
NATIVE = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)
MAX_DISTANCE = 128  # of two tokens that UMT5 tells apart; no tensor's shape says so


def missing(package: str) -> ValueError:
    """Return the error for a missing package of the extra `wan`."""
    return ValueError(
        f'text: expected {package}, which UMT5 needs, got none; pip install "aapt[wan]"'
    )


def clean_prompt(prompt: str) -> str:
    """Mends a prompt as Wan's own code does: broken Unicode, HTML entities twice, whitespace.

    ValueError without ftfy.
    """
    try:
        import ftfy
    except ImportError:
        raise missing("ftfy") from None
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class UMT5Weights:
    """UMT5 and its tokenizer in a folder. The network is read at first use, and `free` drops it.

    Args:
        folder: See the module. CheckpointError if it has neither layout.
        device, dtype: Where the network runs, and in which precision.
        tokens: Tokens of a prompt that are read.
        keep: Keep the network between prompts; else every new prompt reads it again.

    ValueError without transformers.
    """

    def __init__(
        self,
        folder: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        tokens: int = TOKENS,
        keep: bool = True,
    ):
        self.folder, self.device, self.dtype = Path(folder), device, dtype
        self.tokens, self.keep = tokens, keep
        if (self.folder / "text_encoder").is_dir() and (self.folder / "tokenizer").is_dir():
            self._load, tokenizer = self._from_diffusers, self.folder / "tokenizer"
        elif (self.folder / NATIVE_WEIGHTS).is_file():
            self._load, tokenizer = self._from_native, self.folder / NATIVE_TOKENIZER
        else:
            raise CheckpointError(
                f"{self.folder}: expected UMT5, as text_encoder/ and tokenizer/ or as "
                f"{NATIVE_WEIGHTS} and {NATIVE_TOKENIZER}/, got neither; pass the folder of a Wan "
                "pipeline"
            )
        self.tokenizer = _reading(tokenizer, "AutoTokenizer", tokenizer)

    def __deepcopy__(self, memo: dict) -> "UMT5Weights":
        return self  # copies of a model share the network

    @cached_property
    def network(self) -> nn.Module:
        """transformers' `UMT5EncoderModel`."""
        return self._load().to(self.device, self.dtype).eval().requires_grad_(False)

    def free(self) -> None:
        """Drops the network from memory; the next prompt reads it again."""
        self.__dict__.pop("network", None)
        gc.collect()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def embed(self, prompt: str) -> Tensor:
        """Returns the embeddings (n, width) of a prompt's n tokens, on the CPU. Tokens after the
        first `tokens` are dropped."""
        ids = self.tokenizer(
            clean_prompt(prompt), max_length=self.tokens, truncation=True, return_tensors="pt"
        ).input_ids
        rows = self.network(ids.to(self.device)).last_hidden_state[0].cpu()
        if not self.keep:
            self.free()
        return rows

    def digest(self) -> str:
        """SHA-256 of the names, the shapes and the first values of all tensors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _from_diffusers(self) -> nn.Module:
        folder = self.folder / "text_encoder"
        return _reading(folder, "UMT5EncoderModel", folder, dtype=self.dtype)

    def _from_native(self) -> nn.Module:
        import transformers

        path = self.folder / NATIVE_WEIGHTS
        tensors = {_transformers_name(name): x for name, x in read_weights(path).items()}
        with torch.device("meta"):
            network = transformers.UMT5EncoderModel(_configuration(path, tensors))
        if "shared.weight" in tensors:
            tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
        shapes = [
            {name: tuple(x.shape) for name, x in given.items()}
            for given in (tensors, network.state_dict())
        ]
        check_shapes(path, *shapes)
        network.load_state_dict(tensors, assign=True)
        return network


class UMT5TextEncoder(nn.Module):
    """Embeds prompts as Wan's models read them: UMT5's embeddings, then rows of zeros.

    The encoder has no weights. `source` gives the embeddings of a prompt: `UMT5Weights.embed`, or
    the embeddings that `aapt encode --text` stored. The last KEPT prompts are not asked for again.
    """

    def __init__(self, tokens: int = TOKENS, width: int = WIDTH):
        super().__init__()
        self.tokens, self.width = tokens, width
        self.source: Callable[[str], Tensor] | None = None
        self._kept: dict[str, Tensor] = {}
        # Moves with the model that the embeddings are for
        self.register_buffer("place", torch.empty(0), persistent=False)

    def embeddings(self, prompt: str) -> Tensor:
        """Returns the embeddings (n, width) of a prompt's n tokens, on the device of `source`.

        ValueError without a source, or if its embeddings have another size.
        """
        if prompt not in self._kept:
            if self.source is None:
                raise ValueError(
                    "text: expected UMT5's weights or stored embeddings, got none; pass the folder "
                    "of a Wan pipeline"
                )
            rows = self.source(prompt)
            if rows.dim() != 2 or rows.shape[1] != self.width or len(rows) > self.tokens:
                raise ValueError(
                    f"text: expected embeddings of up to {self.tokens} tokens and {self.width} "
                    f"channels, as the model reads, got {tuple(rows.shape)}; pass its own encoder"
                )
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[prompt] = rows
        return self._kept[prompt]

    def cut(self, prompt: str) -> str | None:
        """Says in one line that a prompt may be longer than what is read; None if it is not."""
        if len(self.embeddings(prompt)) < self.tokens:
            return None
        return (
            f"prompt: expected fewer than {self.tokens} tokens, got as many or more; only the "
            "first are read"
        )

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, tokens, width), zero after a prompt's tokens, and lengths (B,)."""
        rows = [self.embeddings(prompt) for prompt in prompts]
        out = self.place.new_zeros(len(rows), self.tokens, self.width)
        for row, given in zip(out, rows, strict=True):
            row[: len(given)] = given.to(out)
        return out, torch.tensor([len(given) for given in rows], device=out.device)


def _reading(path: Path, kind: str, *arguments: Any, **options: Any) -> Any:
    """Return what a class of transformers reads from a folder; its errors become ours."""
    try:
        import transformers
    except ImportError:
        raise missing("transformers") from None
    try:
        return getattr(transformers, kind).from_pretrained(
            *arguments, local_files_only=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: expected UMT5's, got {reason}") from None


def _transformers_name(name: str) -> str:
    for native, theirs in NATIVE:
        name = re.sub(native, theirs, name)
    return name


def _configuration(path: Path, tensors: Mapping[str, Tensor]) -> Any:
    """Return the configuration of UMT5 that tensors of these shapes are of."""
    import transformers

    layer = "encoder.block.0.layer.{}.{}.weight"
    names = {
        "shared": "shared.weight",
        "q": layer.format(0, "SelfAttention.q"),
        "bias": layer.format(0, "SelfAttention.relative_attention_bias"),
        "wi": layer.format(1, "DenseReluDense.wi_0"),
    }
    for name in names.values():
        if name not in tensors:
            raise CheckpointError(f"{path}: expected UMT5's tensor {name}, which is missing")
    shape = {key: tensors[name].shape for key, name in names.items()}
    buckets, heads = shape["bias"]
    blocks = {match[1] for name in tensors if (match := re.match(r"encoder\.block\.(\d+)\.", name))}
    return transformers.UMT5Config(
        vocab_size=shape["shared"][0],
        d_model=shape["shared"][1],
        d_kv=shape["q"][0] // heads,
        d_ff=shape["wi"][0],
        num_layers=len(blocks),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=MAX_DISTANCE,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
