// The rows of a BF16 (batch, tokens, heads, head_dim) tensor as a kernel addresses them, and the
// number of query rows that a warpgroup and a CTA take.
#pragma once

#include <cstdint>

namespace aapt {

// A device buffer: distances in bytes between tokens, heads and batch entries.
struct RowBuffer {
  void* data;
  uint64_t token_stride, head_stride, batch_stride;
  int tokens;
};

constexpr int kQueryBlock = 64;  // rows of one warpgroup
constexpr int kConsumers = 2;    // warpgroups that multiply
constexpr int kQueryTile = kConsumers * kQueryBlock;

}  // namespace aapt
