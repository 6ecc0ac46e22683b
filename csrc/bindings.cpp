// Every operator schema and nothing else: the table of contents of the library. Implementations are
// in the folder of their op: CUDA in csrc/<op>/, all others in aapt_kernels/<op>/. The simulator's
// library (AAPT_SIM) has only the CUDA kernels, for CPU tensors.
#include <torch/csrc/stable/library.h>

namespace {
// The layout integers are FrameLayout's, symbolic so that one compiled graph serves every length;
// q, k, v are (batch, length, heads, head_dim).
constexpr const char* BLOCK_CAUSAL_ATTENTION =
    "block_causal_attention(Tensor q, Tensor k, Tensor v, Tensor? text_lens, Tensor? q_sink, "
    "SymInt text_tokens, SymInt tokens_per_frame, SymInt frames, SymInt? window_frames, "
    "SymInt sink_frames, SymInt? past_frames, float scale, bool prefix_grad) "
    "-> (Tensor out, Tensor lse)";
constexpr const char* BLOCK_CAUSAL_ATTENTION_BACKWARD =
    "block_causal_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
    "Tensor out, Tensor lse, Tensor? text_lens, Tensor? q_sink, SymInt text_tokens, "
    "SymInt tokens_per_frame, SymInt frames, SymInt? window_frames, SymInt sink_frames, "
    "SymInt? past_frames, float scale, bool prefix_grad, bool deterministic) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_sink)";
constexpr const char* KV_APPEND =
    "kv_append(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor step, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
    "Tensor? cos_sink, Tensor? sin_sink, float eps, SymInt text_tokens, SymInt tokens_per_frame, "
    "SymInt window_frames, SymInt sink_frames, Tensor? k_scale, Tensor? v_scale) "
    "-> (Tensor q, Tensor q_sink)";
constexpr const char* CACHED_ATTENTION =
    "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor step, Tensor text_lens, "
    "Tensor? q_sink, SymInt text_tokens, SymInt tokens_per_frame, SymInt window_frames, "
    "SymInt sink_frames, float scale, Tensor? k_scale, Tensor? v_scale, Tensor(a!)? workspace) "
    "-> (Tensor out, Tensor lse)";
// Memory for cached_attention on one layer's cache, which calls may reuse: zeros.
[[maybe_unused]] constexpr const char* CACHED_ATTENTION_WORKSPACE =
    "cached_attention_workspace(Tensor k_cache, SymInt tokens_per_frame, SymInt window_frames) "
    "-> Tensor";
[[maybe_unused]] constexpr const char* CAUSAL_CONV3D =
    "causal_conv3d(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? norm_weight, "
    "float eps, bool silu, Tensor? residual, int[3] stride, int[2] upsample, bool replicate, "
    "bool pixels, Tensor? next_norm_weight, bool keep_out, bool keep_state) "
    "-> (Tensor out, Tensor state, Tensor active)";
// The kernel takes weights that causal_conv3d_pack has folded and laid out for it.
[[maybe_unused]] constexpr const char* CAUSAL_CONV3D_KERNEL =
    "causal_conv3d(Tensor x, Tensor packed, Tensor? bias, Tensor? state, Tensor? norm_weight, "
    "float eps, bool silu, Tensor? residual, int[3] kernel, int[2] upsample, bool replicate, "
    "bool pixels, Tensor? next_norm_weight, bool keep_out, bool keep_state) "
    "-> (Tensor out, Tensor state, Tensor active)";
[[maybe_unused]] constexpr const char* CAUSAL_CONV3D_PACK =
    "causal_conv3d_pack(Tensor weight, int[2] upsample) -> Tensor packed";

// The ops with a kernel written for sm_90a.
[[maybe_unused]] void define_kernels(torch::stable::detail::StableLibrary& m) {
  m.def(BLOCK_CAUSAL_ATTENTION);
  m.def(BLOCK_CAUSAL_ATTENTION_BACKWARD);
  m.def(KV_APPEND);
  m.def(CACHED_ATTENTION);
  m.def(CACHED_ATTENTION_WORKSPACE);
  m.def(CAUSAL_CONV3D_KERNEL);
  m.def(CAUSAL_CONV3D_PACK);
}
}  // namespace

#ifndef AAPT_SIM
STABLE_TORCH_LIBRARY(aapt, m) {
  m.def(BLOCK_CAUSAL_ATTENTION);
  m.def(BLOCK_CAUSAL_ATTENTION_BACKWARD);

  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "
      "Tensor? sin, Tensor? cos_sink, Tensor? sin_sink, float eps) "
      "-> (Tensor q, Tensor k, Tensor q_sink)");
  m.def(
      "qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor? dq_sink, Tensor q, Tensor k, "
      "Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, Tensor? cos_sink, "
      "Tensor? sin_sink, float eps) -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)");

  // x, update (B, L, D); gate, shift, scale (B, G, D), of which group g serves L / G tokens.
  m.def(
      "modulated_norm(Tensor x, Tensor? update, Tensor? gate, Tensor? shift, Tensor? scale, "
      "Tensor? weight, Tensor? bias, float eps, ScalarType dtype) "
      "-> (Tensor residual, Tensor normed)");
  m.def(
      "modulated_norm_backward(Tensor dnormed, Tensor? dresidual, Tensor residual, "
      "Tensor? update, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, "
      "float eps) -> (Tensor dx, Tensor dupdate, Tensor dgate, Tensor dshift, Tensor dscale, "
      "Tensor dweight, Tensor dbias)");
  m.def("bias_gelu(Tensor x, Tensor bias) -> Tensor");
  m.def("bias_gelu_backward(Tensor dout, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)");

  // One layer's cache (batch, capacity, heads, head_dim); `step` is KVCache's counter. The scales,
  // (heads,) float32, are those of a cache of another dtype than q.
  m.def(KV_APPEND);
  m.def(CACHED_ATTENTION);

  m.def(CAUSAL_CONV3D);
  m.def(
      "causal_conv3d_backward(Tensor dout, Tensor x, Tensor weight, Tensor? state, "
      "Tensor? norm_weight, float eps, bool silu, int[3] stride, int[2] upsample, bool replicate) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dnorm_weight)");
}
#endif

// The hand-written kernels of this build.
#if defined(AAPT_SIM)
STABLE_TORCH_LIBRARY(aapt_sim, m) { define_kernels(m); }
#elif defined(AAPT_SM90)
STABLE_TORCH_LIBRARY(aapt_sm90, m) { define_kernels(m); }
#endif
