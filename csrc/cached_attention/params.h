// Arguments of the kernel of cached_attention.
#pragma once

#include <cstdint>

#include "attention/rows.h"

namespace aapt {

struct CachedAttentionParams {
  int batch, heads, tokens, head_dim;  // of the query: (batch, tokens, heads, head_dim)
  int query_tiles;                     // of query_tile(head_dim) rows, per head
  int text_tokens, tokens_per_frame, sink_frames, ring_frames;
  int frames;            // of the query, at most ring_frames
  bool pinned_rotation;  // the sink frames have a query of their own, q_sink
  float scale_log2;      // softmax scale times log2(e)
  // float32, (heads,): the cache is E4M3 and has k / k_scale and v / v_scale; null: it is BF16.
  const float *k_scale, *v_scale;

  // On the device, so that a captured step can be replayed.
  const int64_t* step;       // index of the first new frame
  const int64_t* text_lens;  // (batch,)

  float* lse;  // (batch, heads, tokens), natural logarithm

  // Parts of query blocks that several CTAs share (schedule.h): one per CTA, end of its share
  // (first or last piece) and warpgroup. A part is 64 x head_dim sums, and per row the maximum and
  // the sum of the softmax.
  float* partial_out;
  float* partial_stats;
  uint32_t* arrivals;  // parts written, per query block of 64 rows; zero at first and at last
};

// Keys of an E4M3 cache: groups of kKeyGroup rows, of which all heads and batch entries are one
// run. `groups`: of the run; the others are distances, in groups.
struct KeyGroups {
  int groups, head, batch;
};

struct CachedAttentionBuffers {
  RowBuffer q, q_sink, k, v, out;  // q_sink.data is null without one
  KeyGroups key_groups;            // E4M3 only
  uint64_t v_column_stride;        // E4M3 only: bytes; the tokens of a column are side by side
};

constexpr int kKeyGroup = 16;

constexpr int partials_per_cta(int head_dim) { return 2 * query_consumers(head_dim); }

// Enqueues the kernel on `ctas` CTAs. Returns null or an error message.
const char* launch_cached_attention_sm90(const CachedAttentionParams& params,
                                         const CachedAttentionBuffers& buffers, int ctas,
                                         void* stream);
// As above, for a cache of E4M3 with head_dim 128.
const char* launch_cached_attention_e4m3_sm90(const CachedAttentionParams& params,
                                              const CachedAttentionBuffers& buffers, int ctas,
                                              void* stream);

}  // namespace aapt
