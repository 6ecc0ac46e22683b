// The schemas of all compiled kernels and nothing else: the table of contents of the library.
// Kernels are in the folder of their op, csrc/<op>/. The schemas of the public operators are in
// aapt_kernels/schemas.py. The simulator's library (AAPT_SIM) takes CPU tensors.
#include <torch/csrc/stable/library.h>

#include "namespaces.h"

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
    "SymInt window_frames, SymInt sink_frames, Tensor? k_scale, Tensor? v_scale, "
    "bool use_hadamard) -> (Tensor q, Tensor q_sink)";
constexpr const char* CACHED_ATTENTION =
    "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor step, Tensor text_lens, "
    "Tensor? q_sink, SymInt text_tokens, SymInt tokens_per_frame, SymInt window_frames, "
    "SymInt sink_frames, float scale, Tensor? k_scale, Tensor? v_scale, Tensor(a!)? workspace) "
    "-> (Tensor out, Tensor lse)";
// Memory for cached_attention on one layer's cache, which calls may reuse: zeros.
constexpr const char* CACHED_ATTENTION_WORKSPACE =
    "cached_attention_workspace(Tensor k_cache, SymInt tokens_per_frame, SymInt window_frames) "
    "-> Tensor";
// The kernel takes weights that causal_conv3d_pack has folded and laid out for it.
constexpr const char* CAUSAL_CONV3D =
    "causal_conv3d(Tensor x, Tensor packed, Tensor? bias, Tensor? state, Tensor? norm_weight, "
    "float eps, bool silu, Tensor? residual, int[3] kernel, int[2] upsample, bool replicate, "
    "bool pixels, Tensor? next_norm_weight, bool keep_out, bool keep_state) "
    "-> (Tensor out, Tensor state, Tensor active)";
constexpr const char* CAUSAL_CONV3D_PACK =
    "causal_conv3d_pack(Tensor weight, int[2] upsample) -> Tensor packed";
// Versions of CUDA, 1000 * major + 10 * minor: of the runtime in this library, and the newest that
// the driver supports, 0 without a driver.
[[maybe_unused]] constexpr const char* CUDA_VERSIONS =
    "cuda_versions() -> (int runtime, int driver)";

}  // namespace

AAPT_LIBRARY(m) {
  m.def(BLOCK_CAUSAL_ATTENTION);
  m.def(BLOCK_CAUSAL_ATTENTION_BACKWARD);
  m.def(KV_APPEND);
  m.def(CACHED_ATTENTION);
  m.def(CACHED_ATTENTION_WORKSPACE);
  m.def(CAUSAL_CONV3D);
  m.def(CAUSAL_CONV3D_PACK);
#ifndef AAPT_SIM
  m.def(CUDA_VERSIONS);
#endif
}
