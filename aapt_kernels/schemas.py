"""Every operator schema and nothing else: the table of contents of the package.

Implementations are in the folder of their op; the compiled library has the schemas of its own
kernels (csrc/bindings.cpp), so that this package works without it.
"""

import torch

# Of `torch.ops`. A second copy of this package in one process needs a name of its own.
NAMESPACE = "aapt"

# The layout integers are FrameLayout's, symbolic so that one compiled graph serves every length;
# q, k, v are (batch, length, heads, head_dim).
BLOCK_CAUSAL_ATTENTION = (
    "block_causal_attention(Tensor q, Tensor k, Tensor v, Tensor? text_lens, Tensor? q_sink, "
    "SymInt text_tokens, SymInt tokens_per_frame, SymInt frames, SymInt? window_frames, "
    "SymInt sink_frames, SymInt? past_frames, float scale, bool prefix_grad) "
    "-> (Tensor out, Tensor lse)",
    "block_causal_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
    "Tensor out, Tensor lse, Tensor? text_lens, Tensor? q_sink, SymInt text_tokens, "
    "SymInt tokens_per_frame, SymInt frames, SymInt? window_frames, SymInt sink_frames, "
    "SymInt? past_frames, float scale, bool prefix_grad, bool deterministic) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_sink)",
)

QK_NORM_ROPE = (
    "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "
    "Tensor? sin, Tensor? cos_sink, Tensor? sin_sink, float eps) "
    "-> (Tensor q, Tensor k, Tensor q_sink)",
    "qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor? dq_sink, Tensor q, Tensor k, "
    "Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, Tensor? cos_sink, "
    "Tensor? sin_sink, float eps) -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)",
)

# x, update (B, L, D); gate, shift, scale (B, G, D), of which group g serves L / G tokens.
MODULATED_NORM = (
    "modulated_norm(Tensor x, Tensor? update, Tensor? gate, Tensor? shift, Tensor? scale, "
    "Tensor? weight, Tensor? bias, float eps, ScalarType dtype) "
    "-> (Tensor residual, Tensor normed)",
    "modulated_norm_backward(Tensor dnormed, Tensor? dresidual, Tensor residual, "
    "Tensor? update, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, "
    "float eps) -> (Tensor dx, Tensor dupdate, Tensor dgate, Tensor dshift, Tensor dscale, "
    "Tensor dweight, Tensor dbias)",
    "modulated_norm_e4m3(Tensor x, Tensor? update, Tensor? gate, Tensor? shift, Tensor? scale, "
    "Tensor? weight, Tensor? bias, float eps, ScalarType dtype) "
    "-> (Tensor residual, Tensor values, Tensor scales)",
)

BIAS_GELU = (
    "bias_gelu(Tensor x, Tensor bias) -> Tensor",
    "bias_gelu_backward(Tensor dout, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)",
    "bias_gelu_e4m3(Tensor x, Tensor bias) -> (Tensor values, Tensor scales)",
)

# x (rows, width); values like x in e4m3, scales (groups, rows).
QUANTISE_ROWS = ("quantise_rows(Tensor x) -> (Tensor values, Tensor scales)",)

# One layer's cache (batch, capacity, heads, head_dim); `step` is KVCache's counter. The scales,
# (heads,) float32, are those of a cache of another dtype than q, and so is use_hadamard.
CACHE = (
    "kv_append(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor step, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
    "Tensor? cos_sink, Tensor? sin_sink, float eps, SymInt text_tokens, SymInt tokens_per_frame, "
    "SymInt window_frames, SymInt sink_frames, Tensor? k_scale, Tensor? v_scale, "
    "bool use_hadamard) -> (Tensor q, Tensor q_sink)",
    "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor step, Tensor text_lens, "
    "Tensor? q_sink, SymInt text_tokens, SymInt tokens_per_frame, SymInt window_frames, "
    "SymInt sink_frames, float scale, Tensor? k_scale, Tensor? v_scale, Tensor(a!)? workspace) "
    "-> (Tensor out, Tensor lse)",
)

CAUSAL_CONV3D = (
    "causal_conv3d(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? norm_weight, "
    "float eps, bool silu, Tensor? residual, int[3] stride, int[2] upsample, bool replicate, "
    "bool pixels, Tensor? next_norm_weight, bool keep_out, bool keep_state) "
    "-> (Tensor out, Tensor state, Tensor active)",
    "causal_conv3d_e4m3(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? state, "
    "Tensor? norm_weight, float eps, bool silu, Tensor? residual, int[2] upsample, bool replicate, "
    "bool pixels, Tensor? next_norm_weight, bool keep_out) "
    "-> (Tensor out, Tensor state, Tensor active)",
    "causal_conv3d_backward(Tensor dout, Tensor x, Tensor weight, Tensor? state, "
    "Tensor? norm_weight, float eps, bool silu, int[3] stride, int[2] upsample, bool replicate) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dnorm_weight)",
)

library = torch.library.Library(NAMESPACE, "DEF")
for schemas in (
    *(BLOCK_CAUSAL_ATTENTION, QK_NORM_ROPE, MODULATED_NORM, BIAS_GELU, CACHE),
    *(QUANTISE_ROWS, CAUSAL_CONV3D),
):
    for schema in schemas:
        library.define(schema)

ops = getattr(torch.ops, NAMESPACE)
