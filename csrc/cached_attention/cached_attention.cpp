// cached_attention on sm_90a: checks that keep the kernel inside its buffers, workspace, launch.
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "attention/host_rows.h"
#include "cached_attention/params.h"

namespace aapt {
namespace {

// Where the parts of query blocks are in a workspace, in 32-bit words. It does not depend on the
// number of new frames: a call finds the counters where the last one has left them, at zero.
struct Workspace {
  int64_t arrivals, outs, stats;  // words of each

  Workspace(const Tensor& k_cache, int64_t tokens_per_frame, int64_t ring_frames) {
    const int64_t ctas = multiprocessors(k_cache.get_device_index());
    const int head_dim = static_cast<int>(k_cache.size(3));
    const int64_t tile = query_tile(head_dim);
    const int64_t tiles = (ring_frames * tokens_per_frame + tile - 1) / tile;
    const int64_t blocks = k_cache.size(0) * k_cache.size(2) * tiles * query_consumers(head_dim);
    arrivals = (blocks + 31) / 32 * 32;  // the parts begin on a boundary of 128 bytes
    outs = ctas * partials_per_cta(head_dim) * kQueryBlock * head_dim;
    stats = ctas * partials_per_cta(head_dim) * 2 * kQueryBlock;
  }
  int64_t words() const { return arrivals + outs + stats; }
};

// Sets the keys and values of a cache of E4M3. TMA brings whole groups of keys, so memory must
// reach to the end of the last group of the last head.
void take_e4m3(const Tensor& k_cache, const Tensor& v_cache, const Tensor& q, int64_t capacity,
               CachedAttentionBuffers& buffers) {
  const Strides strides = check_rows("k_cache", k_cache, q, capacity, ScalarType::Float8_e4m3fn);
  STD_TORCH_CHECK(strides.token >= q.size(3), "k_cache: expected keys that do not overlap");
  const int64_t group = kKeyGroup * strides.token;
  const int64_t batches = q.size(0) - 1, heads = q.size(2) - 1;
  STD_TORCH_CHECK(
      (heads == 0 || strides.head % group == 0) && (batches == 0 || strides.batch % group == 0),
      "k_cache: expected heads that begin at multiples of ", kKeyGroup,
      " keys from each other; make the cache with KVCache");
  const int64_t head = strides.head / group * (heads > 0);
  const int64_t batch = strides.batch / group * (batches > 0);
  const int64_t groups = batches * batch + heads * head + (capacity + kKeyGroup - 1) / kKeyGroup;
  STD_TORCH_CHECK(groups <= std::numeric_limits<int32_t>::max(),
                  "k_cache: expected fewer than 2^31 groups of ", kKeyGroup, " keys");
  const int64_t bytes = groups * group - strides.token + q.size(3);
  int64_t storage = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(k_cache.get(), &storage));
  STD_TORCH_CHECK(k_cache.storage_offset() + bytes <= storage,
                  "k_cache: expected memory for a multiple of ", kKeyGroup,
                  " keys per head; make the cache with KVCache");
  buffers.k = {device_pointer(k_cache, bytes), static_cast<uint64_t>(strides.token),
               static_cast<uint64_t>(strides.head), static_cast<uint64_t>(strides.batch),
               static_cast<int>(capacity)};
  buffers.key_groups = {static_cast<int>(groups), static_cast<int>(head), static_cast<int>(batch)};
  buffers.v_column_stride = check_columns("v_cache", v_cache, q, capacity);
  buffers.v = {device_pointer(v_cache), 1, static_cast<uint64_t>(v_cache.stride(2)),
               static_cast<uint64_t>(v_cache.stride(0)), static_cast<int>(capacity)};
}

Tensor cached_attention_workspace(Tensor k_cache, int64_t tokens_per_frame, int64_t window_frames) {
  STD_TORCH_CHECK(k_cache.dim() == 4, "k_cache: expected (batch, capacity, heads, head_dim)");
  const DeviceScope scope(k_cache);
  const Workspace layout(k_cache, tokens_per_frame, window_frames + 1);
  return torch::stable::new_zeros(k_cache, {layout.words()}, ScalarType::Int);
}

std::tuple<Tensor, Tensor> cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor step,
                                            Tensor text_lens, std::optional<Tensor> q_sink,
                                            int64_t text_tokens, int64_t tokens_per_frame,
                                            int64_t window_frames, int64_t sink_frames,
                                            double scale, std::optional<Tensor> k_scale,
                                            std::optional<Tensor> v_scale,
                                            std::optional<Tensor> workspace) {
  STD_TORCH_CHECK(q.dim() == 4 && (q.size(3) == 64 || q.size(3) == 128),
                  "q: expected (batch, tokens, heads, 64 or 128) for the sm_90a kernel");
  STD_TORCH_CHECK(scale > 0 && std::isfinite(scale), "scale: expected a positive number, got ",
                  scale);
  STD_TORCH_CHECK(text_tokens >= 0 && sink_frames >= 0 && window_frames >= 0,
                  "cached_attention: expected text_tokens, sink_frames and window_frames >= 0");
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), head_dim = q.size(3);
  const bool is_e4m3 = k_cache.scalar_type() == ScalarType::Float8_e4m3fn;
  STD_TORCH_CHECK(k_scale.has_value() == is_e4m3 && v_scale.has_value() == is_e4m3,
                  "cached_attention: expected k_scale and v_scale with a cache of float8_e4m3fn, "
                  "and with no other");
  STD_TORCH_CHECK(!is_e4m3 || head_dim == 128,
                  "q: expected a head_dim of 128 with a cache of float8_e4m3fn, got ", head_dim);
  const int64_t ring_frames = window_frames + 1;
  const int64_t capacity = text_tokens + (sink_frames + ring_frames) * tokens_per_frame;
  check_frames(tokens, tokens_per_frame, ring_frames);
  const int64_t tile = query_tile(static_cast<int>(head_dim));
  const int64_t tiles = (tokens + tile - 1) / tile;
  // Work is counted in steps of one query tile and 64 keys or more, with 32 bits
  STD_TORCH_CHECK(batch * heads * tiles * (capacity / 64 + 3) < std::numeric_limits<int32_t>::max(),
                  "q, k_cache: expected less than 2^31 tiles of work");
  const DeviceScope scope(q);
  q = unexpanded(q);
  if (!is_e4m3) {
    k_cache = unexpanded(k_cache);
    v_cache = unexpanded(v_cache);
  }
  if (q_sink) q_sink = unexpanded(*q_sink);

  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {batch, heads, tokens}, ScalarType::Float);

  CachedAttentionBuffers buffers{};
  buffers.q = row_buffer("q", q, q, tokens);
  if (q_sink) buffers.q_sink = row_buffer("q_sink", *q_sink, q, tokens);
  if (is_e4m3) {
    take_e4m3(k_cache, v_cache, q, capacity, buffers);
  } else {
    buffers.k = row_buffer("k_cache", k_cache, q, capacity);
    buffers.v = row_buffer("v_cache", v_cache, q, capacity);
  }
  buffers.out = row_buffer("out", out, q, tokens);

  const int ctas = multiprocessors(q.get_device_index());
  const Workspace layout(k_cache, tokens_per_frame, ring_frames);
  if (!workspace) {
    workspace = torch::stable::new_zeros(q, {layout.words()}, ScalarType::Int);
  }
  auto* words =
      static_cast<uint32_t*>(check_dense("workspace", *workspace, q, ScalarType::Int,
                                         {workspace->dim() == 1 ? workspace->size(0) : 0}));
  STD_TORCH_CHECK(workspace->size(0) >= layout.words(), "workspace: expected at least ",
                  layout.words(), " words, got ", workspace->size(0),
                  "; make it with cached_attention_workspace");

  CachedAttentionParams params{};
  params.batch = batch;
  params.heads = heads;
  params.tokens = tokens;
  params.head_dim = head_dim;
  params.query_tiles = tiles;
  params.text_tokens = text_tokens;
  params.tokens_per_frame = tokens_per_frame;
  params.sink_frames = sink_frames;
  params.ring_frames = ring_frames;
  params.frames = tokens / tokens_per_frame;
  params.pinned_rotation = q_sink.has_value();
  params.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  if (is_e4m3) {
    params.k_scale = check_scale("k_scale", *k_scale, q);
    params.v_scale = check_scale("v_scale", *v_scale, q);
  }
  params.step = static_cast<const int64_t*>(check_dense("step", step, q, ScalarType::Long, {}));
  params.text_lens = static_cast<const int64_t*>(
      check_dense("text_lens", text_lens, q, ScalarType::Long, {batch}));
  params.lse = static_cast<float*>(device_pointer(lse));
  params.arrivals = words;
  params.partial_out = reinterpret_cast<float*>(words + layout.arrivals);
  params.partial_stats = params.partial_out + layout.outs;

  if (q.numel() > 0) {
    const auto launch = is_e4m3 ? launch_cached_attention_e4m3_sm90 : launch_cached_attention_sm90;
    const char* error = launch(params, buffers, ctas, current_stream(q.get_device_index()));
    STD_TORCH_CHECK(error == nullptr, "cached_attention: ", error);
  }
  return {out, lse};
}

}  // namespace
}  // namespace aapt

AAPT_KERNELS(m) {
  m.impl("cached_attention", TORCH_BOX(&aapt::cached_attention));
  m.impl("cached_attention_workspace", TORCH_BOX(&aapt::cached_attention_workspace));
}
