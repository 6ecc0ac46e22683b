// Tensor maps of rows, in the tiles that products.cuh multiplies.
#pragma once

#include "attention/products.cuh"
#include "attention/rows.h"
#include "hopper/hopper.cuh"

namespace aapt {

// Tiles of `box_rows` tokens x 64 columns. Returns null, or words that say what is wrong.
inline const char* make_rows_map(hopper::TensorMap* map, const RowBuffer& rows, int batch,
                                 int heads, int head_dim, int box_rows) {
  const uint64_t dims[] = {static_cast<uint64_t>(head_dim), static_cast<uint64_t>(rows.tokens),
                           static_cast<uint64_t>(heads), static_cast<uint64_t>(batch)};
  const uint64_t strides[] = {rows.token_stride, rows.head_stride, rows.batch_stride};
  const uint32_t box[] = {kPanel, static_cast<uint32_t>(box_rows), 1, 1};
  return hopper::make_tensor_map(map, rows.data, 2, 4, dims, strides, box, hopper::SW_128);
}

}  // namespace aapt
