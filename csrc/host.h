// Host code that every op needs: the device and stream of its tensors, the number of
// multiprocessors, and checks that keep a kernel inside its buffers. Python has checked shapes and
// dtypes before, with messages for people.
//
// One source for two devices: with AAPT_SIM the kernels run on CPU tensors, under csrc/sim.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

#include "namespaces.h"
#include "strides.h"

#ifdef AAPT_SIM
#include "sim/control.h"
#else
#include <cuda_runtime_api.h>
// NOTE: weak, because only PyTorch builds with CUDA have it; the library must load without CUDA
// too.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace aapt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kRowAlignment = 16;  // bytes: vector loads and TMA

#ifdef AAPT_SIM

inline bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }
inline int multiprocessors(int32_t) { return sim::options().multiprocessors; }
inline void* current_stream(int32_t) { return nullptr; }

// Kernels may touch the tensors whose `device_pointer` was taken in this scope, and nothing else.
struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
  ~DeviceScope() { sim::forget(); }
};

// As `device_pointer`, with this many bytes from the first element on.
inline void* device_pointer(const Tensor& tensor, int64_t bytes) {
  sim::allow(tensor.data_ptr(), bytes);
  return tensor.data_ptr();
}

inline void* device_pointer(const Tensor& tensor) {
  if (tensor.numel() == 0) return nullptr;
  int64_t elements = 1;
  for (int64_t i = 0; i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * tensor.stride(i);
  return device_pointer(tensor, elements * tensor.element_size());
}

#else

inline bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }

inline int multiprocessors(int32_t device) {
  int count = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  STD_TORCH_CHECK(status == cudaSuccess, cudaGetErrorString(status));
  return count;
}

inline void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "PyTorch: expected a build with CUDA, got one without; install a CUDA build");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Allocations and launches in this scope go to the device of the tensor.
struct DeviceScope {
  explicit DeviceScope(const Tensor& tensor) : guard(tensor.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};

inline void* device_pointer(const Tensor& tensor) { return tensor.data_ptr(); }
inline void* device_pointer(const Tensor& tensor, int64_t) { return tensor.data_ptr(); }

#endif

inline bool on_device_of(const Tensor& q, const Tensor& tensor) {
  return on_device(tensor) && tensor.get_device_index() == q.get_device_index();
}

inline bool is_row_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kRowAlignment == 0;
}

// Checks that a tensor is shaped like q except for its length, has this dtype, and is on the device
// of q.
inline void check_like(const char* name, const Tensor& tensor, const Tensor& q, int64_t length,
                       ScalarType dtype) {
  STD_TORCH_CHECK(on_device_of(q, tensor), name, ": expected a tensor on the device of q");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected ",
                  dtype == ScalarType::BFloat16 ? "bfloat16" : "float8_e4m3fn");
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == q.size(0) && tensor.size(1) == length &&
                      tensor.size(2) == q.size(2) && tensor.size(3) == q.size(3),
                  name, ": expected (", q.size(0), ", ", length, ", ", q.size(2), ", ", q.size(3),
                  ")");
}

// Checks a (batch, length, heads, head_dim) tensor with `check_like`, and that its rows begin on
// 16-byte boundaries. Returns its strides.
inline Strides check_rows(const char* name, const Tensor& tensor, const Tensor& q, int64_t length,
                          ScalarType dtype = ScalarType::BFloat16) {
  check_like(name, tensor, q, length, dtype);
  const Strides strides{tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  const int64_t unit = kRowAlignment / tensor.element_size();
  STD_TORCH_CHECK(tensor.stride(3) == 1 && is_row_aligned(tensor) && strides.batch % unit == 0 &&
                      strides.token % unit == 0 && strides.head % unit == 0,
                  name, ": expected a contiguous head_dim and rows on 16-byte boundaries");
  return strides;
}

// Checks values of E4M3 with `check_like`, and that the tokens of a column are side by side, in
// columns on 16-byte boundaries. Returns the distance between columns.
inline int64_t check_columns(const char* name, const Tensor& tensor, const Tensor& q,
                             int64_t length) {
  check_like(name, tensor, q, length, ScalarType::Float8_e4m3fn);
  STD_TORCH_CHECK(
      tensor.stride(1) == 1 && is_row_aligned(tensor) && tensor.stride(0) % kRowAlignment == 0 &&
          tensor.stride(2) % kRowAlignment == 0 && tensor.stride(3) % kRowAlignment == 0,
      name,
      ": expected the tokens of a column side by side, and columns on 16-byte "
      "boundaries");
  return tensor.stride(3);
}

// Checks the scales of a cache of E4M3, one per head. Returns their `device_pointer`.
inline const float* check_scale(const char* name, const Tensor& scale, const Tensor& q) {
  STD_TORCH_CHECK(on_device_of(q, scale) && scale.scalar_type() == ScalarType::Float &&
                      scale.is_contiguous() && scale.dim() == 1 && scale.size(0) == q.size(2),
                  name, ": expected contiguous float32 (", q.size(2), ",) on the device of q");
  return static_cast<const float*>(device_pointer(scale));
}

// Checks that the tokens of q are those of 1 to `ring_frames` whole frames.
inline void check_frames(int64_t tokens, int64_t tokens_per_frame, int64_t ring_frames) {
  STD_TORCH_CHECK(tokens_per_frame > 0 && tokens > 0 && tokens % tokens_per_frame == 0 &&
                      tokens / tokens_per_frame <= ring_frames,
                  "q: expected ", tokens_per_frame, " tokens for each of 1 to ", ring_frames,
                  " frames, got ", tokens);
}

// Checks that a tensor is contiguous, has this dtype and shape, and is on the device of q; unless
// it holds integers, also that it begins on a 16-byte boundary. Returns its `device_pointer`.
inline void* check_dense(const char* name, const Tensor& tensor, const Tensor& q, ScalarType dtype,
                         std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.is_contiguous();
  int64_t i = 0;
  for (const int64_t size : shape) fits = fits && tensor.size(i++) == size;
  STD_TORCH_CHECK(on_device_of(q, tensor) && fits && tensor.scalar_type() == dtype, name,
                  ": expected a contiguous tensor of the shape and dtype of its contract, on the "
                  "device of q");
  STD_TORCH_CHECK(dtype == ScalarType::Long || is_row_aligned(tensor), name,
                  ": expected a 16-byte boundary");
  return device_pointer(tensor);
}

}  // namespace aapt
