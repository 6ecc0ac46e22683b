// The two matrix products of attention on one warpgroup: 64 queries, BF16 in, float32 sums.
//
// Tiles are stored in shared memory as TMA writes them: panels of 64 columns, 128-byte rows,
// 128-byte swizzle. A thread of warp w holds two rows: 16 w + lane / 4, and 8 rows after it. Of
// every 8 columns it holds two: 2 (lane % 4), and the next. Element i of its fragment is row half
// (i / 2) % 2, column 8 (i / 4) + 2 (lane % 4) + i % 2.
#pragma once

#include "hopper/hopper.cuh"

namespace aapt {

constexpr int kPanel = 64;                          // columns of 2 bytes in 128 bytes
constexpr uint32_t kPanelRow = 128;                 // bytes
constexpr uint32_t kSwizzleStride = 8 * kPanelRow;  // between groups of 8 rows
constexpr int kMmaDepth = 16;                       // elements of one instruction's inner product

// scores = q k^T: q (64, head_dim), k (kKeys, head_dim), both along head_dim.
template <int kHeadDim, int kKeys>
HOPPER_DEVICE void multiply_qk(float (&scores)[kKeys / 2], uint32_t q, uint32_t k) {
  HOPPER_UNROLL
  for (int i = 0; i < kHeadDim / kMmaDepth; ++i) {
    constexpr int kPerPanel = kPanel / kMmaDepth;
    const uint32_t within = i % kPerPanel * kMmaDepth * 2;
    const uint32_t q_offset = i / kPerPanel * 64 * kPanelRow + within;
    const uint32_t k_offset = i / kPerPanel * kKeys * kPanelRow + within;
    hopper::wgmma_ss<kKeys, 0, 0>(
        scores, hopper::make_desc(q + q_offset, 16, kSwizzleStride, hopper::SW_128),
        hopper::make_desc(k + k_offset, 16, kSwizzleStride, hopper::SW_128), i != 0);
  }
}

// out += p v: p (64, kKeys) in registers, v (kKeys, head_dim) along head_dim.
template <int kHeadDim, int kKeys>
HOPPER_DEVICE void multiply_pv(float (&out)[kHeadDim / 2],
                               const uint32_t (&p)[kKeys / kMmaDepth][4], uint32_t v) {
  HOPPER_UNROLL
  for (int i = 0; i < kKeys / kMmaDepth; ++i) {
    // The leading offset leads from one panel of columns to the next.
    hopper::wgmma_rs<kHeadDim, 1>(
        out, p[i],
        hopper::make_desc(v + i * kMmaDepth * kPanelRow, kKeys * kPanelRow, kSwizzleStride,
                          hopper::SW_128),
        1);
  }
}

// sums = ds^T k: ds (kKeys, 64) along its columns, one panel; k (kKeys, 64), one panel, in blocks
// of 64 keys `block_bytes` apart.
template <int kKeys>
HOPPER_DEVICE void multiply_transposed(float (&sums)[32], uint32_t ds, uint32_t k,
                                       uint32_t block_bytes) {
  HOPPER_UNROLL
  for (int i = 0; i < kKeys / kMmaDepth; ++i) {
    constexpr int kPerBlock = 64 / kMmaDepth, kStep = kMmaDepth * kPanelRow;
    hopper::wgmma_ss<64, 1, 1>(
        sums, hopper::make_desc(ds + i * kStep, kKeys * kPanelRow, kSwizzleStride, hopper::SW_128),
        hopper::make_desc(k + i / kPerBlock * block_bytes + i % kPerBlock * kStep, block_bytes,
                          kSwizzleStride, hopper::SW_128),
        i != 0);
  }
}

// Rounds the scores of one product to BF16, as the left factor of the next.
template <int kKeys>
HOPPER_DEVICE void pack_factor(const float (&scores)[kKeys / 2],
                               uint32_t (&p)[kKeys / kMmaDepth][4]) {
  HOPPER_UNROLL
  for (int i = 0; i < kKeys / kMmaDepth; ++i) {
    HOPPER_UNROLL
    for (int j = 0; j < 4; ++j) {
      p[i][j] = hopper::pack_bf16(scores[8 * i + 2 * j], scores[8 * i + 2 * j + 1]);
    }
  }
}

}  // namespace aapt
