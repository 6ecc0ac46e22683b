// One launch per layer and step: RMSNorm of q and k, rotary embedding, and the write of k and v
// into the cache slot that the device-side step counter names (docs/method.md#4, docs/method.md#5).
//
// Memory-bound: every row is read once and written once, 16 bytes per access. A row (one token, one
// head) belongs to head_dim / 16 neighbouring lanes; a lane holds 8 elements of the row's first
// half and the 8 of the second half that rotate with them, so rotation needs no exchange, and the
// norm of a head only a short butterfly. For a norm across heads, a block takes a whole token
// instead.

#include <algorithm>

#include "hopper/hopper.cuh"
#include "kv_append/params.h"

namespace aapt {
namespace {

using namespace hopper;

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;  // 64 registers, no spill; 8 would leave 32
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 8;  // BF16 elements in 16 bytes

template <int kHeadDim>
constexpr int kLanes = kHeadDim / (2 * kVector);

// The two halves of a row that one lane holds, raw or in float32.
struct RawPair {
  uint4 low, high;
};
struct FloatPair {
  float low[kVector], high[kVector];
};
// One lane's share of a row.
struct Place {
  int batch, token, head, column;
};

HOPPER_DEVICE int64_t offset_of(const Strides& strides, const Place& at, int64_t token) {
  return at.batch * strides.batch + token * strides.token + at.head * strides.head + at.column;
}

HOPPER_DEVICE RawPair load_row(const void* tensor, int64_t offset, int half) {
  const auto* row = static_cast<const uint16_t*>(tensor) + offset;
  return {*reinterpret_cast<const uint4*>(row), *reinterpret_cast<const uint4*>(row + half)};
}

HOPPER_DEVICE void store_row(void* tensor, int64_t offset, int half, const RawPair& values) {
  auto* row = static_cast<uint16_t*>(tensor) + offset;
  *reinterpret_cast<uint4*>(row) = values.low;
  *reinterpret_cast<uint4*>(row + half) = values.high;
}

HOPPER_DEVICE void widen(const uint4& raw, float (&out)[kVector]) {
  const uint32_t pairs[] = {raw.x, raw.y, raw.z, raw.w};
  HOPPER_UNROLL
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = unpack_bf16(pairs[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

HOPPER_DEVICE FloatPair widen(const RawPair& raw) {
  FloatPair x;
  widen(raw.low, x.low);
  widen(raw.high, x.high);
  return x;
}

HOPPER_DEVICE uint4 narrow(const float (&x)[kVector]) {
  return {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
          pack_bf16(x[6], x[7])};
}

// Weights and angles: BF16 as its bits, or float32.
HOPPER_DEVICE void load_vector(const uint16_t* from, float (&out)[kVector]) {
  widen(load_readonly(reinterpret_cast<const uint4*>(from)), out);
}

HOPPER_DEVICE void load_vector(const float* from, float (&out)[kVector]) {
  HOPPER_UNROLL
  for (int i = 0; i < kVector; i += 4) {
    const float4 four = load_readonly(reinterpret_cast<const float4*>(from + i));
    out[i] = four.x;
    out[i + 1] = four.y;
    out[i + 2] = four.z;
    out[i + 3] = four.w;
  }
}

HOPPER_DEVICE float sum_of_squares(const RawPair& raw) {
  const FloatPair x = widen(raw);
  float sum = 0.0f;
  HOPPER_UNROLL
  for (int i = 0; i < kVector; ++i) sum += x.low[i] * x.low[i] + x.high[i] * x.high[i];
  return sum;
}

// The sum over `lanes` neighbouring lanes, in each of them.
HOPPER_DEVICE float sum_over(float value, int lanes) {
  HOPPER_UNROLL
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += shfl_xor(value, distance);
  return value;
}

// x scale weight, where scale is 1 / rms(x); without a weight there is no norm.
template <typename Weight>
HOPPER_DEVICE FloatPair normalize(const RawPair& raw, const void* weight, int offset, int half,
                                  float scale) {
  FloatPair x = widen(raw);
  if (weight == nullptr) return x;
  const Weight* from = static_cast<const Weight*>(weight) + offset;
  float w[kVector];
  load_vector(from, w);
  HOPPER_UNROLL
  for (int i = 0; i < kVector; ++i) x.low[i] *= scale * w[i];
  load_vector(from + half, w);
  HOPPER_UNROLL
  for (int i = 0; i < kVector; ++i) x.high[i] *= scale * w[i];
  return x;
}

HOPPER_DEVICE RawPair rotate(const FloatPair& x, const float* cos, const float* sin, int angle) {
  if (cos == nullptr) return {narrow(x.low), narrow(x.high)};
  float c[kVector], s[kVector], low[kVector], high[kVector];
  load_vector(cos + angle, c);
  load_vector(sin + angle, s);
  HOPPER_UNROLL
  for (int i = 0; i < kVector; ++i) {
    low[i] = x.low[i] * c[i] - x.high[i] * s[i];
    high[i] = x.low[i] * s[i] + x.high[i] * c[i];
  }
  return {narrow(low), narrow(high)};
}

// The cache row of the new frame's first token.
HOPPER_DEVICE int64_t first_cache_row(const KvAppendParams& params) {
  int64_t slot = *params.step;
  if (slot >= params.sink_frames) {
    slot = params.sink_frames + (slot - params.sink_frames) % params.ring_frames;
  }
  return params.text_tokens + slot * params.tokens;
}

// A value is copied, bit for bit.
HOPPER_DEVICE void write_value(const KvAppendParams& params, const Place& at, int64_t cache_row,
                               int half, const RawPair& v) {
  store_row(params.v_cache, offset_of(params.v_cache_strides, at, cache_row + at.token), half, v);
}

// The first element that a lane reads of the weight.
template <int kHeadDim, bool kAcrossHeads>
HOPPER_DEVICE int weight_offset(const Place& at) {
  return kAcrossHeads ? at.head * kHeadDim + at.column : at.column;
}

template <int kHeadDim, bool kAcrossHeads, typename Weight>
HOPPER_DEVICE void write_key(const KvAppendParams& params, const Place& at, int64_t cache_row,
                             const RawPair& raw, float scale) {
  constexpr int kHalf = kHeadDim / 2;
  const FloatPair k = normalize<Weight>(raw, params.k_weight,
                                        weight_offset<kHeadDim, kAcrossHeads>(at), kHalf, scale);
  store_row(params.k_cache, offset_of(params.k_cache_strides, at, cache_row + at.token), kHalf,
            rotate(k, params.cos, params.sin, at.token * kHalf + at.column));
}

// Writes the query, and the query rotated for the pinned sink frames.
template <int kHeadDim, bool kAcrossHeads, typename Weight>
HOPPER_DEVICE void write_query(const KvAppendParams& params, const Place& at, const RawPair& raw,
                               float scale) {
  constexpr int kHalf = kHeadDim / 2;
  const int angle = at.token * kHalf + at.column;
  const int row = (at.batch * params.tokens + at.token) * params.heads + at.head;
  const int64_t out = static_cast<int64_t>(row) * kHeadDim + at.column;
  const FloatPair q = normalize<Weight>(raw, params.q_weight,
                                        weight_offset<kHeadDim, kAcrossHeads>(at), kHalf, scale);
  store_row(params.q_out, out, kHalf, rotate(q, params.cos, params.sin, angle));
  if (params.q_sink_out == nullptr) return;
  store_row(params.q_sink_out, out, kHalf, rotate(q, params.cos_sink, params.sin_sink, angle));
}

// Spreads lanes over all rows, and norms each row by itself.
template <int kHeadDim, typename Weight>
HOPPER_DEVICE void append_heads(const KvAppendParams& params) {
  constexpr int kHalf = kHeadDim / 2, kRowLanes = kLanes<kHeadDim>;
  constexpr int kRowsPerWarp = 32 / kRowLanes, kRowsPerBlock = kThreads / kRowLanes;
  const int64_t cache_row = first_cache_row(params);
  const int column = threadIdx.x % kRowLanes * kVector;
  // 32-bit counts: dividing 64-bit ones costs more than the norm.
  const int heads = params.heads, tokens = params.tokens;
  const int rows = params.batch * tokens * heads;
  const int stride = gridDim.x * kRowsPerBlock;
  int row = blockIdx.x * kRowsPerBlock + threadIdx.x / kRowLanes;
  // The whole warp enters or leaves the loop together, as the norm's shuffles need: lanes past the
  // last row redo that row and store nothing.
  for (int first = row / kRowsPerWarp * kRowsPerWarp; first < rows;
       first += stride, row += stride) {
    const int here = row < rows ? row : rows - 1;
    const Place at{here / heads / tokens, here / heads % tokens, here % heads, column};
    // Load everything before the first use
    const RawPair q = load_row(params.q, offset_of(params.q_strides, at, at.token), kHalf);
    const RawPair k = load_row(params.k, offset_of(params.k_strides, at, at.token), kHalf);
    const RawPair v = load_row(params.v, offset_of(params.v_strides, at, at.token), kHalf);
    const float q_sum = sum_over(sum_of_squares(q), kRowLanes);
    const float k_sum = sum_over(sum_of_squares(k), kRowLanes);
    if (row != here) continue;
    write_value(params, at, cache_row, kHalf, v);
    write_key<kHeadDim, false, Weight>(params, at, cache_row, k,
                                       rsqrt_approx(k_sum / kHeadDim + params.eps));
    write_query<kHeadDim, false, Weight>(params, at, q,
                                         rsqrt_approx(q_sum / kHeadDim + params.eps));
  }
}

// Gives a block to each token, and norms the token across its heads. The second read of q and k is
// from L1.
template <int kHeadDim, typename Weight>
HOPPER_DEVICE void append_tokens(const KvAppendParams& params) {
  constexpr int kHalf = kHeadDim / 2, kRowLanes = kLanes<kHeadDim>;
  HOPPER_SHARED(shared);
  auto* warp_sums = reinterpret_cast<float2*>(shared);  // of q and k; two places that alternate
  const int64_t cache_row = first_cache_row(params);
  const int column = threadIdx.x % kRowLanes * kVector;
  const int heads = params.heads, tokens = params.tokens, all_tokens = params.batch * tokens;
  const int first = threadIdx.x / kRowLanes, stride = blockDim.x / kRowLanes;
  const int warps = blockDim.x / 32;
  int turn = 0;
  for (int token = blockIdx.x; token < all_tokens; token += gridDim.x, turn ^= 1) {
    Place at{token / tokens, token % tokens, first, column};
    float q_sum = 0.0f, k_sum = 0.0f;
    for (; at.head < heads; at.head += stride) {
      const RawPair q = load_row(params.q, offset_of(params.q_strides, at, at.token), kHalf);
      const RawPair k = load_row(params.k, offset_of(params.k_strides, at, at.token), kHalf);
      const RawPair v = load_row(params.v, offset_of(params.v_strides, at, at.token), kHalf);
      q_sum += sum_of_squares(q);
      k_sum += sum_of_squares(k);
      write_value(params, at, cache_row, kHalf, v);
    }
    q_sum = sum_over(q_sum, 32);
    k_sum = sum_over(k_sum, 32);
    // Sums alternate between two places, so that one barrier per token is enough.
    float2* sums = warp_sums + turn * kWarps;
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = {q_sum, k_sum};
    cta_sync();
    q_sum = k_sum = 0.0f;
    for (int warp = 0; warp < warps; ++warp) {
      q_sum += sums[warp].x;
      k_sum += sums[warp].y;
    }
    const float width = heads * kHeadDim;
    const float q_scale = rsqrt_approx(q_sum / width + params.eps);
    const float k_scale = rsqrt_approx(k_sum / width + params.eps);
    for (at.head = first; at.head < heads; at.head += stride) {
      const RawPair k = load_row(params.k, offset_of(params.k_strides, at, at.token), kHalf);
      write_key<kHeadDim, true, Weight>(params, at, cache_row, k, k_scale);
      const RawPair q = load_row(params.q, offset_of(params.q_strides, at, at.token), kHalf);
      write_query<kHeadDim, true, Weight>(params, at, q, q_scale);
    }
  }
}

template <int kHeadDim, bool kAcrossHeads, typename Weight>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(kThreads, kBlocksPerSm)
    kv_append_kernel(const HOPPER_GRID_CONSTANT KvAppendParams params) {
  if constexpr (kAcrossHeads) {
    append_tokens<kHeadDim, Weight>(params);
  } else {
    append_heads<kHeadDim, Weight>(params);
  }
}

template <int kHeadDim, typename Weight>
const char* launch(const KvAppendParams& params, int multiprocessors, void* stream) {
  const int64_t tokens = params.batch * params.tokens;
  if (params.across_heads) {
    // At most the warps that hold one token, and as many blocks as the registers allow.
    const int64_t lanes = (params.heads * kLanes<kHeadDim> + 31) / 32 * 32;
    const int threads = std::min<int64_t>(lanes, kThreads);
    const int64_t resident = kBlocksPerSm * kThreads / threads * multiprocessors;
    const auto kernel = kv_append_kernel<kHeadDim, true, Weight>;
    return HOPPER_LAUNCH(kernel, dim3(std::min(tokens, resident)), dim3(threads),
                         2 * kWarps * sizeof(float2), stream, params);
  }
  constexpr int64_t kRowsPerBlock = kThreads / kLanes<kHeadDim>;
  const int64_t blocks = (tokens * params.heads + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t resident = kBlocksPerSm * multiprocessors;
  const auto kernel = kv_append_kernel<kHeadDim, false, Weight>;
  return HOPPER_LAUNCH(kernel, dim3(std::min(blocks, resident)), dim3(kThreads), 0, stream, params);
}

}  // namespace

const char* launch_kv_append_sm90(const KvAppendParams& params, int multiprocessors, void* stream) {
  const bool wide = params.head_dim == 128;
  const auto start = params.float_weights ? (wide ? launch<128, float> : launch<64, float>)
                                          : (wide ? launch<128, uint16_t> : launch<64, uint16_t>);
  return start(params, multiprocessors, stream);
}

}  // namespace aapt
