// Rows of a tile in shared memory that hold NaN or infinity. A weight of zero does not hide such a
// row, because zero times NaN is NaN: a row that only some queries see is zeroed before the
// product.
#pragma once

#include "attention/products.cuh"
#include "hopper/hopper.cuh"

namespace aapt {

// The i-th vector of a row. Lanes with neighbouring rows read different banks.
HOPPER_DEVICE int vector_of(int row, int i) {
  constexpr int kVectors = kPanelRow / sizeof(uint4);
  return row * kVectors + (i ^ row % kVectors);
}

// True if no element of a row is NaN or infinity. kLanes lanes share the row: each, a number below
// kLanes, answers for its part.
template <int kLanes = 1, int kPanels, int kSize>
HOPPER_DEVICE bool is_finite_row(const uint16_t (&tile)[kPanels][kSize], int row, int lane = 0) {
  // The fetching warpgroup has few registers: hence two sums and few loads at a time
  uint32_t sums[2] = {0, 0};  // of zero times the elements: zero unless one is not finite
  HOPPER_UNROLL_BY(1)
  for (int panel = 0; panel < kPanels; ++panel) {
    const auto* vectors = reinterpret_cast<const uint4*>(tile[panel]);
    HOPPER_UNROLL_BY(2)
    for (int i = 0; i < static_cast<int>(kPanelRow / sizeof(uint4)); i += kLanes) {
      const uint4 pairs = vectors[vector_of(row, i + lane)];
      sums[0] = hopper::multiply_add_bf16(pairs.x, 0, sums[0]);
      sums[1] = hopper::multiply_add_bf16(pairs.y, 0, sums[1]);
      sums[0] = hopper::multiply_add_bf16(pairs.z, 0, sums[0]);
      sums[1] = hopper::multiply_add_bf16(pairs.w, 0, sums[1]);
    }
  }
  return (sums[0] | sums[1]) == 0;
}

// Zeroes this lane's part of a row, see is_finite_row.
template <int kLanes = 1, int kPanels, int kSize>
HOPPER_DEVICE void zero_row(uint16_t (&tile)[kPanels][kSize], int row, int lane = 0) {
  HOPPER_UNROLL_BY(1)
  for (int panel = 0; panel < kPanels; ++panel) {
    auto* vectors = reinterpret_cast<uint4*>(tile[panel]);
    HOPPER_UNROLL_BY(1)
    for (int i = lane; i < static_cast<int>(kPanelRow / sizeof(uint4)); i += kLanes) {
      vectors[vector_of(row, i)] = {0, 0, 0, 0};
    }
  }
}

}  // namespace aapt
