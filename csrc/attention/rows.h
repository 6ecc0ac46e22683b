// The rows of a BF16 (batch, tokens, heads, head_dim) tensor as a kernel addresses them, and the
// number of query rows that a warpgroup and a CTA of a forward kernel take.
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

// Warpgroups that multiply in a forward kernel. At head_dim 64 the softmax of a key tile takes
// longer than its products: two warpgroups would leave the tensor cores idle, and the registers
// suffice for three. At head_dim 128 they suffice for two.
constexpr int query_consumers(int head_dim) { return head_dim == 64 ? 3 : 2; }

constexpr int query_tile(int head_dim) { return query_consumers(head_dim) * kQueryBlock; }

}  // namespace aapt
