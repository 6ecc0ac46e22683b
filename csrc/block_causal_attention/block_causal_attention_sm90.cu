// Block-causal attention forward on sm_90a, for training (SPEC 3).
//
// As in cached_attention: one warpgroup fetches (TMA), two multiply (wgmma) 64 query rows each and
// take turns, so that one's softmax runs under the other's products. Text and frames are rows of
// one sequence, cut into tiles of 128: `mask.h` says which keys each of them sees.

#include "attention/barriers.cuh"
#include "attention/maps.cuh"
#include "attention/products.cuh"
#include "attention/softmax.cuh"
#include "block_causal_attention/mask.h"
#include "block_causal_attention/hide.cuh"
#include "block_causal_attention/params.h"
#include "block_causal_attention/schedule.h"
#include "hopper/hopper.cuh"

namespace aapt::block_causal {
namespace {

using namespace hopper;

template <int kHeadDim_, int kStages_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_, kStages = kStages_;
  static constexpr int kPanels = kHeadDim / kPanel;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // Within 65536: 128 x (40 + 2 x 232)
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

  using QueryBlock = uint16_t[kPanels][kQueryBlock * kPanel];
  using KeyBlock = uint16_t[kPanels][kKeyTile * kPanel];

  struct Shared {
    // q, and q_sink after it; once read, out
    alignas(1024) QueryBlock q[2 * kConsumers];
    alignas(1024) KeyBlock k[kStages];
    alignas(1024) KeyBlock v[kStages];
    uint64_t q_full, q_empty;
    uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  };
};

// Named barriers; 0 is __syncthreads.
enum Barrier { kTurn = 1, kGroup = kTurn + kConsumers };

// The stage of the n-th key tile that a CTA handles, and the parity of its barriers then.
template <class C>
struct Stage {
  int index;
  uint32_t phase;
  HOPPER_DEVICE explicit Stage(uint32_t n) : index(n % C::kStages), phase(n / C::kStages % 2) {}
};

struct TensorMaps {
  TensorMap q, q_sink, k, v, out;
};

HOPPER_DEVICE int query_tiles(const Params& params) {
  return (params.mask.query_rows + kQueryTile - 1) / kQueryTile;
}

// Later rows see more: the last tile is the longest.
HOPPER_DEVICE int first_row(const Params& params, const Item& item) {
  return (query_tiles(params) - 1 - item.rank) * kQueryTile;
}

HOPPER_DEVICE Schedule schedule_of(const Params& params) {
  return Schedule(query_tiles(params), params.batch, params.heads, blockIdx.x, gridDim.x);
}

HOPPER_DEVICE VisibleKeys visible_keys(const Params& params, const Item& item) {
  const int first = first_row(params, item);
  const int last = smaller(first + kQueryTile, params.mask.query_rows) - 1;
  return VisibleKeys(params.mask, params.pinned_rotation, item.batch, first, last);
}

template <class C>
HOPPER_DEVICE void fetch_queries(typename C::Shared& shared, const TensorMaps& maps,
                                 const Params& params) {
  Schedule schedule = schedule_of(params);
  Item item;
  for (uint32_t n = 0; schedule.next(item); ++n) {
    const bool sink = params.pinned_rotation && visible_keys(params, item).sink_tiles() > 0;
    const uint32_t bytes = kConsumers * sizeof(typename C::QueryBlock);
    mbar_wait(&shared.q_empty, n % 2 ^ 1);
    mbar_arrive_expect_tx(&shared.q_full, sink ? 2 * bytes : bytes);
    for (int block = 0; block < kConsumers; ++block) {
      const int row = first_row(params, item) + block * kQueryBlock;
      for (int panel = 0; panel < C::kPanels; ++panel) {
        tma_load_4d(shared.q[block][panel], &maps.q, &shared.q_full, panel * kPanel, row, item.head,
                    item.batch);
        if (!sink) continue;
        // q_sink has frames only; of rows before, which see no sink, it gives zeros
        tma_load_4d(shared.q[kConsumers + block][panel], &maps.q_sink, &shared.q_full,
                    panel * kPanel, row - params.mask.text_tokens, item.head, item.batch);
      }
    }
  }
}

template <class C>
HOPPER_DEVICE void fetch_keys(typename C::Shared& shared, const TensorMaps& maps,
                              const Params& params) {
  Schedule schedule = schedule_of(params);
  Item item;
  uint32_t n = 0;
  while (schedule.next(item)) {
    const VisibleKeys keys = visible_keys(params, item);
    const int count = keys.tiles();
    for (int i = 0; i < count; ++i, ++n) {
      const Stage<C> stage(n);
      const int row = keys.tile(i).row;
      const auto fetch = [&](typename C::KeyBlock& tile, const TensorMap& map, uint64_t* full,
                             uint64_t* empty) {
        mbar_wait(empty, stage.phase ^ 1);
        mbar_arrive_expect_tx(full, sizeof(tile));
        for (int panel = 0; panel < C::kPanels; ++panel) {
          tma_load_4d(tile[panel], &map, full, panel * kPanel, row, item.head, item.batch);
        }
      };
      fetch(shared.k[stage.index], maps.k, &shared.k_full[stage.index],
            &shared.k_empty[stage.index]);
      fetch(shared.v[stage.index], maps.v, &shared.v_full[stage.index],
            &shared.v_empty[stage.index]);
    }
  }
}

// One of the two warpgroups that multiply.
template <class C>
class Consumer {
 public:
  HOPPER_DEVICE Consumer(typename C::Shared& shared, const TensorMaps& maps, const Params& params,
                         int group)
      : shared_(shared), maps_(maps), params_(params), group_(group) {}

  HOPPER_DEVICE void run() {
    Schedule schedule = schedule_of(params_);
    Item item;
    if (group_ == 1) pass_turn();  // the first turn is the other's
    for (uint32_t n = 0; schedule.next(item); ++n) {
      mbar_wait(&shared_.q_full, n % 2);
      const VisibleKeys keys = visible_keys(params_, item);
      const int row = first_row(params_, item) + group_ * kQueryBlock;
      const int count = keys.tiles();
      attend(keys, count, row);
      before_ += count;
      store(item, row);
    }
    if (group_ == 0) take_turn();  // leaves no barrier half full
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
    if (count == 0) return;  // text without any

    KeyTile tile = keys.tile(0);
    wait_keys(0);
    reg_fence(scores);
    wgmma_fence();
    multiply_qk<C::kHeadDim, kKeyTile>(scores, queries(tile.in_sink), keys_at(0));
    wgmma_commit();
    wgmma_wait<0>();
    reg_fence(scores);
    release(&shared_.k_empty[stage(0).index]);
    if (!tile.clean) hide_keys<kKeyTile>(scores, views, tile);
    softmax_.template add<kKeyTile>(scores, rescale, params_.scale_log2);
    pack_factor<kKeyTile>(scores, p);
    for (int i = 1; i < count; ++i) {
      tile = keys.tile(i);
      wait_keys(i);
      wait_values(i - 1);
      take_turn();
      reg_fence(scores);
      wgmma_fence();
      multiply_qk<C::kHeadDim, kKeyTile>(scores, queries(tile.in_sink), keys_at(i));
      wgmma_commit();
      reg_fence(out_);
      wgmma_fence();
      multiply_pv<C::kHeadDim, kKeyTile>(out_, p, values_at(i - 1));
      wgmma_commit();
      pass_turn();
      wgmma_wait<1>();
      reg_fence(scores);
      release(&shared_.k_empty[stage(i).index]);
      if (!tile.clean) hide_keys<kKeyTile>(scores, views, tile);
      softmax_.template add<kKeyTile>(scores, rescale, params_.scale_log2);
      wgmma_wait<0>();
      reg_fence(out_);
      release(&shared_.v_empty[stage(i - 1).index]);
      scale_rows(out_, rescale);
      pack_factor<kKeyTile>(scores, p);
    }
    wait_values(count - 1);
    reg_fence(out_);
    wgmma_fence();
    multiply_pv<C::kHeadDim, kKeyTile>(out_, p, values_at(count - 1));
    wgmma_commit();
    wgmma_wait<0>();
    reg_fence(out_);
    release(&shared_.v_empty[stage(count - 1).index]);
    softmax_.reduce();
  }

  HOPPER_DEVICE void store(const Item& item, int first) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int rows = params_.mask.query_rows;
    float inverse[2];
    HOPPER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = softmax_.sum[half];
      inverse[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int row = first + thread_row() + 8 * half;
      if (lane % 4 == 0 and row < rows) {
        const int64_t head = static_cast<int64_t>(item.batch) * params_.heads + item.head;
        constexpr float kLn2 = 0.693147180559945f;
        params_.lse[head * rows + row] =
            kLn2 * (softmax_.maximum[half] * params_.scale_log2 + log2_approx(sum));
      }
    }
    scale_rows(out_, inverse);

    // Every warp of the group has done with the queries that lie here
    bar_sync(kGroup + group_, 128);
    const uint32_t row = warp * 16 + lane % 16, half_columns = lane / 16 * 16;
    HOPPER_UNROLL
    for (int i = 0; i < C::kHeadDim / 16; ++i) {
      auto* panel = reinterpret_cast<uint8_t*>(shared_.q[group_][i / 4]);
      stmatrix_x4(
          panel + sw128(row, i % 4 * 32 + half_columns), pack_bf16(out_[8 * i], out_[8 * i + 1]),
          pack_bf16(out_[8 * i + 2], out_[8 * i + 3]), pack_bf16(out_[8 * i + 4], out_[8 * i + 5]),
          pack_bf16(out_[8 * i + 6], out_[8 * i + 7]));
    }
    fence_proxy_async();
    bar_sync(kGroup + group_, 128);
    if (threadIdx.x % 128 == 0) {
      for (int panel = 0; panel < C::kPanels; ++panel) {
        tma_store_4d(&maps_.out, shared_.q[group_][panel], panel * kPanel, first, item.head,
                     item.batch);
      }
      tma_store_commit();
      tma_store_wait_read<0>();
      mbar_arrive(&shared_.q_empty);
    }
  }

  // Of the two rows of this thread in its block of 64, the first; the second comes 8 later.
  HOPPER_DEVICE static int thread_row() { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }
  HOPPER_DEVICE Stage<C> stage(int i) const { return Stage<C>(before_ + i); }
  HOPPER_DEVICE uint32_t keys_at(int i) const { return smem_u32(shared_.k[stage(i).index]); }
  HOPPER_DEVICE uint32_t values_at(int i) const { return smem_u32(shared_.v[stage(i).index]); }
  HOPPER_DEVICE void wait_keys(int i) {
    mbar_wait(&shared_.k_full[stage(i).index], stage(i).phase);
  }
  HOPPER_DEVICE void wait_values(int i) {
    mbar_wait(&shared_.v_full[stage(i).index], stage(i).phase);
  }
  HOPPER_DEVICE void release(uint64_t* empty) {
    if (threadIdx.x % 32 == 0) mbar_arrive(empty);
  }
  HOPPER_DEVICE void take_turn() { bar_sync(kTurn + group_, 128 * kConsumers); }
  HOPPER_DEVICE void pass_turn() { bar_arrive(kTurn + 1 - group_, 128 * kConsumers); }

  HOPPER_DEVICE uint32_t queries(bool in_sink) const {
    return smem_u32(shared_.q[in_sink ? kConsumers + group_ : group_]);
  }

  typename C::Shared& shared_;
  const TensorMaps& maps_;
  const Params& params_;
  const int group_;
  uint32_t before_ = 0;  // key tiles of finished items
  float out_[C::kHeadDim / 2];
  OnlineSoftmax softmax_;
};

template <class C>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(C::kThreads, 1)
    block_causal_attention_kernel(HOPPER_GRID_CONSTANT const TensorMaps maps,
                                  HOPPER_GRID_CONSTANT const Params params) {
  HOPPER_SHARED(memory);
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  init_barriers<C::kStages>(shared, kConsumers);

  const int group = shfl_idx(static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 0) {
    setmaxnreg_dec<C::kProducerRegisters>();
    // Two threads, so that the next keys are under way while queries wait for their place
    const int warp = shfl_idx(static_cast<int>(threadIdx.x) / 32, 0);
    if (warp == 0 and elect_one()) fetch_keys<C>(shared, maps, params);
    if (warp == 1 and elect_one()) fetch_queries<C>(shared, maps, params);
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
  // head_dim and stages: as much as 227 KB of shared memory hold
  return params.head_dim == 64 ? launch<Config<64, 4>>(params, buffers, ctas, stream)
                               : launch<Config<128, 2>>(params, buffers, ctas, stream);
}

}  // namespace aapt::block_causal
