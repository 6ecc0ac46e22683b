// cached_attention on a cache of E4M3 with head_dim 128, one batch entry, one sink frame that has a
// query of its own, for ctypes.
#include "cached_attention/params.h"

using namespace aapt;

extern "C" __attribute__((visibility("default"))) const char* run_cached(
    uint16_t* q, uint16_t* q_sink, uint8_t* k_cache, uint8_t* v_cache, int64_t* step,
    int64_t* text_lens, float* k_scale, float* v_scale, uint16_t* out, float* lse,
    uint32_t* arrivals, float* partial_out, float* partial_stats, int text_tokens,
    int tokens_per_frame, int ring_frames, int heads, int multiprocessors, void* stream) {
  constexpr int kHeadDim = 128;
  const int tokens = tokens_per_frame;
  const int capacity = text_tokens + (1 + ring_frames) * tokens;
  const int groups = (capacity + kKeyGroup - 1) / kKeyGroup;
  const uint64_t row = kHeadDim, head = static_cast<uint64_t>(groups) * kKeyGroup * row;

  CachedAttentionParams params{};
  params.batch = 1;
  params.heads = heads;
  params.tokens = tokens;
  params.head_dim = kHeadDim;
  params.query_tiles = (tokens + query_tile(kHeadDim) - 1) / query_tile(kHeadDim);
  params.text_tokens = text_tokens;
  params.tokens_per_frame = tokens;
  params.sink_frames = 1;
  params.ring_frames = ring_frames;
  params.frames = 1;
  params.pinned_rotation = true;
  params.scale_log2 = 0.08838834764831845f * 1.4426950408889634f;
  params.k_scale = k_scale;
  params.v_scale = v_scale;
  params.step = step;
  params.text_lens = text_lens;
  params.lse = lse;
  params.arrivals = arrivals;
  params.partial_out = partial_out;
  params.partial_stats = partial_stats;

  CachedAttentionBuffers buffers{};
  const auto rows = [&](uint16_t* data) {
    return RowBuffer{data, 2 * heads * row, 2 * row, 2 * heads * row * tokens, tokens};
  };
  buffers.q = rows(q);
  buffers.q_sink = rows(q_sink);
  buffers.out = rows(out);
  buffers.k = {k_cache, row, head, heads * head, capacity};
  buffers.key_groups = {heads * groups, groups, heads * groups};
  buffers.v = {v_cache, 1, head, heads * head, capacity};
  buffers.v_column_stride = static_cast<uint64_t>(groups) * kKeyGroup;
  return launch_cached_attention_e4m3_sm90(params, buffers, multiprocessors, stream);
}
