// One launch per layer and step: RMSNorm of q and k, rotary embedding, and the write of k and v
// into the cache slots that the device-side step counter names (docs/method.md#4,
// docs/method.md#5). For a cache of E4M3 also the product with a Hadamard matrix, the rounding and
// the transposition of v (docs/method.md#16).
//
// Memory-bound: every row is read once and written once, 16 bytes per access. For a norm across
// heads, a block takes a whole token.

#include <algorithm>

#include "hopper/hopper.cuh"
#include "kv_append/params.h"
#include "kv_append/rows.cuh"
#include "kv_append/values.cuh"

namespace aapt {
namespace {

constexpr int kBlocksPerSm = 4;  // 64 registers, no spill; 8 would leave 32
constexpr int kWarps = kThreads / 32;

template <int kHeadDim_, bool kAcrossHeads_, bool kE4m3_, typename Weight_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_, kHalf = kHeadDim / 2;
  static constexpr int kRowLanes = kLanes<kHeadDim>, kRowsPerWarp = 32 / kRowLanes;
  static constexpr bool kAcrossHeads = kAcrossHeads_, kE4m3 = kE4m3_;
  using Weight = Weight_;
};

// A value is copied, bit for bit.
HOPPER_DEVICE void write_value(const KvAppendParams& params, const Place& at, int row, int half,
                               const RawPair& v) {
  store_row(params.v_cache, offset_of(params.v_cache_strides, at, row), half, v);
}

template <class C>
HOPPER_DEVICE FloatPair normalize(const RawPair& raw, const void* weight, const Place& at,
                                  float scale) {
  const int offset = C::kAcrossHeads ? at.head * C::kHeadDim + at.column : at.column;
  return normalize<typename C::Weight>(raw, weight, offset, C::kHalf, scale);
}

// Multiplies by the Hadamard matrix over sqrt(head_dim) and by a factor, where the cache asks for
// it.
template <class C>
HOPPER_DEVICE void spread(const KvAppendParams& params, FloatPair& x, float factor) {
  if (params.use_hadamard) {
    constexpr float kInverseRoot = C::kHeadDim == 128 ? 0.08838834764831845f : 0.125f;
    multiply_hadamard<C::kHeadDim>(x);
    factor *= kInverseRoot;
  }
  multiply(x, factor);
}

// Takes all lanes of the warp; `active` ones write.
template <class C>
HOPPER_DEVICE void write_key(const KvAppendParams& params, const Place& at, bool active, int row,
                             const RawPair& raw, float scale) {
  FloatPair k = rotate(normalize<C>(raw, params.k_weight, at, scale), params.cos, params.sin,
                       at.token * C::kHalf + at.column);
  const int64_t offset = offset_of(params.k_cache_strides, at, row);
  if constexpr (C::kE4m3) {
    spread<C>(params, k, 1.0f / load_readonly(params.k_scale + at.head));
    if (!active) return;
    auto* out = static_cast<uint8_t*>(params.k_cache) + offset;
    *reinterpret_cast<uint2*>(out) = narrow_e4m3(k.low);
    *reinterpret_cast<uint2*>(out + C::kHalf) = narrow_e4m3(k.high);
  } else if (active) {
    store_row(params.k_cache, offset, C::kHalf, narrow(k));
  }
}

template <class C>
HOPPER_DEVICE void write_rotated(const KvAppendParams& params, const Place& at, bool active,
                                 const FloatPair& q, const float* cos, const float* sin,
                                 void* out) {
  FloatPair rotated = rotate(q, cos, sin, at.token * C::kHalf + at.column);
  if constexpr (C::kE4m3) spread<C>(params, rotated, 1.0f);
  const int row = (at.batch * params.tokens + at.token) * params.heads + at.head;
  const int64_t offset = static_cast<int64_t>(row) * C::kHeadDim + at.column;
  if (active) store_row(out, offset, C::kHalf, narrow(rotated));
}

// Writes the query, and the query rotated for the pinned sink frames. All lanes of the warp as in
// write_key.
template <class C>
HOPPER_DEVICE void write_query(const KvAppendParams& params, const Place& at, bool active,
                               const RawPair& raw, float scale) {
  const FloatPair q = normalize<C>(raw, params.q_weight, at, scale);
  write_rotated<C>(params, at, active, q, params.cos, params.sin, params.q_out);
  if (params.q_sink_out == nullptr) return;
  write_rotated<C>(params, at, active, q, params.cos_sink, params.sin_sink, params.q_sink_out);
}

// Spreads lanes over all rows, and norms each row by itself.
template <class C>
HOPPER_DEVICE void append_heads(const KvAppendParams& params) {
  constexpr int kRowsPerBlock = kThreads / C::kRowLanes;
  const int slot = first_slot(params);
  const int column = threadIdx.x % C::kRowLanes * kVector;
  // 32-bit counts: dividing 64-bit ones costs more than the norm.
  const int heads = params.heads, tokens = params.tokens;
  const int rows = params.batch * tokens * heads;
  const int stride = gridDim.x * kRowsPerBlock;
  int row = blockIdx.x * kRowsPerBlock + threadIdx.x / C::kRowLanes;
  // The whole warp enters or leaves the loop together, as shuffles need: lanes past the last row
  // redo that row and store nothing.
  for (int first = row / C::kRowsPerWarp * C::kRowsPerWarp; first < rows;
       first += stride, row += stride) {
    const bool active = row < rows;
    const int here = active ? row : rows - 1;
    const Place at{here / heads / tokens, here / heads % tokens, here % heads, column};
    const int stored = cache_row(params, slot, at.token);
    // Load everything before the first use
    const RawPair q = load_row(params.q, offset_of(params.q_strides, at, at.token), C::kHalf);
    const RawPair k = load_row(params.k, offset_of(params.k_strides, at, at.token), C::kHalf);
    if constexpr (!C::kE4m3) {
      const RawPair v = load_row(params.v, offset_of(params.v_strides, at, at.token), C::kHalf);
      if (active) write_value(params, at, stored, C::kHalf, v);
    }
    const float q_sum = sum_over(sum_of_squares(q), C::kRowLanes);
    const float k_sum = sum_over(sum_of_squares(k), C::kRowLanes);
    write_key<C>(params, at, active, stored, k, rsqrt_approx(k_sum / C::kHeadDim + params.eps));
    write_query<C>(params, at, active, q, rsqrt_approx(q_sum / C::kHeadDim + params.eps));
  }
}

// Gives a block to each token, and norms the token across its heads. The second read of q and k is
// from L1.
template <class C>
HOPPER_DEVICE void append_tokens(const KvAppendParams& params, void* shared) {
  auto* warp_sums = static_cast<float2*>(shared);  // of q and k; two places that alternate
  const int slot = first_slot(params);
  const int column = threadIdx.x % C::kRowLanes * kVector;
  const int heads = params.heads, tokens = params.tokens, all_tokens = params.batch * tokens;
  const int own = threadIdx.x / C::kRowLanes, stride = blockDim.x / C::kRowLanes;
  const int warps = blockDim.x / 32;
  int turn = 0;
  for (int token = blockIdx.x; token < all_tokens; token += gridDim.x, turn ^= 1) {
    Place at{token / tokens, token % tokens, own, column};
    const int stored = cache_row(params, slot, at.token);
    float q_sum = 0.0f, k_sum = 0.0f;
    for (; at.head < heads; at.head += stride) {
      const RawPair q = load_row(params.q, offset_of(params.q_strides, at, at.token), C::kHalf);
      const RawPair k = load_row(params.k, offset_of(params.k_strides, at, at.token), C::kHalf);
      if constexpr (!C::kE4m3) {
        const RawPair v = load_row(params.v, offset_of(params.v_strides, at, at.token), C::kHalf);
        write_value(params, at, stored, C::kHalf, v);
      }
      q_sum += sum_of_squares(q);
      k_sum += sum_of_squares(k);
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
    const float width = heads * C::kHeadDim;
    const float q_scale = rsqrt_approx(q_sum / width + params.eps);
    const float k_scale = rsqrt_approx(k_sum / width + params.eps);
    // The warp stays together, as in append_heads
    HOPPER_UNROLL_BY(1)
    for (int head = own; head - own % C::kRowsPerWarp < heads; head += stride) {
      const bool active = head < heads;
      at.head = active ? head : heads - 1;
      const RawPair q = load_row(params.q, offset_of(params.q_strides, at, at.token), C::kHalf);
      write_query<C>(params, at, active, q, q_scale);
      const RawPair k = load_row(params.k, offset_of(params.k_strides, at, at.token), C::kHalf);
      write_key<C>(params, at, active, stored, k, k_scale);
    }
  }
}

template <class C>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(kThreads, kBlocksPerSm)
    kv_append_kernel(const HOPPER_GRID_CONSTANT KvAppendParams params) {
  HOPPER_SHARED(shared);
  // Ends with a barrier: shared memory is free again
  if constexpr (C::kE4m3) append_values<C::kHeadDim>(params, shared);
  if constexpr (C::kAcrossHeads) {
    append_tokens<C>(params, shared);
  } else {
    append_heads<C>(params);
  }
}

template <class C>
const char* launch_kernel(const KvAppendParams& params, int multiprocessors, void* stream) {
  const int64_t tokens = params.batch * params.tokens;
  int threads = kThreads;
  int64_t blocks = 0;
  if (C::kAcrossHeads) {
    // At most the warps that hold one token
    threads = std::min((params.heads * C::kRowLanes + 31) / 32 * 32, kThreads);
    blocks = tokens;
  } else {
    constexpr int64_t kRowsPerBlock = kThreads / C::kRowLanes;
    blocks = (tokens * params.heads + kRowsPerBlock - 1) / kRowsPerBlock;
  }
  // As many blocks as the registers allow
  const int64_t resident = kBlocksPerSm * kThreads / threads * multiprocessors;
  size_t shared_bytes = C::kAcrossHeads ? 2 * kWarps * sizeof(float2) : 0;
  if (C::kE4m3) shared_bytes = std::max(shared_bytes, sizeof(ValueTile<C::kHeadDim>));
  return HOPPER_LAUNCH(kv_append_kernel<C>, dim3(std::min(blocks, resident)), dim3(threads),
                       shared_bytes, stream, params);
}

template <int kHeadDim, bool kE4m3, typename Weight>
const char* launch(const KvAppendParams& params, int multiprocessors, void* stream) {
  const auto start = params.across_heads ? launch_kernel<Config<kHeadDim, true, kE4m3, Weight>>
                                         : launch_kernel<Config<kHeadDim, false, kE4m3, Weight>>;
  return start(params, multiprocessors, stream);
}

template <bool kE4m3>
const char* launch(const KvAppendParams& params, int multiprocessors, void* stream) {
  const bool wide = params.head_dim == 128;
  const auto start = params.float_weights
                         ? (wide ? launch<128, kE4m3, float> : launch<64, kE4m3, float>)
                         : (wide ? launch<128, kE4m3, uint16_t> : launch<64, kE4m3, uint16_t>);
  return start(params, multiprocessors, stream);
}

}  // namespace

const char* launch_kv_append_sm90(const KvAppendParams& params, int multiprocessors, void* stream) {
  const bool e4m3 = params.k_scale != nullptr;
  return (e4m3 ? launch<true> : launch<false>)(params, multiprocessors, stream);
}

}  // namespace aapt
