// block_causal_attention on sm_90a: checks that keep the kernels inside their buffers, workspace,
// launches.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "attention/host_rows.h"
#include "block_causal_attention/params.h"
#include "host.h"

namespace aapt::block_causal {
namespace {

// FrameLayout's integers as the schema has them.
struct Layout {
  int64_t text_tokens, tokens_per_frame, frames;
  std::optional<int64_t> window_frames;
  int64_t sink_frames;
  std::optional<int64_t> past_frames;
};

FrameMask frame_mask(const Layout& layout) {
  const int64_t window = layout.window_frames.value_or(0), past = layout.past_frames.value_or(0);
  STD_TORCH_CHECK(layout.text_tokens >= 0 && layout.tokens_per_frame >= 1 && layout.frames >= 0 &&
                      window >= 0 && layout.sink_frames >= 0 && past >= 0,
                  "layout: expected the integers of a FrameLayout");
  const int64_t before = layout.past_frames ? layout.sink_frames + past : 0;
  // Rows and tiles are counted with 32 bits; 2^30 leaves room for a tile beyond the end
  constexpr int64_t kMost = 1 << 30;
  STD_TORCH_CHECK(
      layout.text_tokens < kMost && before < kMost && layout.frames < kMost &&
          layout.tokens_per_frame < kMost &&
          layout.tokens_per_frame * (before + layout.frames) + layout.text_tokens < kMost,
      "k: expected less than 2^30 tokens");
  const int64_t frames = before + layout.frames;
  FrameMask mask{};
  mask.text_tokens = static_cast<int>(layout.text_tokens);
  mask.tokens_per_frame = static_cast<int>(layout.tokens_per_frame);
  mask.frames = static_cast<int>(layout.frames);
  mask.frames_before = static_cast<int>(before);
  mask.window_frames = static_cast<int>(std::min(layout.window_frames.value_or(frames), frames));
  mask.sink_frames = static_cast<int>(std::min(layout.sink_frames, frames));
  mask.query_rows = mask.text_tokens + mask.frames * mask.tokens_per_frame;
  mask.key_rows = mask.query_rows + mask.frames_before * mask.tokens_per_frame;
  return mask;
}

// The inputs of both directions, checked.
struct Problem {
  Params params{};
  Buffers buffers{};
  Tensor text_lens;  // kept alive

  Problem(const Tensor& q, const Tensor& k, const Tensor& v,
          const std::optional<Tensor>& given_text_lens, const std::optional<Tensor>& q_sink,
          const Layout& layout, double scale) {
    STD_TORCH_CHECK(q.dim() == 4 && (q.size(3) == 64 || q.size(3) == 128),
                    "q: expected (batch, tokens, heads, 64 or 128) for the sm_90a kernel");
    STD_TORCH_CHECK(scale > 0 && std::isfinite(scale), "scale: expected a positive number, got ",
                    scale);
    params.mask = frame_mask(layout);
    const int64_t batch = q.size(0), heads = q.size(2), rows = params.mask.query_rows;
    STD_TORCH_CHECK(batch * heads * (std::max(rows, int64_t{params.mask.key_rows}) / 64 + 4) <
                        std::numeric_limits<int32_t>::max() / 2,
                    "q: expected less than 2^30 tiles of work");
    params.batch = static_cast<int>(batch);
    params.heads = static_cast<int>(heads);
    params.head_dim = static_cast<int>(q.size(3));
    params.pinned_rotation = q_sink.has_value() && rows > params.mask.text_tokens;
    params.regions = key_regions(params.mask, params.pinned_rotation);
    params.scale = static_cast<float>(scale);
    params.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
    buffers.q = row_buffer("q", q, q, rows);
    buffers.k = row_buffer("k", k, q, params.mask.key_rows);
    buffers.v = row_buffer("v", v, q, params.mask.key_rows);
    if (params.pinned_rotation) {
      buffers.q_sink = row_buffer("q_sink", *q_sink, q, rows - params.mask.text_tokens);
    }
    if (given_text_lens) {
      text_lens = torch::stable::to(*given_text_lens, ScalarType::Long);
      params.mask.text_lens = static_cast<const int64_t*>(
          check_dense("text_lens", text_lens, q, ScalarType::Long, {batch}));
    }
  }
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> text_lens,
                                   std::optional<Tensor> q_sink, int64_t text_tokens,
                                   int64_t tokens_per_frame, int64_t frames,
                                   std::optional<int64_t> window_frames, int64_t sink_frames,
                                   std::optional<int64_t> past_frames, double scale,
                                   bool /*prefix_grad*/) {
  const DeviceScope scope(q);
  q = unexpanded(q);
  k = unexpanded(k);
  v = unexpanded(v);
  if (q_sink) q_sink = unexpanded(*q_sink);
  const Layout layout{text_tokens,   tokens_per_frame, frames,
                      window_frames, sink_frames,      past_frames};
  Problem problem(q, k, v, text_lens, q_sink, layout, scale);
  const int64_t rows = problem.params.mask.query_rows;
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(2), rows}, ScalarType::Float);
  if (q.numel() == 0) return {out, lse};
  problem.buffers.out = row_buffer("out", out, q, rows);
  problem.params.lse = static_cast<float*>(device_pointer(lse));
  const int32_t device = q.get_device_index();
  const char* error =
      launch_sm90(problem.params, problem.buffers, multiprocessors(device), current_stream(device));
  STD_TORCH_CHECK(error == nullptr, "block_causal_attention: ", error);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    std::optional<Tensor> text_lens, std::optional<Tensor> q_sink, int64_t text_tokens,
    int64_t tokens_per_frame, int64_t frames, std::optional<int64_t> window_frames,
    int64_t sink_frames, std::optional<int64_t> past_frames, double scale, bool prefix_grad,
    bool deterministic) {
  const DeviceScope scope(q);
  q = unexpanded(q);
  k = unexpanded(k);
  v = unexpanded(v);
  if (q_sink) q_sink = unexpanded(*q_sink);
  const Layout layout{text_tokens,   tokens_per_frame, frames,
                      window_frames, sink_frames,      past_frames};
  Problem problem(q, k, v, text_lens, q_sink, layout, scale);
  Params& params = problem.params;
  const int64_t batch = q.size(0), heads = q.size(2), head_dim = q.size(3);
  const int64_t rows = params.mask.query_rows, pairs = batch * heads;

  Tensor dq = torch::stable::new_empty(q, q.sizes());
  Tensor dk = torch::stable::new_empty(k, k.sizes());
  Tensor dv = torch::stable::new_empty(v, v.sizes());
  Tensor dq_sink = q_sink ? torch::stable::new_empty(*q_sink, q_sink->sizes())
                          : torch::stable::new_empty(q, {0});
  if (q.numel() == 0) {
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
    return {dq, dk, dv, dq_sink};
  }
  dout = torch::stable::contiguous(dout);
  if (dlse) dlse = torch::stable::contiguous(*dlse);
  BackwardBuffers buffers{problem.buffers, row_buffer("dout", dout, q, rows)};
  buffers.forward.out = row_buffer("out", out, q, rows);
  const auto statistic = [&](const char* name, const Tensor& tensor) {
    return static_cast<float*>(
        check_dense(name, tensor, q, ScalarType::Float, {batch, heads, rows}));
  };
  params.lse = statistic("lse", lse);

  const auto round_up = [](int64_t count, int64_t tile) {
    return (count + tile - 1) / tile * tile;
  };
  const int64_t tile_rows = backward_query_tile(static_cast<int>(head_dim));
  const int64_t padded_rows = round_up(round_up(rows, tile_rows), kDqTile);
  Tensor stats = torch::stable::new_empty(q, {2, pairs, padded_rows}, ScalarType::Float);
  Backward backward{};
  backward.dlse = dlse ? statistic("dlse", *dlse) : nullptr;
  backward.padded_rows = static_cast<int>(padded_rows);
  backward.row_lse = static_cast<float*>(device_pointer(stats));
  backward.row_delta = backward.row_lse + pairs * padded_rows;
  const auto output = [](const Tensor& tensor) {
    return static_cast<uint16_t*>(device_pointer(tensor));
  };
  backward.dq = output(dq);
  backward.dk = output(dk);
  backward.dv = output(dv);
  backward.dq_sink = output(dq_sink);
  backward.prefix_grad = prefix_grad;
  std::optional<Tensor> sums;
  if (!deterministic) {
    const int64_t queries = params.pinned_rotation ? 2 : 1;
    sums = torch::stable::new_zeros(q, {queries, pairs, round_up(rows, tile_rows), head_dim},
                                    ScalarType::Float);
    backward.dq_sums = static_cast<float*>(device_pointer(*sums));
  }
  const int32_t device = q.get_device_index();
  const char* error = launch_backward_sm90(params, backward, buffers, multiprocessors(device),
                                           current_stream(device));
  STD_TORCH_CHECK(error == nullptr, "block_causal_attention_backward: ", error);
  return {dq, dk, dv, dq_sink};
}

}  // namespace
}  // namespace aapt::block_causal

AAPT_KERNELS(m) {
  m.impl("block_causal_attention_backward", TORCH_BOX(&aapt::block_causal::backward));
  m.impl("block_causal_attention", TORCH_BOX(&aapt::block_causal::forward));
}
