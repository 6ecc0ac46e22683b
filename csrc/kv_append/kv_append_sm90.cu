// One launch per layer and step: per-head RMSNorm of q and k, rotary embedding, and the write of
// k and v into the cache slot that the device-side step counter names (SPEC 4, 5).
//
// Memory-bound: every row is read once and written once, 16 bytes per access. A row (one token,
// one head) belongs to head_dim / 16 neighbouring lanes; a lane holds 8 elements of the row's first
// half and the 8 of the second half that rotate with them, so rotation needs no exchange at all and
// the norm one short butterfly.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kv_append/params.h"

namespace aapt {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;  // 64 registers, no spill; 8 would leave 32
constexpr int kVector = 8;       // BF16 elements in 16 bytes

// The two halves of a row that one lane holds, raw or in float32.
struct RawPair {
  uint4 low, high;
};
struct FloatPair {
  float low[kVector], high[kVector];
};

__device__ __forceinline__ RawPair load_row(const void* tensor, int64_t offset, int half) {
  const auto* row = static_cast<const __nv_bfloat16*>(tensor) + offset;
  return {*reinterpret_cast<const uint4*>(row), *reinterpret_cast<const uint4*>(row + half)};
}

__device__ __forceinline__ void store_row(void* tensor, int64_t offset, int half,
                                          const RawPair& values) {
  auto* row = static_cast<__nv_bfloat16*>(tensor) + offset;
  *reinterpret_cast<uint4*>(row) = values.low;
  *reinterpret_cast<uint4*>(row + half) = values.high;
}

__device__ __forceinline__ void widen(const uint4& raw, float (&out)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(&raw)[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ uint4 narrow(const float (&values)[kVector]) {
  uint4 raw;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    reinterpret_cast<__nv_bfloat162*>(&raw)[i] =
        __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
  }
  return raw;
}

__device__ __forceinline__ void load_vector(const __nv_bfloat16* from, float (&out)[kVector]) {
  widen(__ldg(reinterpret_cast<const uint4*>(from)), out);
}

__device__ __forceinline__ void load_vector(const float* from, float (&out)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
    out[i] = four.x;
    out[i + 1] = four.y;
    out[i + 2] = four.z;
    out[i + 3] = four.w;
  }
}

// x / rms(x) * weight over a row, whose kLanes lanes hold it together.
template <int kHeadDim, typename Weight>
__device__ __forceinline__ FloatPair normalize(const RawPair& raw, const Weight* weight, float eps,
                                               int column) {
  constexpr int kLanes = kHeadDim / (2 * kVector);
  FloatPair x;
  widen(raw.low, x.low);
  widen(raw.high, x.high);
  if (weight == nullptr) return x;

  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum += x.low[i] * x.low[i] + x.high[i] * x.high[i];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  const float scale = rsqrtf(sum / kHeadDim + eps);

  float w[kVector];
  load_vector(weight + column, w);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x.low[i] *= scale * w[i];
  load_vector(weight + kHeadDim / 2 + column, w);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x.high[i] *= scale * w[i];
  return x;
}

__device__ __forceinline__ RawPair rotate(const FloatPair& x, const float* cos, const float* sin,
                                          int angle) {
  if (cos == nullptr) return {narrow(x.low), narrow(x.high)};
  float c[kVector], s[kVector], low[kVector], high[kVector];
  load_vector(cos + angle, c);
  load_vector(sin + angle, s);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    low[i] = x.low[i] * c[i] - x.high[i] * s[i];
    high[i] = x.low[i] * s[i] + x.high[i] * c[i];
  }
  return {narrow(low), narrow(high)};
}

__device__ __forceinline__ int64_t row_offset(const Strides& strides, int64_t batch, int64_t token,
                                              int64_t head) {
  return batch * strides.batch + token * strides.token + head * strides.head;
}

template <int kHeadDim, typename Weight>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    kv_append_kernel(const __grid_constant__ KvAppendParams params) {
  constexpr int kHalf = kHeadDim / 2;
  constexpr int kLanes = kHeadDim / (2 * kVector);
  constexpr int kRowsPerBlock = kThreads / kLanes;

  const int64_t frame = *params.step;
  const int64_t slot = frame < params.sink_frames
                           ? frame
                           : params.sink_frames + (frame - params.sink_frames) % params.ring_frames;
  const int64_t slot_begin = params.text_tokens + slot * params.tokens;

  const int column = threadIdx.x % kLanes * kVector;
  // 32-bit counts: dividing 64-bit ones costs more than the norm.
  const int heads = params.heads, tokens = params.tokens;
  const int rows = params.batch * tokens * heads;
  // The whole warp enters or leaves the loop together, as the norm's shuffles need: lanes past the
  // last row redo that row and store nothing.
  constexpr int kRowsPerWarp = 32 / kLanes;
  const int stride = gridDim.x * kRowsPerBlock;
  int row = blockIdx.x * kRowsPerBlock + threadIdx.x / kLanes;
  for (int first = row / kRowsPerWarp * kRowsPerWarp; first < rows;
       first += stride, row += stride) {
    const bool active = row < rows;
    const int here = active ? row : rows - 1;
    const int head = here % heads;
    const int token = here / heads % tokens;
    const int batch = here / heads / tokens;
    const int angle = token * kHalf + column;

    const int64_t key = slot_begin + token;
    const int64_t out = static_cast<int64_t>(here) * kHeadDim + column;

    // Load everything before the first use
    const RawPair q =
        load_row(params.q, row_offset(params.q_strides, batch, token, head) + column, kHalf);
    const RawPair k =
        load_row(params.k, row_offset(params.k_strides, batch, token, head) + column, kHalf);
    const RawPair v =
        load_row(params.v, row_offset(params.v_strides, batch, token, head) + column, kHalf);

    // Value: a copy, bit for bit
    if (active) {
      store_row(params.v_cache, row_offset(params.v_cache_strides, batch, key, head) + column,
                kHalf, v);
    }

    // Key
    const FloatPair k_normed =
        normalize<kHeadDim>(k, static_cast<const Weight*>(params.k_weight), params.eps, column);
    const RawPair k_rotated = rotate(k_normed, params.cos, params.sin, angle);
    if (active) {
      store_row(params.k_cache, row_offset(params.k_cache_strides, batch, key, head) + column,
                kHalf, k_rotated);
    }

    // Query, and the same query as the pinned frame sees it
    const FloatPair q_normed =
        normalize<kHeadDim>(q, static_cast<const Weight*>(params.q_weight), params.eps, column);
    const RawPair q_rotated = rotate(q_normed, params.cos, params.sin, angle);
    if (active) store_row(params.q_out, out, kHalf, q_rotated);
    if (active and params.q_sink_out != nullptr) {
      store_row(params.q_sink_out, out, kHalf,
                rotate(q_normed, params.cos_sink, params.sin_sink, angle));
    }
  }
}

template <int kHeadDim, typename Weight>
const char* launch(const KvAppendParams& params, cudaStream_t stream) {
  constexpr int64_t kRowsPerBlock = kThreads / (kHeadDim / (2 * kVector));
  int device = 0, sms = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return cudaGetErrorString(status);

  const int64_t rows = params.batch * params.tokens * params.heads;
  const int64_t blocks =
      std::min<int64_t>((rows + kRowsPerBlock - 1) / kRowsPerBlock, kBlocksPerSm * sms);
  kv_append_kernel<kHeadDim, Weight><<<blocks, kThreads, 0, stream>>>(params);
  status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

const char* launch_kv_append_sm90(const KvAppendParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.head_dim == 64) {
    return params.float_weights ? launch<64, float>(params, cuda_stream)
                                : launch<64, __nv_bfloat16>(params, cuda_stream);
  }
  return params.float_weights ? launch<128, float>(params, cuda_stream)
                              : launch<128, __nv_bfloat16>(params, cuda_stream);
}

}  // namespace aapt
