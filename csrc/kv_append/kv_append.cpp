// kv_append on sm_90a: checks that keep the kernel inside its buffers, outputs, launch. Shapes and
// dtypes have been checked in Python, with the words for people.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "kv_append/params.h"

// NOTE: weak, because only PyTorch builds with CUDA have it; the library must load on the others.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace aapt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "kv_append: this PyTorch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Checks a BF16 (batch, length, heads, head_dim) tensor for 16-byte row access.
Strides check_rows(const char* name, const Tensor& tensor, const Tensor& q, int64_t length) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == q.get_device_index(), name,
                  ": expected a tensor on the CUDA device of q");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16, name, ": expected bfloat16");
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == q.size(0) && tensor.size(1) == length &&
                      tensor.size(2) == q.size(2) && tensor.size(3) == q.size(3),
                  name, ": expected (", q.size(0), ", ", length, ", ", q.size(2), ", ", q.size(3),
                  ")");
  const Strides strides{tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 &&
                       strides.batch % 8 == 0 && strides.token % 8 == 0 && strides.head % 8 == 0;
  STD_TORCH_CHECK(tensor.stride(3) == 1 && aligned, name,
                  ": expected a contiguous head_dim and rows on 16-byte boundaries");
  return strides;
}

const float* check_angles(const char* name, const std::optional<Tensor>& angles, const Tensor& q) {
  if (!angles) return nullptr;
  STD_TORCH_CHECK(angles->is_cuda() && angles->get_device_index() == q.get_device_index() &&
                      angles->scalar_type() == ScalarType::Float && angles->is_contiguous() &&
                      angles->dim() == 2 && angles->size(0) == q.size(1) &&
                      angles->size(1) == q.size(3) / 2 &&
                      reinterpret_cast<uintptr_t>(angles->data_ptr()) % 16 == 0,
                  name, ": expected contiguous float32 (", q.size(1), ", ", q.size(3) / 2,
                  ") on the CUDA device of q");
  return static_cast<const float*>(angles->data_ptr());
}

const void* check_weight(const char* name, const std::optional<Tensor>& weight, const Tensor& q,
                         ScalarType dtype) {
  if (!weight) return nullptr;
  STD_TORCH_CHECK(weight->is_cuda() && weight->get_device_index() == q.get_device_index() &&
                      weight->scalar_type() == dtype && weight->is_contiguous() &&
                      weight->numel() == q.size(3) &&
                      reinterpret_cast<uintptr_t>(weight->data_ptr()) % 16 == 0,
                  name, ": expected contiguous (", q.size(3),
                  ",) on the CUDA device of q, bfloat16 or float32 like the other weight");
  return weight->data_ptr();
}

std::tuple<Tensor, Tensor> kv_append(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache,
                                     Tensor step, std::optional<Tensor> q_weight,
                                     std::optional<Tensor> k_weight, std::optional<Tensor> cos,
                                     std::optional<Tensor> sin, std::optional<Tensor> cos_sink,
                                     std::optional<Tensor> sin_sink, double eps,
                                     int64_t text_tokens, int64_t tokens_per_frame,
                                     int64_t window_frames, int64_t sink_frames) {
  STD_TORCH_CHECK(q.dim() == 4 && (q.size(3) == 64 || q.size(3) == 128),
                  "q: expected (batch, tokens, heads, 64 or 128) for the sm_90a kernel");
  STD_TORCH_CHECK(q.numel() / q.size(3) <= std::numeric_limits<int32_t>::max() / 2,
                  "q: expected fewer than 2^30 rows");
  STD_TORCH_CHECK(text_tokens >= 0 && sink_frames >= 0 && window_frames >= 0,
                  "kv_append: expected text_tokens, sink_frames and window_frames >= 0");
  STD_TORCH_CHECK(
      cos.has_value() == sin.has_value() && cos_sink.has_value() == sin_sink.has_value(),
      "kv_append: expected cos with sin and cos_sink with sin_sink");
  STD_TORCH_CHECK(step.is_cuda() && step.get_device_index() == q.get_device_index() &&
                      step.numel() == 1 && step.scalar_type() == ScalarType::Long,
                  "step: expected one int64 on the CUDA device of q");

  const int64_t ring_frames = window_frames + 1;
  const int64_t capacity = text_tokens + (sink_frames + ring_frames) * tokens_per_frame;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const ScalarType weight_dtype = q_weight   ? q_weight->scalar_type()
                                  : k_weight ? k_weight->scalar_type()
                                             : ScalarType::BFloat16;
  STD_TORCH_CHECK(weight_dtype == ScalarType::BFloat16 || weight_dtype == ScalarType::Float,
                  "q_weight, k_weight: expected bfloat16 or float32");

  KvAppendParams params{};
  params.q = q.data_ptr();
  params.k = k.data_ptr();
  params.v = v.data_ptr();
  params.q_strides = check_rows("q", q, q, tokens_per_frame);
  params.k_strides = check_rows("k", k, q, tokens_per_frame);
  params.v_strides = check_rows("v", v, q, tokens_per_frame);
  params.q_weight = check_weight("q_weight", q_weight, q, weight_dtype);
  params.k_weight = check_weight("k_weight", k_weight, q, weight_dtype);
  params.float_weights = weight_dtype == ScalarType::Float;
  params.eps = static_cast<float>(eps);
  params.cos = check_angles("cos", cos, q);
  params.sin = check_angles("sin", sin, q);
  params.cos_sink = check_angles("cos_sink", cos_sink, q);
  params.sin_sink = check_angles("sin_sink", sin_sink, q);
  params.k_cache = k_cache.data_ptr();
  params.v_cache = v_cache.data_ptr();
  params.k_cache_strides = check_rows("k_cache", k_cache, q, capacity);
  params.v_cache_strides = check_rows("v_cache", v_cache, q, capacity);
  params.step = static_cast<const int64_t*>(step.data_ptr());
  params.text_tokens = text_tokens;
  params.sink_frames = sink_frames;
  params.ring_frames = ring_frames;
  params.batch = q.size(0);
  params.tokens = q.size(1);
  params.heads = q.size(2);
  params.head_dim = q.size(3);

  const Tensor q_out = torch::stable::new_empty(q, q.sizes());
  const Tensor q_sink =
      cos_sink ? torch::stable::new_empty(q, q.sizes()) : torch::stable::new_empty(q, {0});
  params.q_out = q_out.data_ptr();
  params.q_sink_out = cos_sink ? q_sink.data_ptr() : nullptr;

  if (q.numel() > 0) {
    const char* error = launch_kv_append_sm90(params, current_stream(q.get_device_index()));
    STD_TORCH_CHECK(error == nullptr, "kv_append: ", error);
  }
  return {q_out, q_sink};
}

}  // namespace
}  // namespace aapt

STABLE_TORCH_LIBRARY_IMPL(aapt_sm90, CUDA, m) { m.impl("kv_append", TORCH_BOX(&aapt::kv_append)); }
