// kv_append to a cache of E4M3 with head_dim 64, one batch entry and no norm, for ctypes.
#include "kv_append/params.h"

using namespace aapt;

extern "C" __attribute__((visibility("default"))) const char* run_append(
    uint16_t* q, uint16_t* k, uint16_t* v, uint8_t* k_cache, uint8_t* v_cache, int64_t* step,
    float* k_scale, float* v_scale, uint16_t* q_out, int text_tokens, int tokens_per_frame,
    int ring_frames, int frames, int heads, int multiprocessors, void* stream) {
  constexpr int kHeadDim = 64;
  KvAppendParams params{};
  params.q = q;
  params.k = k;
  params.v = v;
  params.batch = 1;
  params.tokens = frames * tokens_per_frame;
  params.heads = heads;
  params.head_dim = kHeadDim;
  params.q_strides = params.k_strides = params.v_strides = {0, heads * kHeadDim, kHeadDim};
  const int64_t keys = (text_tokens + (1 + ring_frames) * tokens_per_frame + 15) / 16 * 16;
  params.k_cache = k_cache;
  params.k_cache_strides = {0, kHeadDim, keys * kHeadDim};
  params.v_cache = v_cache;
  params.v_cache_strides = {0, 1, keys * kHeadDim};
  params.v_cache_column_stride = keys;
  params.k_scale = k_scale;
  params.v_scale = v_scale;
  params.use_hadamard = true;
  params.step = step;
  params.text_tokens = text_tokens;
  params.tokens_per_frame = tokens_per_frame;
  params.sink_frames = 1;
  params.ring_frames = ring_frames;
  params.q_out = q_out;
  return launch_kv_append_sm90(params, multiprocessors, stream);
}
