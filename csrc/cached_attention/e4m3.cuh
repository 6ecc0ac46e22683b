// Products, softmax and tiles of attention in E4M3 (docs/method.md#16).
//
// Rows of 128 bytes, 128-byte swizzle: queries and keys along head_dim, values along the keys. The
// rows of a tile of keys are permuted within each group of 16: row 8 h + 2 t + i is key
// 4 t + 2 h + i. So the four scores of a group that a thread has in a row are those of four
// neighbouring keys, and their weights are a word of the left factor of the next product.
#pragma once

#include "attention/finite.cuh"
#include "attention/products.cuh"
#include "attention/softmax.cuh"
#include "cached_attention/params.h"
#include "hopper/hopper.cuh"

namespace aapt {

constexpr int kE4m3Depth = 32;  // elements of one instruction's inner product
constexpr int kTileRow = 128;   // bytes, and so head_dim and keys of a tile
constexpr float kLargestE4m3 = 448.0f;
constexpr float kWeightLog2 = 8.0f;  // of the largest weight: 2^9 would be beyond 448
constexpr float kSmallestSquare = 1e-30f;

struct E4m3Block {
  uint8_t bytes[kQueryBlock * kTileRow];
};
struct E4m3Keys {
  uint8_t bytes[kTileRow * kTileRow];
};
struct E4m3Values {
  uint8_t bytes[kTileRow * kTileRow];
};

struct KeyMap {
  hopper::TensorMap map;
  KeyGroups groups;
};

// The dimensions of the map are head_dim, i, t, h and the groups of all heads.
HOPPER_DEVICE void load_tile(E4m3Keys& tile, const KeyMap& keys, uint64_t* full, int row, int head,
                             int batch) {
  const int group = batch * keys.groups.batch + head * keys.groups.head + row / kKeyGroup;
  hopper::tma_load_5d(tile.bytes, &keys.map, full, 0, 0, 0, 0, group,
                      hopper::CacheHint::EVICT_LAST);
}

HOPPER_DEVICE void load_tile(E4m3Values& tile, const hopper::TensorMap& map, uint64_t* full,
                             int row, int head, int batch) {
  hopper::tma_load_4d(tile.bytes, &map, full, row, 0, head, batch, hopper::CacheHint::EVICT_LAST);
}

// The bytes of a word of four keys that stay: those from `hidden` to `visible`, counted from the
// first.
HOPPER_DEVICE uint32_t bytes_between(int hidden, int visible) {
  const int begin = hidden < 0 ? 0 : hidden > 4 ? 4 : hidden;
  const int end = visible < 0 ? 0 : visible > 4 ? 4 : visible;
  return static_cast<uint32_t>((uint64_t{1} << 8 * end) - (uint64_t{1} << 8 * begin));
}

// Zeroes the values of keys before `hidden` and from `visible` on. Called by one whole warp.
HOPPER_DEVICE void zero_columns(E4m3Values& tile, int hidden, int visible) {
  auto* vectors = reinterpret_cast<uint4*>(tile.bytes);
  HOPPER_UNROLL_BY(1)
  for (int row = threadIdx.x % 32; row < kTileRow; row += 32) {
    HOPPER_UNROLL_BY(1)
    for (int i = 0; i < kTileRow / 16; ++i) {
      const int begin = hidden - 16 * i, end = visible - 16 * i;
      if (begin <= 0 && end >= 16) continue;
      uint4& keys = vectors[vector_of(row, i)];
      keys = {keys.x & bytes_between(begin, end), keys.y & bytes_between(begin - 4, end - 4),
              keys.z & bytes_between(begin - 8, end - 8),
              keys.w & bytes_between(begin - 12, end - 12)};
    }
  }
}

HOPPER_DEVICE float sum_of_squares(uint32_t pair) {
  const float2 x = hopper::unpack_bf16(pair);
  return x.x * x.x + x.y * x.y;
}

HOPPER_DEVICE uint32_t narrow(uint32_t low, uint32_t high, float factor) {
  const float2 x = hopper::unpack_bf16(low), y = hopper::unpack_bf16(high);
  return hopper::pack_e4m3(x.x * factor, x.y * factor, y.x * factor, y.y * factor);
}

// Rounds this warp's 16 rows of a block of BF16 queries, each over its norm times 448, which no
// element exceeds. `scale`: that of this thread's two rows. Two lanes share a row, a panel each.
HOPPER_DEVICE void round_queries(const uint16_t (&from)[2][kQueryBlock * kPanel], E4m3Block& to,
                                 float (&scale)[2]) {
  constexpr int kVectors = kPanelRow / sizeof(uint4);
  const int lane = threadIdx.x % 32, panel = lane / 16;
  const int row = threadIdx.x / 32 % 4 * 16 + lane % 16;
  const auto* vectors = reinterpret_cast<const uint4*>(from[panel]);
  float square = 0.0f;
  HOPPER_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const uint4 x = vectors[vector_of(row, i)];
    square += sum_of_squares(x.x) + sum_of_squares(x.y) + sum_of_squares(x.z) + sum_of_squares(x.w);
  }
  square += hopper::shfl_xor(square, 16);
  const float inverse = kLargestE4m3 * hopper::rsqrt_approx(fmaxf(square, kSmallestSquare));
  HOPPER_UNROLL
  for (int i = 0; i < kVectors; i += 2) {
    const uint4 x = vectors[vector_of(row, i)], y = vectors[vector_of(row, i + 1)];
    reinterpret_cast<uint4*>(to.bytes)[vector_of(row, (panel * kVectors + i) / 2)] = {
        narrow(x.x, x.y, inverse), narrow(x.z, x.w, inverse), narrow(y.x, y.y, inverse),
        narrow(y.z, y.w, inverse)};
  }
  scale[0] = hopper::shfl_idx(1.0f / inverse, lane / 4);
  scale[1] = hopper::shfl_idx(1.0f / inverse, lane / 4 + 8);
}

// scores = q k^T.
HOPPER_DEVICE void multiply_qk(float (&scores)[kTileRow / 2], uint32_t q, uint32_t k) {
  const uint64_t q_desc = hopper::make_desc(q, 16, kSwizzleStride, hopper::SW_128);
  const uint64_t k_desc = hopper::make_desc(k, 16, kSwizzleStride, hopper::SW_128);
  HOPPER_UNROLL
  for (int i = 0; i < kTileRow / kE4m3Depth; ++i) {
    const uint32_t at = i * kE4m3Depth;
    hopper::wgmma_ss_e4m3<kTileRow>(scores, hopper::advance(q_desc, at),
                                    hopper::advance(k_desc, at), i != 0);
  }
}

// sums = p v.
HOPPER_DEVICE void multiply_pv(float (&sums)[kTileRow / 2],
                               const uint32_t (&p)[kTileRow / kE4m3Depth][4], uint32_t v) {
  const uint64_t v_desc = hopper::make_desc(v, 16, kSwizzleStride, hopper::SW_128);
  HOPPER_UNROLL
  for (int i = 0; i < kTileRow / kE4m3Depth; ++i) {
    hopper::wgmma_rs_e4m3<kTileRow>(sums, p[i], hopper::advance(v_desc, i * kE4m3Depth), i != 0);
  }
}

// Hides the scores of keys before `hidden` and from `visible` on, if any.
HOPPER_DEVICE void hide_keys(float (&scores)[kTileRow / 2], int hidden, int visible) {
  if (hidden <= 0 && visible >= kTileRow) return;
  HOPPER_UNROLL
  for (int i = 0; i < kTileRow / 2; ++i) {
    const int key = i / 8 * 16 + threadIdx.x % 4 * 4 + i / 4 % 2 * 2 + i % 2;
    if (key < hidden || key >= visible) scores[i] = -INFINITY;
  }
}

// The first half of OnlineSoftmax::add, for weights of at most 2^kWeightLog2: updates the maximum
// and returns the factor of all older weights in `rescale`. `scale_log2` has a factor of the scores
// for either row, and the maximum is in powers of two, less kWeightLog2: weights, their sums and
// the log-sum-exp need no other correction.
HOPPER_DEVICE void raise_maximum(OnlineSoftmax& softmax, const float (&scores)[kTileRow / 2],
                                 float (&rescale)[2], const float (&scale_log2)[2]) {
  HOPPER_UNROLL
  for (int row = 0; row < 2; ++row) {
    float highest = -INFINITY;
    HOPPER_UNROLL
    for (int i = 2 * row; i < kTileRow / 2; i += 4) {
      highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
    }
    highest = fmaxf(highest, hopper::shfl_xor(highest, 1));
    highest = fmaxf(highest, hopper::shfl_xor(highest, 2));
    highest = fmaxf(softmax.maximum[row], highest * scale_log2[row] - kWeightLog2);
    // Every tile has a key that is seen, so the maximum is finite
    rescale[row] = hopper::exp2_approx(softmax.maximum[row] - highest);
    softmax.maximum[row] = highest;
  }
}

// The second half: turns scores into weights.
HOPPER_DEVICE void add_weights(OnlineSoftmax& softmax, float (&scores)[kTileRow / 2],
                               const float (&rescale)[2], const float (&scale_log2)[2]) {
  HOPPER_UNROLL
  for (int row = 0; row < 2; ++row) {
    const float maximum = softmax.maximum[row];
    float added = 0.0f;
    HOPPER_UNROLL
    for (int i = 2 * row; i < kTileRow / 2; i += 4) {
      scores[i] = hopper::exp2_approx(scores[i] * scale_log2[row] - maximum);
      scores[i + 1] = hopper::exp2_approx(scores[i + 1] * scale_log2[row] - maximum);
      added += scores[i] + scores[i + 1];
    }
    softmax.sum[row] = softmax.sum[row] * rescale[row] + added;
  }
}

// Rounds weights to E4M3, as the left factor of the next product.
HOPPER_DEVICE void pack_weights(const float (&weights)[kTileRow / 2],
                                uint32_t (&p)[kTileRow / kE4m3Depth][4]) {
  HOPPER_UNROLL
  for (int i = 0; i < kTileRow / 8; ++i) {
    const float* of = weights + (i / 4 * 2 + i % 4 / 2) * 8 + i % 2 * 2;
    p[i / 4][i % 4] = hopper::pack_e4m3(of[0], of[1], of[4], of[5]);
  }
}

}  // namespace aapt
