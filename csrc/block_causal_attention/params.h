// Arguments of the kernels of block_causal_attention.
#pragma once

#include <cstdint>

#include "attention/rows.h"

namespace aapt::block_causal {

constexpr int kKeyTile = 128;

// FrameLayout (docs/method.md#3) as integers.
struct FrameMask {
  int text_tokens, tokens_per_frame;
  int frames;         // of the query
  int frames_before;  // of the key, before the query's
  int window_frames;  // at most the frames of the key
  int sink_frames;
  int query_rows, key_rows;  // text included
  const int64_t* text_lens;  // (batch,) on the device, or null if every text is full
};

// The key rows of the backward, in tiles. No tile crosses the end of the sink, because many more
// query rows see the sink than the frames after it. If the sink has a query of its own, no tile
// crosses the end of the text either: the head is then the text alone, else text and sink, and the
// region of the sink is empty.
struct KeyRegions {
  int head_end, sink_end;      // the rest ends with the keys
  int head_tiles, sink_tiles;  // of the first two regions
  int tiles;                   // of all three
};

inline KeyRegions key_regions(const FrameMask& mask, bool pinned_rotation) {
  const auto tiles = [](int begin, int end) { return (end - begin + kKeyTile - 1) / kKeyTile; };
  KeyRegions regions{};
  regions.sink_end = mask.text_tokens + mask.sink_frames * mask.tokens_per_frame;
  regions.head_end = pinned_rotation ? mask.text_tokens : regions.sink_end;
  regions.head_tiles = tiles(0, regions.head_end);
  regions.sink_tiles = tiles(regions.head_end, regions.sink_end);
  regions.tiles = regions.head_tiles + regions.sink_tiles + tiles(regions.sink_end, mask.key_rows);
  return regions;
}

struct Params {
  int batch, heads, head_dim;
  FrameMask mask;
  KeyRegions regions;
  bool pinned_rotation;  // the sink frames have a query of their own, q_sink
  float scale;           // of the softmax
  float scale_log2;      // times log2(e)
  float* lse;  // (batch, heads, query_rows), natural logarithm; -inf if a row sees nothing
};

struct Buffers {
  RowBuffer q, q_sink, k, v, out;  // q_sink.data is null without one
};

// Enqueues the forward kernel on `ctas` CTAs. Returns null or an error message.
const char* launch_sm90(const Params& params, const Buffers& buffers, int ctas, void* stream);

// The backward. Sums and outputs are dense; rows of `row_lse` and `row_delta` are padded to whole
// query tiles, `padded_rows` in each of batch x heads.
struct Backward {
  const float* dlse;  // (batch, heads, query_rows), or null
  int padded_rows;
  float* row_lse;    // log-sum-exp in units of log2; +inf where a row sees nothing
  float* row_delta;  // rowsum(dout out) - dlse
  // Sums of dq, then of dq_sink, stored as `QuerySums` says; zero at first. Null if the kernel for
  // dq computes dq.
  float* dq_sums;
  uint16_t *dq, *dq_sink;  // (batch, query_rows, heads, head_dim), (batch, frame rows, ...)
  uint16_t *dk, *dv;       // (batch, key_rows, heads, head_dim)
  bool prefix_grad;        // frames before the query's take a gradient
};

struct BackwardBuffers {
  Buffers forward;
  RowBuffer dout;
};

// Warpgroups that multiply in the backward: its fragments leave no registers for a third.
constexpr int kBackwardConsumers = 2;
constexpr int kDqTile = kBackwardConsumers * kQueryBlock;  // rows of the kernel for dq alone

// Rows of a query tile of the backward: its scores and head_dim share the registers. Shared memory
// bounds the rate: the more rows, the fewer bytes per row.
constexpr int backward_query_tile(int head_dim) { return head_dim == 64 ? 128 : 80; }

const char* launch_backward_sm90(const Params& params, const Backward& backward,
                                 const BackwardBuffers& buffers, int ctas, void* stream);

}  // namespace aapt::block_causal
