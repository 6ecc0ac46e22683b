// Tensor maps of rows, in the tiles that products.cuh multiplies.
#pragma once

#include "attention/products.cuh"
#include "attention/rows.h"
#include "hopper/hopper.cuh"

namespace aapt {

// Makes the tensor maps of a launch, in tiles of `box_rows` tokens x 64 columns. Stops at the first
// map that cannot be made: `error` is then its message, else null.
template <class Params>
class MapMaker {
 public:
  explicit MapMaker(const Params& params) : params_(params) {}

  void operator()(hopper::TensorMap* map, const RowBuffer& rows, int box_rows) {
    if (error != nullptr) return;
    const uint64_t dims[] = {
        static_cast<uint64_t>(params_.head_dim), static_cast<uint64_t>(rows.tokens),
        static_cast<uint64_t>(params_.heads), static_cast<uint64_t>(params_.batch)};
    const uint64_t strides[] = {rows.token_stride, rows.head_stride, rows.batch_stride};
    const uint32_t box[] = {kPanel, static_cast<uint32_t>(box_rows), 1, 1};
    error = hopper::make_tensor_map(map, rows.data, 2, 4, dims, strides, box, hopper::SW_128);
  }

  const char* error = nullptr;

 private:
  const Params& params_;
};

}  // namespace aapt
