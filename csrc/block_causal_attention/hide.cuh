// Changes elements of score fragments, in tiles at an edge of the mask.
#pragma once

#include "block_causal_attention/mask.h"
#include "hopper/hopper.cuh"

namespace aapt::block_causal {

// Calls `change(score, column, seen)` for all elements of a fragment. column: in the first of the
// four lanes of a row; seen: the element's query row sees its key.
template <int kKeys, class Change>
HOPPER_DEVICE void change_keys(float (&scores)[kKeys / 2], const RowView (&views)[2],
                               const KeyTile& tile, const Change& change) {
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
        change(scores[i + j], column, column < head_end || (column >= begin && column < end));
      }
    }
  }
}

// Hides the keys of a tile that the two query rows of this thread do not see.
template <int kKeys>
HOPPER_DEVICE void hide_keys(float (&scores)[kKeys / 2], const RowView (&views)[2],
                             const KeyTile& tile) {
  change_keys<kKeys>(scores, views, tile, [](float& score, int, bool seen) {
    if (!seen) score = -INFINITY;
  });
}

// Makes NaN of the weights of `broken` keys, a bit for each of the tile's 128, that the two query
// rows of this thread see.
HOPPER_DEVICE void spoil_keys(float (&weights)[64], const RowView (&views)[2], const KeyTile& tile,
                              const uint4& broken) {
  const uint32_t shift = threadIdx.x % 4 * 2;
  const uint32_t bits[4] = {broken.x >> shift, broken.y >> shift, broken.z >> shift,
                            broken.w >> shift};
  change_keys<128>(weights, views, tile, [&](float& weight, int column, bool seen) {
    if (seen && (bits[column / 32] >> column % 32 & 1)) weight = NAN;
  });
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
