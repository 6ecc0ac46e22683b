// Online softmax of one warpgroup: a thread keeps the running maximum and sum of its two rows.
#pragma once

#include "hopper/hopper.cuh"

namespace aapt {

struct OnlineSoftmax {
  float maximum[2] = {-INFINITY, -INFINITY};  // of the raw scores
  float sum[2] = {0.0f, 0.0f};                // of this thread's columns, until `reduce`

  // Turns raw scores, -inf for a hidden key, into weights relative to the new maximum. Returns in
  // `rescale` the factor of all older weights. A row may see no key.
  template <int kKeys>
  HOPPER_DEVICE void add(float (&scores)[kKeys / 2], float (&rescale)[2], float scale_log2) {
    HOPPER_UNROLL
    for (int row = 0; row < 2; ++row) {
      float highest = maximum[row];
      HOPPER_UNROLL
      for (int i = 2 * row; i < kKeys / 2; i += 4) {
        highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
      }
      highest = fmaxf(highest, hopper::shfl_xor(highest, 1));
      highest = fmaxf(highest, hopper::shfl_xor(highest, 2));
      const float offset = highest == -INFINITY ? 0.0f : highest * scale_log2;
      rescale[row] = hopper::exp2_approx(maximum[row] * scale_log2 - offset);
      maximum[row] = highest;
      float added = 0.0f;
      HOPPER_UNROLL
      for (int i = 2 * row; i < kKeys / 2; i += 4) {
        scores[i] = hopper::exp2_approx(scores[i] * scale_log2 - offset);
        scores[i + 1] = hopper::exp2_approx(scores[i + 1] * scale_log2 - offset);
        added += scores[i] + scores[i + 1];
      }
      sum[row] = sum[row] * rescale[row] + added;
    }
  }

  // Adds `sum` over the four threads that share a row.
  HOPPER_DEVICE void reduce() {
    HOPPER_UNROLL
    for (int row = 0; row < 2; ++row) {
      sum[row] += hopper::shfl_xor(sum[row], 1);
      sum[row] += hopper::shfl_xor(sum[row], 2);
    }
  }

  // After `reduce`: the natural logarithm of the sum of exponentials; -inf if the row sees nothing.
  HOPPER_DEVICE float log_sum_exp(int row, float scale_log2) const {
    constexpr float kLn2 = 0.693147180559945f;
    return kLn2 * (maximum[row] * scale_log2 + hopper::log2_approx(sum[row]));
  }
};

// Hides the columns of a fragment from `visible` on, if any.
template <int kKeys>
HOPPER_DEVICE void hide_columns(float (&scores)[kKeys / 2], int visible) {
  if (visible >= kKeys) return;
  const int column = threadIdx.x % 4 * 2;
  HOPPER_UNROLL
  for (int i = 0; i < kKeys / 2; ++i) {
    if (i / 4 * 8 + column + i % 2 >= visible) scores[i] = -INFINITY;
  }
}

// Multiplies the two rows of an accumulator fragment.
template <int kSize>
HOPPER_DEVICE void scale_rows(float (&fragment)[kSize], const float (&factor)[2]) {
  HOPPER_UNROLL
  for (int i = 0; i < kSize; ++i) fragment[i] *= factor[i / 2 % 2];
}

}  // namespace aapt
