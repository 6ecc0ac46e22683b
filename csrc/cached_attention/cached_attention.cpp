// cached_attention on sm_90a: checks that keep the kernel inside its buffers, workspace, launch.
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "attention/host_rows.h"
#include "cached_attention/params.h"

namespace aapt {
namespace {

std::tuple<Tensor, Tensor> cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor step,
                                            Tensor text_lens, std::optional<Tensor> q_sink,
                                            int64_t text_tokens, int64_t tokens_per_frame,
                                            int64_t window_frames, int64_t sink_frames,
                                            double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && (q.size(3) == 64 || q.size(3) == 128),
                  "q: expected (batch, tokens, heads, 64 or 128) for the sm_90a kernel");
  STD_TORCH_CHECK(scale > 0 && std::isfinite(scale), "scale: expected a positive number, got ",
                  scale);
  STD_TORCH_CHECK(text_tokens >= 0 && sink_frames >= 0 && window_frames >= 0,
                  "cached_attention: expected text_tokens, sink_frames and window_frames >= 0");
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const int64_t capacity = text_tokens + (sink_frames + window_frames + 1) * tokens_per_frame;
  const int64_t tiles = (tokens + kQueryTile - 1) / kQueryTile;
  // Work is counted in steps of one query tile and 64 keys or more, with 32 bits
  STD_TORCH_CHECK(batch * heads * tiles * (capacity / 64 + 3) < std::numeric_limits<int32_t>::max(),
                  "q, k_cache: expected less than 2^31 tiles of work");
  const DeviceScope scope(q);
  q = unexpanded(q);
  k_cache = unexpanded(k_cache);
  v_cache = unexpanded(v_cache);
  if (q_sink) q_sink = unexpanded(*q_sink);

  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {batch, heads, tokens}, ScalarType::Float);

  CachedAttentionBuffers buffers{};
  buffers.q = row_buffer("q", q, q, tokens_per_frame);
  if (q_sink) buffers.q_sink = row_buffer("q_sink", *q_sink, q, tokens_per_frame);
  buffers.k = row_buffer("k_cache", k_cache, q, capacity);
  buffers.v = row_buffer("v_cache", v_cache, q, capacity);
  buffers.out = row_buffer("out", out, q, tokens_per_frame);

  const int ctas = multiprocessors(q.get_device_index());
  const auto workspace = [&](int64_t floats) {
    return torch::stable::new_empty(q, {ctas * kPartialsPerCta * floats}, ScalarType::Float);
  };
  Tensor partial_out = workspace(kQueryBlock * head_dim);
  Tensor partial_stats = workspace(2 * kQueryBlock);
  Tensor arrivals =
      torch::stable::new_zeros(q, {batch * heads * tiles * kConsumers}, ScalarType::Int);

  CachedAttentionParams params{};
  params.batch = batch;
  params.heads = heads;
  params.tokens = tokens;
  params.head_dim = head_dim;
  params.query_tiles = tiles;
  params.text_tokens = text_tokens;
  params.sink_frames = sink_frames;
  params.ring_frames = window_frames + 1;
  params.pinned_rotation = q_sink.has_value();
  params.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  params.step = static_cast<const int64_t*>(check_dense("step", step, q, ScalarType::Long, {}));
  params.text_lens = static_cast<const int64_t*>(
      check_dense("text_lens", text_lens, q, ScalarType::Long, {batch}));
  params.lse = static_cast<float*>(device_pointer(lse));
  params.partial_out = static_cast<float*>(device_pointer(partial_out));
  params.partial_stats = static_cast<float*>(device_pointer(partial_stats));
  params.arrivals = static_cast<uint32_t*>(device_pointer(arrivals));

  if (q.numel() > 0) {
    const char* error =
        launch_cached_attention_sm90(params, buffers, ctas, current_stream(q.get_device_index()));
    STD_TORCH_CHECK(error == nullptr, "cached_attention: ", error);
  }
  return {out, lse};
}

}  // namespace
}  // namespace aapt

AAPT_KERNELS(m) { m.impl("cached_attention", TORCH_BOX(&aapt::cached_attention)); }
