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
  // One layer of the cache: BF16, (batch, capacity, heads, head_dim).
  void *k_cache, *v_cache;
  Strides k_cache_strides, v_cache_strides;
  // Index of the new frame; on the device, so that a captured step can be replayed.
  const int64_t* step;
  int64_t text_tokens, sink_frames, ring_frames;
  // BF16, (batch, tokens, heads, head_dim), contiguous; q_sink_out is null if not wanted.
  void *q_out, *q_sink_out;
  int batch, tokens, heads, head_dim;  // fewer than 2^30 rows
};

// Enqueues the kernel. Returns null or an error message.
const char* launch_kv_append_sm90(const KvAppendParams& params, int multiprocessors, void* stream);

}  // namespace aapt
