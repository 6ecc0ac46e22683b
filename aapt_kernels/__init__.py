"""Drop-in PyTorch ops for autoregressive video: a sequence of latent frames, each a block of
tokens, that grows frame by frame.

Training sees all frames at once, under a mask that is a handful of integers:

    from aapt_kernels import FrameLayout, block_causal_attention, qk_norm_rope

    layout = FrameLayout(text_tokens=24, tokens_per_frame=40, frames=8, window_frames=6)
    q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin)   # (batch, length, heads, head_dim)
    out = block_causal_attention(q, k, v, layout)

Streaming sees one frame at a time, gives the same numbers and costs the same at every step:

    from aapt_kernels import KVCache, cached_attention, kv_append

    cache = KVCache(1, layers, heads, head_dim, text_tokens=24, tokens_per_frame=40,
                    window_frames=6)
    q = kv_append(q, k, v, cache, layer, q_weight, k_weight, cos, sin)
    out = cached_attention(q, cache, layer)
    cache.advance()                                           # after the last layer

`modulated_norm` and `bias_gelu` are what a block does between its products, in one launch each;
`quantise_rows` makes the input of a product in 8 bits; `modulated_norm_e4m3` and `bias_gelu_e4m3`
round their results in their own launch. `causal_conv3d` is the VAE's convolution, and
`causal_conv3d_e4m3` computes it in 8 bits. Each function is a real torch op,
`torch.ops.aapt.<name>`, that compiles without graph breaks. `use_backend` chooses the
implementation of all ops, `backends` lists the choice. `patch` gives a diffusers Wan pipeline this
attention.
"""

from . import _library
from .backend import backends, use_backend
from .bias_gelu import bias_gelu, bias_gelu_e4m3
from .block_causal_attention import block_causal_attention
from .cached_attention import cached_attention
from .causal_conv3d import causal_conv3d, causal_conv3d_e4m3
from .diffusers_wan import patch
from .kv_append import kv_append
from .kv_cache import KVCache
from .layout import FrameLayout
from .modulated_norm import modulated_norm, modulated_norm_e4m3
from .qk_norm_rope import qk_norm_rope
from .quantise_rows import quantise_rows
from .self_check import SelfCheckError

_library.load()

__all__ = [
    "FrameLayout",
    "KVCache",
    "SelfCheckError",
    "backends",
    "bias_gelu",
    "bias_gelu_e4m3",
    "block_causal_attention",
    "cached_attention",
    "causal_conv3d",
    "causal_conv3d_e4m3",
    "kv_append",
    "modulated_norm",
    "modulated_norm_e4m3",
    "patch",
    "qk_norm_rope",
    "quantise_rows",
    "use_backend",
]
