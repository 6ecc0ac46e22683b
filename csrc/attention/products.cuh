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
  const uint64_t q_desc = hopper::make_desc(q, 16, kSwizzleStride, hopper::SW_128);
  const uint64_t k_desc = hopper::make_desc(k, 16, kSwizzleStride, hopper::SW_128);
  HOPPER_UNROLL
  for (int i = 0; i < kHeadDim / kMmaDepth; ++i) {
    constexpr int kPerPanel = kPanel / kMmaDepth;
    const uint32_t within = i % kPerPanel * kMmaDepth * 2;
    const uint32_t q_offset = i / kPerPanel * 64 * kPanelRow + within;
    const uint32_t k_offset = i / kPerPanel * kKeys * kPanelRow + within;
    hopper::wgmma_ss<kKeys, 0, 0>(scores, hopper::advance(q_desc, q_offset),
                                  hopper::advance(k_desc, k_offset), i != 0);
  }
}

// out += p v: p (64, kKeys) in registers, v (kKeys, head_dim) along head_dim.
template <int kHeadDim, int kKeys>
HOPPER_DEVICE void multiply_pv(float (&out)[kHeadDim / 2],
                               const uint32_t (&p)[kKeys / kMmaDepth][4], uint32_t v) {
  // The leading offset leads from one panel of columns to the next.
  const uint64_t v_desc = hopper::make_desc(v, kKeys * kPanelRow, kSwizzleStride, hopper::SW_128);
  HOPPER_UNROLL
  for (int i = 0; i < kKeys / kMmaDepth; ++i) {
    hopper::wgmma_rs<kHeadDim, 1>(out, p[i], hopper::advance(v_desc, i * kMmaDepth * kPanelRow), 1);
  }
}

// sums = k^T ds: k (kKeys, 64), one panel, in blocks of 64 keys `block_bytes` apart; ds (kKeys,
// kRows) along its rows, in panels of 16 rows with 32-byte swizzle, so that kRows need not be a
// multiple of 64.
template <int kKeys, int kRows>
HOPPER_DEVICE void multiply_transposed(float (&sums)[kRows / 2], uint32_t k, uint32_t block_bytes,
                                       uint32_t ds) {
  constexpr int kRowPanel = 16, kRowBytes = kRowPanel * 2;
  const uint64_t k_desc = hopper::make_desc(k, block_bytes, kSwizzleStride, hopper::SW_128);
  const uint64_t ds_desc = hopper::make_desc(ds, kKeys * kRowBytes, 8 * kRowBytes, hopper::SW_32);
  HOPPER_UNROLL
  for (int i = 0; i < kKeys / kMmaDepth; ++i) {
    constexpr int kPerBlock = 64 / kMmaDepth, kStep = kMmaDepth * kPanelRow;
    const uint32_t k_offset = i / kPerBlock * block_bytes + i % kPerBlock * kStep;
    hopper::wgmma_ss<kRows, 1, 1>(sums, hopper::advance(k_desc, k_offset),
                                  hopper::advance(ds_desc, i * kMmaDepth * kRowBytes), i != 0);
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

// Exchanges words between four neighbouring lanes: lane l of them gets word l of lane j as word j.
HOPPER_DEVICE void transpose_quad(uint32_t (&words)[4]) {
  HOPPER_UNROLL
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = threadIdx.x & step;
    HOPPER_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t got = hopper::shfl_xor(upper ? words[i] : words[i + step], step);
      (upper ? words[i] : words[i + step]) = got;
    }
  }
}

// The columns 32 i + 8 (lane % 4) to 32 i + 8 (lane % 4) + 7 of a row of an accumulator, times a
// factor and rounded to BF16: 16 bytes, where the fragment has four pairs in four places. `half`:
// the first of the thread's two rows, or the second.
template <int kColumns>
HOPPER_DEVICE uint4 gather_columns(const float (&sums)[kColumns / 2], int i, int half,
                                   float factor) {
  uint32_t words[4];
  HOPPER_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int at = 4 * (4 * i + j) + 2 * half;
    words[j] = hopper::pack_bf16(sums[at] * factor, sums[at + 1] * factor);
  }
  transpose_quad(words);
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace aapt
