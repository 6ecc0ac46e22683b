// dq of block-causal attention on sm_90a, summed in a fixed order (docs/method.md#3). A CTA keeps
// 128 query rows and goes through the keys that these rows see, as the forward does. If the sink
// frames have a query of their own, q_sink, their keys are a separate work item, and dq_sink is its
// result.

#include "attention/consumer.cuh"
#include "attention/maps.cuh"
#include "attention/products.cuh"
#include "attention/softmax.cuh"
#include "block_causal_attention/backward.h"
#include "block_causal_attention/hide.cuh"
#include "block_causal_attention/mask.h"
#include "block_causal_attention/schedule.h"
#include "hopper/hopper.cuh"

namespace aapt::block_causal {
namespace {

using namespace hopper;

template <int kHeadDim_, int kStages_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_, kStages = kStages_, kKeyTile = block_causal::kKeyTile;
  static constexpr Repair kRepair = Repair::BOTH;
  static constexpr int kConsumers = kBackwardConsumers, kPanels = kHeadDim / kPanel;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // Within 65536: 128 x (56 + 2 x 224)
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

  using QueryBlock = uint16_t[kPanels][kQueryBlock * kPanel];
  using KeyBlock = uint16_t[kPanels][kKeyTile * kPanel];

  struct Shared {
    alignas(1024) QueryBlock q[kConsumers];
    alignas(1024) QueryBlock dout[kConsumers];
    alignas(1024) QueryBlock out[kConsumers];  // dq
    alignas(1024) KeyBlock k[kStages];
    alignas(1024) KeyBlock v[kStages];
    uint64_t q_full, q_empty;
    uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    uint64_t raw[kStages];
  };
};

struct TensorMaps {
  TensorMap q, q_sink, k, v, dout, dq, dq_sink;
};

// A tile of queries, from q or q_sink, and the keys that it sees.
struct Work {
  int row;
  bool of_sink;
  VisibleKeys keys;
  int count;

  HOPPER_DEVICE Work(const Params& params, const Item& item)
      : row((query_tiles(params) - 1 - item.rank / queries(params)) * kDqTile),
        of_sink(item.rank % queries(params) == 1),
        keys(params.mask, params.pinned_rotation, item.batch, row,
             smaller(row + kDqTile, params.mask.query_rows) - 1) {
    count = params.pinned_rotation ? keys.tiles_with(of_sink) : keys.tiles();
  }

  HOPPER_DEVICE KeyTile tile(const Params& params, int i) const {
    return keys.tile(params.pinned_rotation ? keys.index_with(of_sink, i) : i);
  }

  HOPPER_DEVICE static int query_tiles(const Params& params) {
    return (params.mask.query_rows + kDqTile - 1) / kDqTile;
  }
  HOPPER_DEVICE static int queries(const Params& params) { return params.pinned_rotation ? 2 : 1; }
  HOPPER_DEVICE static Schedule schedule(const Params& params) {
    return Schedule(query_tiles(params) * queries(params), params.batch, params.heads, blockIdx.x,
                    gridDim.x);
  }
};

template <class C>
HOPPER_DEVICE void fetch_queries(typename C::Shared& shared, const TensorMaps& maps,
                                 const Params& params) {
  Schedule schedule = Work::schedule(params);
  Item item;
  for (uint32_t n = 0; schedule.next(item); ++n) {
    const Work work(params, item);
    mbar_wait(&shared.q_empty, n % 2 ^ 1);
    mbar_arrive_expect_tx(&shared.q_full, sizeof(shared.q) + sizeof(shared.dout));
    for (int block = 0; block < C::kConsumers; ++block) {
      const int row = work.row + block * kQueryBlock;
      for (int panel = 0; panel < C::kPanels; ++panel) {
        if (work.of_sink) {  // q_sink has no text: rows before it give zeros
          tma_load_4d(shared.q[block][panel], &maps.q_sink, &shared.q_full, panel * kPanel,
                      row - params.mask.text_tokens, item.head, item.batch, CacheHint::EVICT_FIRST);
        } else {
          tma_load_4d(shared.q[block][panel], &maps.q, &shared.q_full, panel * kPanel, row,
                      item.head, item.batch, CacheHint::EVICT_FIRST);
        }
        tma_load_4d(shared.dout[block][panel], &maps.dout, &shared.q_full, panel * kPanel, row,
                    item.head, item.batch, CacheHint::EVICT_FIRST);
      }
    }
  }
}

// Calls visit(tile, head, batch, is_raw) for every key tile of this CTA, in order.
template <class Visit>
HOPPER_DEVICE void visit_keys(const Params& params, const Visit& visit) {
  Schedule schedule = Work::schedule(params);
  Item item;
  while (schedule.next(item)) {
    const Work work(params, item);
    for (int i = 0; i < work.count; ++i) {
      const KeyTile tile = work.tile(params, i);
      visit(tile, item.head, item.batch, !tile.clean);
    }
  }
}

// One of the two warpgroups that multiply: 64 of the query rows.
template <class C>
class Consumer {
 public:
  HOPPER_DEVICE Consumer(typename C::Shared& shared, const TensorMaps& maps, const Params& params,
                         const Backward& backward, int group)
      : shared_(shared),
        maps_(maps),
        params_(params),
        backward_(backward),
        group_(group),
        ring_(shared) {}

  HOPPER_DEVICE void run() {
    Schedule schedule = Work::schedule(params_);
    Item item;
    for (uint32_t n = 0; schedule.next(item); ++n) {
      const Work work(params_, item);
      mbar_wait(&shared_.q_full, n % 2);
      attend(work, item);
      store(work, item);
    }
    finish_stores();
  }

 private:
  HOPPER_DEVICE void attend(const Work& work, const Item& item) {
    const int last_row = params_.mask.query_rows - 1;
    const int row = work.row + group_ * kQueryBlock + thread_row();
    const RowView views[2] = {RowView(params_.mask, smaller(row, last_row)),
                              RowView(params_.mask, smaller(row + 8, last_row))};
    const int64_t pair = static_cast<int64_t>(item.batch) * params_.heads + item.head;
    const int64_t stats = pair * backward_.padded_rows + row;
    const float lse[2] = {backward_.row_lse[stats], backward_.row_lse[stats + 8]};
    const float delta[2] = {backward_.row_delta[stats], backward_.row_delta[stats + 8]};
    const uint32_t queries = smem_u32(shared_.q[group_]), dout = smem_u32(shared_.dout[group_]);
    float scores[kKeyTile / 2], ds[kKeyTile / 2];
    uint32_t factor[kKeyTile / kMmaDepth][4];

    HOPPER_UNROLL
    for (int i = 0; i < C::kHeadDim / 2; ++i) dq_[i] = 0.0f;
    if (work.count == 0) release(&shared_.q_empty);
    for (int i = 0; i < work.count; ++i) {
      const KeyTile tile = work.tile(params_, i);
      const uint32_t keys = ring_.keys(i), values = ring_.values(i);
      ring_.wait_keys(i);
      reg_fence(scores);
      wgmma_fence();
      multiply_qk<C::kHeadDim, kKeyTile>(scores, queries, keys);
      wgmma_commit();
      ring_.wait_values(i);
      reg_fence(ds);
      wgmma_fence();
      multiply_qk<C::kHeadDim, kKeyTile>(ds, dout, values);
      wgmma_commit();

      wgmma_wait<1>();
      reg_fence(scores);
      if (!tile.clean) hide_keys<kKeyTile>(scores, views, tile);
      HOPPER_UNROLL
      for (int j = 0; j < kKeyTile / 2; ++j) {
        scores[j] = exp2_approx(scores[j] * params_.scale_log2 - lse[j / 2 % 2]);
      }
      settle(witness_of(scores), &shared_.q_full);
      wgmma_wait<0>();
      reg_fence(ds);
      ring_.release_values(i);
      if (i == work.count - 1) release(&shared_.q_empty);
      HOPPER_UNROLL
      for (int j = 0; j < kKeyTile / 2; ++j) ds[j] = scores[j] * (ds[j] - delta[j / 2 % 2]);
      pack_factor<kKeyTile>(ds, factor);
      reg_fence(dq_);
      wgmma_fence();
      multiply_pv<C::kHeadDim, kKeyTile>(dq_, factor, keys);
      wgmma_commit();
      wgmma_wait<0>();
      reg_fence(dq_);
      ring_.release_keys(i);
    }
    ring_.finish_item(work.count);
  }

  HOPPER_DEVICE void store(const Work& work, const Item& item) {
    const float scale[2] = {params_.scale, params_.scale};
    scale_rows(dq_, scale);
    const int row = work.row + group_ * kQueryBlock;
    store_rows<C>(shared_, work.of_sink ? maps_.dq_sink : maps_.dq, dq_, group_,
                  work.of_sink ? row - params_.mask.text_tokens : row, item.head, item.batch);
  }

  typename C::Shared& shared_;
  const TensorMaps& maps_;
  const Params& params_;
  const Backward& backward_;
  const int group_;
  KeyRing<C> ring_;
  float dq_[C::kHeadDim / 2];
};

template <class C>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(C::kThreads, 1)
    block_causal_dq_kernel(HOPPER_GRID_CONSTANT const TensorMaps maps,
                           HOPPER_GRID_CONSTANT const Params params,
                           HOPPER_GRID_CONSTANT const Backward backward) {
  HOPPER_SHARED(memory);
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  if (threadIdx.x == 0) prefetch(maps.q, maps.k, maps.v, maps.dout, maps.dq);
  init_barriers<C>(shared);

  const int group = shfl_idx(static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 0) {
    produce<C>(
        shared, maps, [&](const auto& visit) { visit_keys(params, visit); },
        [&] { fetch_queries<C>(shared, maps, params); });
  } else {
    setmaxnreg_inc<C::kConsumerRegisters>();
    Consumer<C>(shared, maps, params, backward, group - 1).run();
  }
}

// The rows of a dense output.
RowBuffer dense_rows(const Params& params, uint16_t* data, int rows) {
  const uint64_t head = 2 * static_cast<uint64_t>(params.head_dim), token = head * params.heads;
  return {data, token, head, token * rows, rows};
}

template <class C>
const char* launch(const Params& params, const Backward& backward, const BackwardBuffers& buffers,
                   int ctas, void* stream) {
  TensorMaps maps{};
  MapMaker make_map(params);
  const Buffers& forward = buffers.forward;
  const int rows = params.mask.query_rows, frame_rows = rows - params.mask.text_tokens;
  make_map(&maps.q, forward.q, kQueryBlock);
  make_map(&maps.dq, dense_rows(params, backward.dq, rows), kQueryBlock);
  make_map(&maps.dout, buffers.dout, kQueryBlock);
  make_map(&maps.k, forward.k, kKeyTile);
  make_map(&maps.v, forward.v, kKeyTile);
  if (params.pinned_rotation) {
    const RowBuffer dq_sink = dense_rows(params, backward.dq_sink, frame_rows);
    make_map(&maps.q_sink, forward.q_sink, kQueryBlock);
    make_map(&maps.dq_sink, dq_sink, kQueryBlock);
  }
  if (make_map.error) return make_map.error;
  return HOPPER_LAUNCH(block_causal_dq_kernel<C>, dim3(ctas), dim3(C::kThreads),
                       sizeof(typename C::Shared), stream, maps, params, backward);
}

}  // namespace

const char* launch_dq(const Params& params, const Backward& backward,
                      const BackwardBuffers& buffers, int ctas, void* stream) {
  return params.head_dim == 64 ? launch<Config<64, 4>>(params, backward, buffers, ctas, stream)
                               : launch<Config<128, 2>>(params, backward, buffers, ctas, stream);
}

}  // namespace aapt::block_causal
