// The float32 sums of dq in memory: query tile after query tile, and in a tile one half per
// warpgroup. A half has four elements of each thread, then the next four of each thread, and so on.
// So a warpgroup writes it without bank conflicts and adds it with one bulk reduction.
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

  // The first row and column of a warpgroup's half in its tile; multiples of 64.
  HOPPER_DEVICE static int row(int group) { return group % kRowPanels * 64; }
  HOPPER_DEVICE static int column(int group) { return group / kRowPanels * kPanel; }

  HOPPER_DEVICE static int tiles(const FrameMask& mask) {
    return (mask.query_rows + kRows - 1) / kRows;
  }
  // The address of a half; the sums of dq_sink come after all of dq.
  HOPPER_DEVICE static float* half(const Params& params, float* sums, bool of_sink, int batch,
                                   int head, int tile, int group) {
    const int64_t pair =
        (static_cast<int64_t>(of_sink) * params.batch + batch) * params.heads + head;
    return sums + (pair * tiles(params.mask) + tile) * kSumsPerTile + group * kHalf;
  }
};

}  // namespace aapt::block_causal
