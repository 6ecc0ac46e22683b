#pragma once

#include <cstdint>

namespace aapt {

// Distances in elements between neighbours of a (batch, tokens, heads, head_dim) tensor, whose
// head_dim is contiguous.
struct Strides {
  int64_t batch, token, head;
};

}  // namespace aapt
