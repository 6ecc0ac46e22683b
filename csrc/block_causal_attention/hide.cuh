// Hides elements of score fragments, in tiles at an edge of the mask.
#pragma once

#include "block_causal_attention/mask.h"
#include "hopper/hopper.cuh"

namespace aapt::block_causal {

// Hides the keys of a tile that the two query rows of this thread do not see.
template <int kKeys>
HOPPER_DEVICE void hide_keys(float (&scores)[kKeys / 2], const RowView (&views)[2],
                             const KeyTile& tile) {
  const int first = tile.row + threadIdx.x % 4 * 2;
  HOPPER_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int head_end = smaller(views[half].head_end(), tile.end) - first;
    const int begin = views[half].window.begin - first;
    const int end = smaller(views[half].window.end, tile.end) - first;
    HOPPER_UNROLL
    for (int i = 2 * half; i < kKeys / 2; i += 4) {
      HOPPER_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int column = i / 4 * 8 + j;
        const bool seen = column < head_end || (column >= begin && column < end);
        if (!seen) scores[i + j] = -INFINITY;
      }
    }
  }
}

// Hides the query rows that do not see the two keys of this thread, in a tile from `row` on.
template <int kRows>
HOPPER_DEVICE void hide_rows(float (&scores)[kRows / 2], const Interval (&seen_by)[2], int row) {
  const int first = row + threadIdx.x % 4 * 2;
  HOPPER_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int begin = seen_by[half].begin - first, end = seen_by[half].end - first;
    HOPPER_UNROLL
    for (int i = 2 * half; i < kRows / 2; i += 4) {
      HOPPER_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int column = i / 4 * 8 + j;
        if (column < begin || column >= end) scores[i + j] = -INFINITY;
      }
    }
  }
}

}  // namespace aapt::block_causal
