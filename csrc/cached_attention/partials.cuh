// Adds the parts of a query block: through shared memory within a CTA, through global memory
// between CTAs. The CTA that arrives last adds all parts, in the order of the CTAs, so that the
// result does not depend on timing.
#pragma once

#include "attention/intervals.h"
#include "attention/softmax.cuh"
#include "cached_attention/params.h"
#include "hopper/hopper.cuh"

namespace aapt {

// One warpgroup's sums and softmax in memory: four elements of each thread, then the next four of
// each thread, and so on.
template <int kHeadDim>
struct Part {
  static constexpr int kConsumers = query_consumers(kHeadDim);
  static constexpr int kSums = kHeadDim / 8;      // float4 per thread
  static constexpr int kStats = kQueryBlock / 2;  // float4 per part: two rows of a quad

  float4* sums;
  float4* stats;

  HOPPER_DEVICE Part(float4* sums, float4* stats) : sums(sums), stats(stats) {}

  // A part in the workspace. At most two pieces of a CTA are parts: its first, which may begin
  // within a query tile, and its last, which may end within one. So there are two places per
  // warpgroup.
  HOPPER_DEVICE Part(const CachedAttentionParams& params, int cta, bool starts, int group) {
    const int64_t place = (2 * static_cast<int64_t>(cta) + starts) * kConsumers + group;
    sums = reinterpret_cast<float4*>(params.partial_out) + place * kSums * 128;
    stats = reinterpret_cast<float4*>(params.partial_stats) + place * kStats;
  }

  HOPPER_DEVICE static int quad() { return threadIdx.x % 128 / 4; }

  HOPPER_DEVICE void write(const float (&out)[kHeadDim / 2], const OnlineSoftmax& softmax) const {
    HOPPER_UNROLL
    for (int i = 0; i < kSums; ++i) {
      sums[i * 128 + threadIdx.x % 128] = {out[4 * i], out[4 * i + 1], out[4 * i + 2],
                                           out[4 * i + 3]};
    }
    if (threadIdx.x % 4 == 0) {
      stats[quad()] = {softmax.maximum[0], softmax.sum[0], softmax.maximum[1], softmax.sum[1]};
    }
  }
};

// The weight of a part with this maximum, if the maximum of all parts is `highest`.
HOPPER_DEVICE float part_weight(float maximum, float highest, float scale_log2) {
  return hopper::exp2_approx((maximum - highest) * scale_log2);
}

template <int kHeadDim>
HOPPER_DEVICE void add_sums(float (&out)[kHeadDim / 2], int i, const float4& sums,
                            const float (&weight)[2]) {
  out[4 * i] += sums.x * weight[0];
  out[4 * i + 1] += sums.y * weight[0];
  out[4 * i + 2] += sums.z * weight[1];
  out[4 * i + 3] += sums.w * weight[1];
}

// Adds a part in shared memory.
template <int kHeadDim>
HOPPER_DEVICE void add_part(float (&out)[kHeadDim / 2], OnlineSoftmax& softmax,
                            const Part<kHeadDim>& part, float scale_log2) {
  const float4 stats = part.stats[part.quad()];
  const float maximum[2] = {stats.x, stats.z}, sum[2] = {stats.y, stats.w};
  float own[2], other[2];
  HOPPER_UNROLL
  for (int row = 0; row < 2; ++row) {
    const float highest = fmaxf(softmax.maximum[row], maximum[row]);
    own[row] = part_weight(softmax.maximum[row], highest, scale_log2);
    other[row] = part_weight(maximum[row], highest, scale_log2);
    softmax.maximum[row] = highest;
    softmax.sum[row] = softmax.sum[row] * own[row] + sum[row] * other[row];
  }
  scale_rows(out, own);
  HOPPER_UNROLL
  for (int i = 0; i < part.kSums; ++i) {
    add_sums<kHeadDim>(out, i, part.sums[i * 128 + threadIdx.x % 128], other);
  }
}

// Replaces the sums by those of the whole block: the parts of the CTAs of `sharers`, first and
// last, in the workspace.
template <int kHeadDim>
HOPPER_DEVICE void add_parts(float (&out)[kHeadDim / 2], OnlineSoftmax& softmax,
                             const CachedAttentionParams& params, const Interval& sharers,
                             int group, float scale_log2) {
  const int first = sharers.begin, last = sharers.end;
  softmax = OnlineSoftmax();
  for (int cta = first; cta <= last; ++cta) {
    const Part<kHeadDim> part(params, cta, cta == first, group);
    const float4 stats = hopper::load_l2(part.stats + part.quad());
    softmax.maximum[0] = fmaxf(softmax.maximum[0], stats.x);
    softmax.maximum[1] = fmaxf(softmax.maximum[1], stats.z);
  }
  HOPPER_UNROLL
  for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.0f;
  for (int cta = first; cta <= last; ++cta) {
    const Part<kHeadDim> part(params, cta, cta == first, group);
    const float4 stats = hopper::load_l2(part.stats + part.quad());
    const float weight[2] = {part_weight(stats.x, softmax.maximum[0], scale_log2),
                             part_weight(stats.z, softmax.maximum[1], scale_log2)};
    softmax.sum[0] += stats.y * weight[0];
    softmax.sum[1] += stats.w * weight[1];
    HOPPER_UNROLL
    for (int i = 0; i < part.kSums; ++i) {
      add_sums<kHeadDim>(out, i, hopper::load_l2(part.sums + i * 128 + threadIdx.x % 128), weight);
    }
  }
}

}  // namespace aapt
