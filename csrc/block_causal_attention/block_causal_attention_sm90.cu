// Block-causal attention forward on sm_90a, for training (docs/method.md#3).
//
// As in cached_attention, one warpgroup fetches (TMA) and two multiply (wgmma), three at head_dim
// 64, 64 query rows each. They alternate: the softmax of one runs during the products of the
// others. Text and frames are rows of one sequence, cut into tiles of 128 or 192; `mask.h` says
// which keys each tile sees.

#include "attention/consumer.cuh"
#include "attention/maps.cuh"
#include "attention/products.cuh"
#include "attention/softmax.cuh"
#include "block_causal_attention/hide.cuh"
#include "block_causal_attention/mask.h"
#include "block_causal_attention/params.h"
#include "block_causal_attention/schedule.h"
#include "hopper/hopper.cuh"

namespace aapt::block_causal {
namespace {

using namespace hopper;

template <int kHeadDim_, int kStages_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_, kStages = kStages_, kKeyTile = block_causal::kKeyTile;
  static constexpr Repair kRepair = Repair::VALUES;
  static constexpr int kConsumers = query_consumers(kHeadDim);
  static constexpr int kQueryTile = query_tile(kHeadDim);
  static constexpr int kPanels = kHeadDim / kPanel;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // Within 65536: 128 x (40 + 2 x 232) or 128 x (32 + 3 x 160)
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;

  using QueryBlock = uint16_t[kPanels][kQueryBlock * kPanel];
  using KeyBlock = uint16_t[kPanels][kKeyTile * kPanel];

  struct Shared {
    alignas(1024) QueryBlock q[2 * kConsumers];  // q, then q_sink
    alignas(1024) QueryBlock out[kConsumers];
    alignas(1024) KeyBlock k[kStages];
    alignas(1024) KeyBlock v[kStages];
    uint64_t q_full, q_empty;
    uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    uint64_t raw[kStages];
    alignas(16) uint32_t broken[kStages][kKeyTile / 32];
  };
};

struct TensorMaps {
  TensorMap q, q_sink, k, v, out;
};

template <class C>
HOPPER_DEVICE int query_tiles(const Params& params) {
  return (params.mask.query_rows + C::kQueryTile - 1) / C::kQueryTile;
}

// Later rows see more: the last tile is the longest.
template <class C>
HOPPER_DEVICE int first_row(const Params& params, const Item& item) {
  return (query_tiles<C>(params) - 1 - item.rank) * C::kQueryTile;
}

template <class C>
HOPPER_DEVICE Schedule schedule_of(const Params& params) {
  return Schedule(query_tiles<C>(params), params.batch, params.heads, blockIdx.x, gridDim.x);
}

template <class C>
HOPPER_DEVICE VisibleKeys visible_keys(const Params& params, const Item& item) {
  const int first = first_row<C>(params, item);
  const int last = smaller(first + C::kQueryTile, params.mask.query_rows) - 1;
  return VisibleKeys(params.mask, params.pinned_rotation, item.batch, first, last);
}

template <class C>
HOPPER_DEVICE void fetch_queries(typename C::Shared& shared, const TensorMaps& maps,
                                 const Params& params) {
  Schedule schedule = schedule_of<C>(params);
  Item item;
  for (uint32_t n = 0; schedule.next(item); ++n) {
    const bool sink = params.pinned_rotation && visible_keys<C>(params, item).sink_tiles() > 0;
    const uint32_t bytes = C::kConsumers * sizeof(typename C::QueryBlock);
    mbar_wait(&shared.q_empty, n % 2 ^ 1);
    mbar_arrive_expect_tx(&shared.q_full, sink ? 2 * bytes : bytes);
    for (int block = 0; block < C::kConsumers; ++block) {
      const int row = first_row<C>(params, item) + block * kQueryBlock;
      for (int panel = 0; panel < C::kPanels; ++panel) {
        tma_load_4d(shared.q[block][panel], &maps.q, &shared.q_full, panel * kPanel, row, item.head,
                    item.batch, CacheHint::EVICT_FIRST);
        if (!sink) continue;
        // q_sink has no text: rows before it, which see no sink, give zeros
        tma_load_4d(shared.q[C::kConsumers + block][panel], &maps.q_sink, &shared.q_full,
                    panel * kPanel, row - params.mask.text_tokens, item.head, item.batch,
                    CacheHint::EVICT_FIRST);
      }
    }
  }
}

// Calls visit(tile, head, batch, is_raw) for every key tile of this CTA, in order.
template <class C, class Visit>
HOPPER_DEVICE void visit_keys(const Params& params, const Visit& visit) {
  Schedule schedule = schedule_of<C>(params);
  Item item;
  while (schedule.next(item)) {
    const VisibleKeys keys = visible_keys<C>(params, item);
    const int count = keys.tiles();
    for (int i = 0; i < count; ++i) {
      const KeyTile tile = keys.tile(i);
      visit(tile, item.head, item.batch, !tile.clean);
    }
  }
}

// One of the warpgroups that multiply.
template <class C>
class Consumer {
 public:
  HOPPER_DEVICE Consumer(typename C::Shared& shared, const TensorMaps& maps, const Params& params,
                         int group)
      : shared_(shared), maps_(maps), params_(params), group_(group), ring_(shared) {}

  HOPPER_DEVICE void run() {
    Schedule schedule = schedule_of<C>(params_);
    Item item;
    if (group_ == C::kConsumers - 1) pass_turn<C>(group_);  // the first consumer begins
    for (uint32_t n = 0; schedule.next(item); ++n) {
      mbar_wait(&shared_.q_full, n % 2);
      const VisibleKeys keys = visible_keys<C>(params_, item);
      const int row = first_row<C>(params_, item) + group_ * kQueryBlock;
      const int count = keys.tiles();
      attend(keys, count, row);
      ring_.finish_item(count);
      store(item, row);
    }
    if (group_ == 0) take_turn(group_);  // leaves no barrier half full
    finish_stores();
  }

 private:
  HOPPER_DEVICE void attend(const VisibleKeys& keys, int count, int row) {
    const int last_row = params_.mask.query_rows - 1, own_row = row + thread_row();
    const RowView views[2] = {RowView(params_.mask, smaller(own_row, last_row)),
                              RowView(params_.mask, smaller(own_row + 8, last_row))};
    float scores[kKeyTile / 2], rescale[2];
    uint32_t p[kKeyTile / kMmaDepth][4];

    softmax_ = OnlineSoftmax();
    HOPPER_UNROLL
    for (int i = 0; i < C::kHeadDim / 2; ++i) out_[i] = 0.0f;
    if (count == 0) {  // text of length zero
      release(&shared_.q_empty);
      return;
    }

    KeyTile tile = keys.tile(0);
    ring_.wait_keys(0);
    reg_fence(scores);
    wgmma_fence();
    multiply_qk<C::kHeadDim, kKeyTile>(scores, queries(tile.in_sink), ring_.keys(0));
    wgmma_commit();
    wgmma_wait<0>();
    reg_fence(scores);
    release_factors(0, count);
    if (!tile.clean) hide_keys<kKeyTile>(scores, views, tile);
    softmax_.template add<kKeyTile>(scores, rescale, params_.scale_log2);
    if (!tile.clean) spoil(scores, views, tile, 0);
    pack_factor<kKeyTile>(scores, p);
    for (int i = 1; i < count; ++i) {
      ring_.wait_values(i - 1);
      tile = keys.tile(i);
      ring_.wait_keys(i);
      take_turn(group_);
      reg_fence(scores);
      wgmma_fence();
      multiply_qk<C::kHeadDim, kKeyTile>(scores, queries(tile.in_sink), ring_.keys(i));
      wgmma_commit();
      reg_fence(out_);
      wgmma_fence();
      multiply_pv<C::kHeadDim, kKeyTile>(out_, p, ring_.values(i - 1));
      wgmma_commit();
      pass_turn<C>(group_);
      wgmma_wait<1>();
      reg_fence(scores);
      release_factors(i, count);
      if (!tile.clean) hide_keys<kKeyTile>(scores, views, tile);
      softmax_.template add<kKeyTile>(scores, rescale, params_.scale_log2);
      settle(softmax_.witness(), &shared_.q_full);
      wgmma_wait<0>();
      reg_fence(out_);
      ring_.release_values(i - 1);
      scale_rows(out_, rescale);
      if (!tile.clean) spoil(scores, views, tile, i);
      pack_factor<kKeyTile>(scores, p);
    }
    ring_.wait_values(count - 1);
    reg_fence(out_);
    wgmma_fence();
    multiply_pv<C::kHeadDim, kKeyTile>(out_, p, ring_.values(count - 1));
    wgmma_commit();
    wgmma_wait<0>();
    reg_fence(out_);
    ring_.release_values(count - 1);
    softmax_.reduce();
  }

  // Once the scores of tile i are there: gives back its keys, and after the last tile the queries,
  // so that the next ones arrive during the last products and the store.
  HOPPER_DEVICE void release_factors(int i, int count) {
    ring_.release_keys(i);
    if (i == count - 1) release(&shared_.q_empty);
  }

  // The repair of tile i has zeroed values that hold NaN or infinity. Makes NaN of their weights in
  // rows that see them, after the softmax, which they do not change.
  HOPPER_DEVICE void spoil(float (&weights)[kKeyTile / 2], const RowView (&views)[2],
                           const KeyTile& tile, int i) {
    ring_.wait_values(i);
    const uint4 broken = ring_.broken(i);
    warp_sync();  // one lane will release the tile
    if ((broken.x | broken.y | broken.z | broken.w) == 0) return;
    spoil_keys(weights, views, tile, broken);
  }

  HOPPER_DEVICE void store(const Item& item, int first) {
    const int rows = params_.mask.query_rows;
    const int64_t head = static_cast<int64_t>(item.batch) * params_.heads + item.head;
    float inverse[2];
    HOPPER_UNROLL
    for (int half = 0; half < 2; ++half) {
      inverse[half] = softmax_.sum[half] == 0.0f ? 0.0f : 1.0f / softmax_.sum[half];
    }
    store_lse(softmax_, params_.scale_log2, params_.lse + head * rows, first + thread_row(), rows);
    scale_rows(out_, inverse);
    store_rows<C>(shared_, maps_.out, out_, group_, first, item.head, item.batch);
  }

  HOPPER_DEVICE uint32_t queries(bool in_sink) const {
    return smem_u32(shared_.q[in_sink ? C::kConsumers + group_ : group_]);
  }

  typename C::Shared& shared_;
  const TensorMaps& maps_;
  const Params& params_;
  const int group_;
  KeyRing<C> ring_;
  float out_[C::kHeadDim / 2];
  OnlineSoftmax softmax_;
};

template <class C>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(C::kThreads, 1)
    block_causal_attention_kernel(HOPPER_GRID_CONSTANT const TensorMaps maps,
                                  HOPPER_GRID_CONSTANT const Params params) {
  HOPPER_SHARED(memory);
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  if (threadIdx.x == 0) prefetch(maps.q, maps.k, maps.v, maps.out);
  init_barriers<C>(shared);

  const int group = shfl_idx(static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 0) {
    produce<C>(
        shared, maps, [&](const auto& visit) { visit_keys<C>(params, visit); },
        [&] { fetch_queries<C>(shared, maps, params); });
  } else {
    setmaxnreg_inc<C::kConsumerRegisters>();
    Consumer<C>(shared, maps, params, group - 1).run();
  }
}

template <class C>
const char* launch(const Params& params, const Buffers& buffers, int ctas, void* stream) {
  TensorMaps maps{};
  MapMaker make_map(params);
  make_map(&maps.q, buffers.q, kQueryBlock);
  if (params.pinned_rotation) make_map(&maps.q_sink, buffers.q_sink, kQueryBlock);
  make_map(&maps.k, buffers.k, kKeyTile);
  make_map(&maps.v, buffers.v, kKeyTile);
  make_map(&maps.out, buffers.out, kQueryBlock);
  if (make_map.error) return make_map.error;
  return HOPPER_LAUNCH(block_causal_attention_kernel<C>, dim3(ctas), dim3(C::kThreads),
                       sizeof(typename C::Shared), stream, maps, params);
}

}  // namespace

const char* launch_sm90(const Params& params, const Buffers& buffers, int ctas, void* stream) {
  // 227 KB of shared memory hold this many stages
  return params.head_dim == 64 ? launch<Config<64, 4>>(params, buffers, ctas, stream)
                               : launch<Config<128, 2>>(params, buffers, ctas, stream);
}

}  // namespace aapt::block_causal
