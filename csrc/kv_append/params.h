// What the host side of kv_append hands to its kernel.
#pragma once

#include <cstdint>

namespace aapt {

// Distances in elements between neighbours of one tensor; its head_dim is contiguous.
struct Strides {
  int64_t batch, token, head;
};

struct KvAppendParams {
  // BF16, (batch, tokens, heads, head_dim); every row starts on a 16-byte boundary.
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides;
  // (head_dim,), BF16 or float32; null: no norm.
  const void *q_weight, *k_weight;
  bool float_weights;
  float eps;
  // float32, (tokens, head_dim / 2), contiguous; null: no rotation.
  const float *cos, *sin;
  const float *cos_sink, *sin_sink;
  // One layer of the cache: BF16, (batch, capacity, heads, head_dim).
  void *k_cache, *v_cache;
  Strides k_cache_strides, v_cache_strides;
  // Frames in the cache so far; on the device, so that a captured step can be replayed.
  const int64_t* step;
  int64_t text_tokens, sink_frames, ring_frames;
  // BF16, (batch, tokens, heads, head_dim), contiguous; q_sink_out null: not asked for.
  void *q_out, *q_sink_out;
  int64_t batch, tokens, heads, head_dim;
};

// Enqueues the kernel. Returns null, or CUDA's words for why it did not start.
const char* launch_kv_append_sm90(const KvAppendParams& params, void* stream);

}  // namespace aapt
