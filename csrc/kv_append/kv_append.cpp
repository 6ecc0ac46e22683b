// kv_append on sm_90a: checks that keep the kernel inside its buffers, outputs, launch.

#include <limits>
#include <optional>
#include <tuple>

#include "host.h"
#include "kv_append/params.h"

namespace aapt {
namespace {

const float* check_angles(const char* name, const std::optional<Tensor>& angles, const Tensor& q) {
  if (!angles) return nullptr;
  return static_cast<const float*>(
      check_dense(name, *angles, q, ScalarType::Float, {q.size(1), q.size(3) / 2}));
}

const void* check_weight(const char* name, const std::optional<Tensor>& weight, const Tensor& q,
                         const Tensor& like) {
  if (!weight) return nullptr;
  const ScalarType dtype = like.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, name,
                  ": expected bfloat16 or float32");
  return like.dim() == 1 ? check_dense(name, *weight, q, dtype, {q.size(3)})
                         : check_dense(name, *weight, q, dtype, {q.size(2), q.size(3)});
}

std::tuple<Tensor, Tensor> kv_append(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache,
                                     Tensor step, std::optional<Tensor> q_weight,
                                     std::optional<Tensor> k_weight, std::optional<Tensor> cos,
                                     std::optional<Tensor> sin, std::optional<Tensor> cos_sink,
                                     std::optional<Tensor> sin_sink, double eps,
                                     int64_t text_tokens, int64_t tokens_per_frame,
                                     int64_t window_frames, int64_t sink_frames,
                                     std::optional<Tensor> k_scale, std::optional<Tensor> v_scale,
                                     bool use_hadamard) {
  STD_TORCH_CHECK(q.dim() == 4 && (q.size(3) == 64 || q.size(3) == 128),
                  "q: expected (batch, tokens, heads, 64 or 128) for the sm_90a kernel");
  STD_TORCH_CHECK(q.numel() / q.size(3) <= std::numeric_limits<int32_t>::max() / 2,
                  "q: expected fewer than 2^30 rows");
  STD_TORCH_CHECK(text_tokens >= 0 && sink_frames >= 0 && window_frames >= 0,
                  "kv_append: expected text_tokens, sink_frames and window_frames >= 0");
  STD_TORCH_CHECK(
      cos.has_value() == sin.has_value() && cos_sink.has_value() == sin_sink.has_value(),
      "kv_append: expected cos with sin and cos_sink with sin_sink");

  STD_TORCH_CHECK(k_scale.has_value() == v_scale.has_value() && (k_scale || !use_hadamard),
                  "kv_append: expected k_scale with v_scale, and use_hadamard only with both");

  const int64_t tokens = q.size(1), ring_frames = window_frames + 1;
  const int64_t capacity = text_tokens + (sink_frames + ring_frames) * tokens_per_frame;
  check_frames(tokens, tokens_per_frame, ring_frames);
  STD_TORCH_CHECK(capacity <= std::numeric_limits<int32_t>::max(),
                  "k_cache: expected fewer than 2^31 tokens");
  const DeviceScope scope(q);

  KvAppendParams params{};
  params.q_strides = check_rows("q", q, q, tokens);
  params.k_strides = check_rows("k", k, q, tokens);
  params.v_strides = check_rows("v", v, q, tokens);
  params.k_cache_strides = check_rows("k_cache", k_cache, q, capacity,
                                      k_scale ? ScalarType::Float8_e4m3fn : ScalarType::BFloat16);
  params.q = device_pointer(q);
  params.k = device_pointer(k);
  params.v = device_pointer(v);
  params.k_cache = device_pointer(k_cache);
  params.v_cache = device_pointer(v_cache);
  if (k_scale) {
    params.v_cache_column_stride = check_columns("v_cache", v_cache, q, capacity);
    params.v_cache_strides = {v_cache.stride(0), 1, v_cache.stride(2)};
    params.k_scale = check_scale("k_scale", *k_scale, q);
    params.v_scale = check_scale("v_scale", *v_scale, q);
    params.use_hadamard = use_hadamard;
  } else {
    params.v_cache_strides = check_rows("v_cache", v_cache, q, capacity);
  }
  if (const auto& like = q_weight ? q_weight : k_weight) {
    // One of them decides for both: dtype, and whether the norm is per head.
    params.q_weight = check_weight("q_weight", q_weight, q, *like);
    params.k_weight = check_weight("k_weight", k_weight, q, *like);
    params.float_weights = like->scalar_type() == ScalarType::Float;
    params.across_heads = like->dim() == 2;
  }
  params.eps = static_cast<float>(eps);
  params.cos = check_angles("cos", cos, q);
  params.sin = check_angles("sin", sin, q);
  params.cos_sink = check_angles("cos_sink", cos_sink, q);
  params.sin_sink = check_angles("sin_sink", sin_sink, q);
  params.step = static_cast<const int64_t*>(check_dense("step", step, q, ScalarType::Long, {}));
  params.text_tokens = static_cast<int>(text_tokens);
  params.tokens_per_frame = static_cast<int>(tokens_per_frame);
  params.sink_frames = static_cast<int>(sink_frames);
  params.ring_frames = static_cast<int>(ring_frames);
  params.batch = static_cast<int>(q.size(0));
  params.tokens = static_cast<int>(tokens);
  params.heads = static_cast<int>(q.size(2));
  params.head_dim = static_cast<int>(q.size(3));

  const Tensor q_out = torch::stable::new_empty(q, q.sizes());
  const Tensor q_sink =
      cos_sink ? torch::stable::new_empty(q, q.sizes()) : torch::stable::new_empty(q, {0});
  params.q_out = device_pointer(q_out);
  params.q_sink_out = cos_sink ? device_pointer(q_sink) : nullptr;

  if (q.numel() > 0) {
    const int32_t device = q.get_device_index();
    const char* error =
        launch_kv_append_sm90(params, multiprocessors(device), current_stream(device));
    STD_TORCH_CHECK(error == nullptr, "kv_append: ", error);
  }
  return {q_out, q_sink};
}

}  // namespace
}  // namespace aapt

AAPT_KERNELS(m) { m.impl("kv_append", TORCH_BOX(&aapt::kv_append)); }
