// How the float32 sums of dq lie in memory: query tile after query tile, one half of a tile per
// warpgroup, and in it four elements of a thread at a time, neighbouring threads side by side. So a
// warpgroup writes them without bank conflicts and adds them with one bulk reduction.
#pragma once

#include "attention/products.cuh"
#include "block_causal_attention/params.h"
#include "hopper/hopper.cuh"

namespace aapt::block_causal {

template <int kHeadDim>
struct QuerySums {
  static constexpr int kRows = backward_query_tile(kHeadDim);
  static constexpr int kRowPanels = kRows / 64;
  static constexpr int kHalf = kSumsPerTile / kConsumers;  // floats: 64 rows x 64 columns

  // What a warpgroup's half is in the tile: both are multiples of 64.
  HOPPER_DEVICE static int row(int group) { return group % kRowPanels * 64; }
  HOPPER_DEVICE static int column(int group) { return group / kRowPanels * kPanel; }

  HOPPER_DEVICE static int tiles(const FrameMask& mask) {
    return (mask.query_rows + kRows - 1) / kRows;
  }
  // The half of one tile; those of dq_sink come after all of dq.
  HOPPER_DEVICE static float* half(const Params& params, float* sums, bool of_sink, int batch,
                                   int head, int tile, int group) {
    const int64_t pair =
        (static_cast<int64_t>(of_sink) * params.batch + batch) * params.heads + head;
    return sums + (pair * tiles(params.mask) + tile) * kSumsPerTile + group * kHalf;
  }
};

}  // namespace aapt::block_causal
