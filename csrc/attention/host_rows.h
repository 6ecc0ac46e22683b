// Makes a RowBuffer on the host.
#pragma once

#include "attention/rows.h"
#include "host.h"

namespace aapt {

// Checks a tensor with `check_rows`, and describes its rows to a kernel.
inline RowBuffer row_buffer(const char* name, const Tensor& tensor, const Tensor& q,
                            int64_t length) {
  const Strides strides = check_rows(name, tensor, q, length);
  const auto bytes = [&](int64_t elements) {
    return static_cast<uint64_t>(elements * tensor.element_size());
  };
  return {device_pointer(tensor), bytes(strides.token), bytes(strides.head), bytes(strides.batch),
          static_cast<int>(length)};
}

}  // namespace aapt
