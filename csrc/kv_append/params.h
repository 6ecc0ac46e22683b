// Arguments of the kernel of kv_append.
#pragma once

#include <cstdint>

#include "strides.h"

namespace aapt {

struct KvAppendParams {
  // BF16, (batch, tokens, heads, head_dim); every row starts on a 16-byte boundary.
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides;
  // BF16 or float32; (head_dim,): a norm per head, (heads, head_dim): one across the heads of a
  // token; null: no norm.
  const void *q_weight, *k_weight;
  bool float_weights, across_heads;
  float eps;
  // float32, (tokens, head_dim / 2), contiguous; null: no rotation.
  const float *cos, *sin;
  const float *cos_sink, *sin_sink;
  // One layer of the cache, (batch, capacity, heads, head_dim): BF16, or E4M3 if it has scales.
  void *k_cache, *v_cache;
  Strides k_cache_strides, v_cache_strides;
  // E4M3 only: v is stored with stride 1 between tokens and this one, a multiple of 16, between
  // columns.
  int64_t v_cache_column_stride;
  // float32, (heads,): the cache stores k / k_scale and v / v_scale; null: as they are.
  const float *k_scale, *v_scale;
  bool use_hadamard;
  // Index of the first new frame; on the device, so that a captured step can be replayed.
  const int64_t* step;
  int text_tokens, tokens_per_frame, sink_frames, ring_frames;  // of fewer than 2^31 tokens
  // BF16, (batch, tokens, heads, head_dim), contiguous; q_sink_out is null if not wanted.
  void *q_out, *q_sink_out;
  // tokens: of all new frames, which are at most ring_frames; fewer than 2^30 rows
  int batch, tokens, heads, head_dim;
};

// Enqueues the kernel. Returns null or an error message.
const char* launch_kv_append_sm90(const KvAppendParams& params, int multiprocessors, void* stream);

}  // namespace aapt
