// The float32 sums of dq in memory: query tile after query tile, and in a tile one half per
// warpgroup, transposed: 64 columns of head_dim as the rows of a fragment. A half has four elements
// of each thread, then the next four of each thread, and so on. So a warpgroup writes it without
// bank conflicts, and one bulk reduction adds both halves.
#pragma once

#include "attention/products.cuh"
#include "block_causal_attention/params.h"
#include "hopper/hopper.cuh"

namespace aapt::block_causal {

template <int kHeadDim>
struct QuerySums {
  static constexpr int kRows = backward_query_tile(kHeadDim);
  static constexpr int kHalfRows = kHeadDim == 64 ? kRows / 2 : kRows;
  static constexpr int kHalf = kHalfRows * kPanel;  // floats
  static constexpr int kTile = kBackwardConsumers * kHalf;
  static constexpr int kRowPanel = 16;  // see multiply_transposed

  // The first row and column of a warpgroup's half in its tile.
  HOPPER_DEVICE static int row(int group) { return kHeadDim == 64 ? group * kHalfRows : 0; }
  HOPPER_DEVICE static int column(int group) { return kHeadDim == 64 ? 0 : group * kPanel; }

  HOPPER_DEVICE static int tiles(const FrameMask& mask) {
    return (mask.query_rows + kRows - 1) / kRows;
  }
  // The address of a half; the sums of dq_sink come after all of dq.
  HOPPER_DEVICE static float* half(const Params& params, float* sums, bool of_sink, int batch,
                                   int head, int tile, int group) {
    const int pair = (of_sink ? params.batch + batch : batch) * params.heads + head;
    const int index = pair * tiles(params.mask) + tile;
    return sums + static_cast<int64_t>(index) * kTile + group * kHalf;
  }
};

}  // namespace aapt::block_causal
