// The backward of block_causal_attention with head_dim 64 and one batch entry, for ctypes. The
// caller sets the sums of dq to zero.
#include "block_causal_attention/params.h"

using namespace aapt;
using namespace aapt::block_causal;

extern "C" __attribute__((visibility("default"))) const char* run_backward(
    uint16_t* q, uint16_t* k, uint16_t* v, uint16_t* out, uint16_t* dout, float* lse, float* stats,
    float* sums, uint16_t* dq, uint16_t* dk, uint16_t* dv, int text_tokens, int tokens_per_frame,
    int frames, int window_frames, int heads, int ctas, void* stream) {
  constexpr int kHeadDim = 64;
  Params params{};
  params.batch = 1;
  params.heads = heads;
  params.head_dim = kHeadDim;
  FrameMask& mask = params.mask;
  mask.text_tokens = text_tokens;
  mask.tokens_per_frame = tokens_per_frame;
  mask.frames = frames;
  mask.window_frames = window_frames;
  mask.sink_frames = 1;
  mask.query_rows = mask.key_rows = text_tokens + frames * tokens_per_frame;
  params.regions = key_regions(mask, false);
  params.scale = 0.125f;
  params.scale_log2 = params.scale * 1.4426950408889634f;
  params.lse = lse;

  const auto rows = [&](uint16_t* data) {
    const uint64_t head = 2 * kHeadDim, token = head * heads;
    return RowBuffer{data, token, head, token * mask.query_rows, mask.query_rows};
  };
  BackwardBuffers buffers{};
  buffers.forward = {rows(q), {}, rows(k), rows(v), rows(out)};
  buffers.dout = rows(dout);
  Backward backward{};
  backward.padded_rows = (mask.query_rows + kDqTile - 1) / kDqTile * kDqTile;
  backward.row_lse = stats;
  backward.row_delta = stats + heads * backward.padded_rows;
  backward.dq_sums = sums;
  backward.dq = dq;
  backward.dk = dk;
  backward.dv = dv;
  backward.prefix_grad = true;
  return launch_backward_sm90(params, backward, buffers, ctas, stream);
}
