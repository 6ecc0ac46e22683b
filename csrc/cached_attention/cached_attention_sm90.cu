// Attention from new frames to the KV cache, in place, on sm_90a (docs/method.md#3,
// docs/method.md#5).
//
// Compute-bound: 4 head_dim FLOPs per query and key, but 4 head_dim bytes per key for all 1196
// queries. So the tensor cores must never wait. One warpgroup fetches (TMA) and two multiply
// (wgmma), three at head_dim 64. They alternate: the softmax of one runs during the products of the
// others. Within a warpgroup, the scores of the next key tile are computed together with the values
// of the current one. `schedule.h` keeps every SM busy to the end.

#include "attention/consumer.cuh"
#include "attention/maps.cuh"
#include "attention/products.cuh"
#include "attention/softmax.cuh"
#include "cached_attention/params.h"
#include "cached_attention/partials.cuh"
#include "cached_attention/schedule.h"
#include "hopper/hopper.cuh"

namespace aapt {
namespace {

using namespace hopper;

template <int kHeadDim_, int kKeyTile_, int kStages_, bool kSinkQuery_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_, kKeyTile = kKeyTile_, kStages = kStages_;
  static constexpr bool kSinkQuery = kSinkQuery_;
  static constexpr Repair kRepair = Repair::END;  // a step's rows all see the same keys
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
    alignas(1024) QueryBlock q[kSinkQuery ? 2 * kConsumers : kConsumers];  // q, then q_sink
    alignas(1024) QueryBlock out[kConsumers];  // or sums for another warpgroup
    alignas(1024) KeyBlock k[kStages];
    alignas(1024) KeyBlock v[kStages];
    float4 stats[Part<kHeadDim>::kStats];
    uint64_t q_full, q_empty;
    uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    uint64_t raw[kStages];
    uint32_t arrived[kConsumers];
  };
};

constexpr int kMerge = kOwnBarriers;  // a named barrier

struct TensorMaps {
  TensorMap q, q_sink, k, v, out;
};

template <class C>
HOPPER_DEVICE void fetch_queries(typename C::Shared& shared, const TensorMaps& maps,
                                 const CachedAttentionParams& params) {
  Schedule<C::kKeyTile, C::kConsumers> schedule(params, blockIdx.x, gridDim.x);
  Piece piece;
  for (uint32_t n = 0; schedule.next(piece); ++n) {
    const int blocks = piece.narrow ? 1 : C::kConsumers;
    const uint32_t bytes = blocks * sizeof(typename C::QueryBlock);
    mbar_wait(&shared.q_empty, n % 2 ^ 1);
    mbar_arrive_expect_tx(&shared.q_full, C::kSinkQuery ? 2 * bytes : bytes);
    for (int block = 0; block < blocks; ++block) {
      const int row = piece.tile * C::kQueryTile + block * kQueryBlock;
      for (int panel = 0; panel < C::kPanels; ++panel) {
        tma_load_4d(shared.q[block][panel], &maps.q, &shared.q_full, panel * kPanel, row,
                    piece.head, piece.batch, CacheHint::EVICT_FIRST);
        if constexpr (C::kSinkQuery) {
          tma_load_4d(shared.q[C::kConsumers + block][panel], &maps.q_sink, &shared.q_full,
                      panel * kPanel, row, piece.head, piece.batch, CacheHint::EVICT_FIRST);
        }
      }
    }
  }
}

// Calls visit(tile, head, batch, is_raw) for every key tile of this CTA's share, in order.
template <class C, class Visit>
HOPPER_DEVICE void visit_keys(const CachedAttentionParams& params, const Visit& visit) {
  Schedule<C::kKeyTile, C::kConsumers> schedule(params, blockIdx.x, gridDim.x);
  Piece piece;
  while (schedule.next(piece)) {
    const VisibleKeys<C::kKeyTile> keys(params, piece.batch);
    for (int i = 0; i < piece.count; ++i) {
      const auto tile = keys.tile(piece.tile_at(i));
      visit(tile, piece.head, piece.batch, tile.visible() < C::kKeyTile);
    }
  }
}

// One of the warpgroups that multiply.
template <class C>
class Consumer {
 public:
  HOPPER_DEVICE Consumer(typename C::Shared& shared, const TensorMaps& maps,
                         const CachedAttentionParams& params, int group)
      : shared_(shared), maps_(maps), params_(params), group_(group), ring_(shared) {}

  HOPPER_DEVICE void run() {
    Schedule<C::kKeyTile, C::kConsumers> schedule(params_, blockIdx.x, gridDim.x);
    Piece piece;
    if (group_ == C::kConsumers - 1) pass_turn<C>(group_);  // the first consumer begins
    for (uint32_t n = 0; schedule.next(piece); ++n) {
      mbar_wait(&shared_.q_full, n % 2);
      attend(piece);
      ring_.finish_item(piece.count);
      finish(piece, schedule.sharers(piece));
    }
    if (group_ == 0) take_turn(group_);  // leaves no barrier half full
    finish_stores();
  }

 private:
  // Goes through the key tiles of a piece: all, or if the tile is narrow this consumer's share, one
  // in kConsumers.
  HOPPER_DEVICE void attend(const Piece& piece) {
    const VisibleKeys<C::kKeyTile> keys(params_, piece.batch);
    const int stride = piece.narrow ? C::kConsumers : 1, first = piece.narrow ? group_ : 0;
    // All consumers take equally many turns, even if one has a tile less
    const int turns = (piece.count + stride - 1) / stride;
    float scores[C::kKeyTile / 2], rescale[2];
    uint32_t p[C::kKeyTile / kMmaDepth][4];

    softmax_ = OnlineSoftmax();
    HOPPER_UNROLL
    for (int i = 0; i < C::kHeadDim / 2; ++i) out_[i] = 0.0f;

    skip(0, first < piece.count ? first : piece.count);
    if (first >= piece.count) release(&shared_.q_empty);
    auto tile = keys.tile(piece.tile_at(first));
    if (first < piece.count) {
      ring_.wait_keys(first);
      reg_fence(scores);
      wgmma_fence();
      multiply_qk<C::kHeadDim, C::kKeyTile>(scores, queries(piece, tile.in_sink),
                                            ring_.keys(first));
      wgmma_commit();
      wgmma_wait<0>();
      reg_fence(scores);
      release_factors(first, first + stride >= piece.count);
      hide_columns<C::kKeyTile>(scores, tile.visible());
      softmax_.template add<C::kKeyTile>(scores, rescale, params_.scale_log2);
      pack_factor<C::kKeyTile>(scores, p);
    }
    for (int turn = 1; turn < turns; ++turn) {
      const int i = first + turn * stride, before = i - stride;
      if (i >= piece.count) {  // another has one tile more
        take_turn(group_);
        pass_turn<C>(group_);
        break;
      }
      skip(before + 1, i);
      ring_.wait_values(before);
      tile = keys.tile(piece.tile_at(i));
      ring_.wait_keys(i);
      take_turn(group_);
      reg_fence(scores);
      wgmma_fence();
      multiply_qk<C::kHeadDim, C::kKeyTile>(scores, queries(piece, tile.in_sink), ring_.keys(i));
      wgmma_commit();
      reg_fence(out_);
      wgmma_fence();
      multiply_pv<C::kHeadDim, C::kKeyTile>(out_, p, ring_.values(before));
      wgmma_commit();
      pass_turn<C>(group_);
      wgmma_wait<1>();
      reg_fence(scores);
      release_factors(i, i + stride >= piece.count);
      hide_columns<C::kKeyTile>(scores, tile.visible());
      softmax_.template add<C::kKeyTile>(scores, rescale, params_.scale_log2);
      settle(softmax_.witness(), &shared_.q_full);
      wgmma_wait<0>();
      reg_fence(out_);
      ring_.release_values(before);
      scale_rows(out_, rescale);
      pack_factor<C::kKeyTile>(scores, p);
    }
    if (first < piece.count) {
      const int last = first + (piece.count - 1 - first) / stride * stride;
      ring_.wait_values(last);
      reg_fence(out_);
      wgmma_fence();
      multiply_pv<C::kHeadDim, C::kKeyTile>(out_, p, ring_.values(last));
      wgmma_commit();
      wgmma_wait<0>();
      reg_fence(out_);
      ring_.release_values(last);
      if (piece.narrow) skip(last + 1, piece.count);
    }
    softmax_.reduce();
  }

  // Once the scores of tile i are there: gives back its keys, and after the last tile the queries,
  // so that the next ones arrive during the last products and the store.
  HOPPER_DEVICE void release_factors(int i, bool last) {
    ring_.release_keys(i);
    if (last) release(&shared_.q_empty);
  }

  // Adds up the parts of the query block and stores it.
  HOPPER_DEVICE void finish(const Piece& piece, const Interval& sharers) {
    if (piece.narrow) {
      finish_stores();  // of all: the memory is free
      bar_sync(kMerge, 128 * C::kConsumers);
      const Part<C::kHeadDim> part(reinterpret_cast<float4*>(shared_.out), shared_.stats);
      HOPPER_UNROLL_BY(1)
      for (int other = 1; other < C::kConsumers; ++other) {
        if (group_ == other) part.write(out_, softmax_);
        bar_sync(kMerge, 128 * C::kConsumers);
        if (group_ == 0) add_part<C::kHeadDim>(out_, softmax_, part, params_.scale_log2);
        bar_sync(kMerge, 128 * C::kConsumers);
      }
      if (group_ != 0) return;
    }
    bool complete = piece.whole;
    if (!complete) {
      Part<C::kHeadDim>(params_, blockIdx.x, piece.starts, group_).write(out_, softmax_);
      complete = arrive_last(piece, sharers.end - sharers.begin + 1);
      if (complete) {
        add_parts<C::kHeadDim>(out_, softmax_, params_, sharers.begin, sharers.end, group_);
      }
    }
    if (complete) store(piece);
  }

  // Counts this CTA's part of a query block as written; true if it is the last of `parts`. The last
  // one sets the count back, for the next call.
  HOPPER_DEVICE bool arrive_last(const Piece& piece, uint32_t parts) {
    const int64_t tile =
        (static_cast<int64_t>(piece.batch) * params_.heads + piece.head) * params_.query_tiles +
        piece.tile;
    sync_group(group_);  // cumulative: the leader releases what all have written
    if (leads_group()) {
      shared_.arrived[group_] =
          atomic_add_acq_rel(params_.arrivals + tile * C::kConsumers + group_, 1);
      if (shared_.arrived[group_] + 1 == parts) {
        params_.arrivals[tile * C::kConsumers + group_] = 0;
      }
    }
    sync_group(group_);
    return shared_.arrived[group_] + 1 == parts;
  }

  HOPPER_DEVICE void store(const Piece& piece) {
    const int first = piece.tile * C::kQueryTile + group_ * kQueryBlock;
    const int64_t head = static_cast<int64_t>(piece.batch) * params_.heads + piece.head;
    // Every row sees its own frame: no sum is zero
    const float inverse[2] = {1.0f / softmax_.sum[0], 1.0f / softmax_.sum[1]};
    store_lse(softmax_, params_.scale_log2, params_.lse + head * params_.tokens,
              first + thread_row(), params_.tokens);
    scale_rows(out_, inverse);
    store_rows<C>(shared_, maps_.out, out_, group_, first, piece.head, piece.batch);
  }

  // Releases tiles of the other consumers once they have been fetched, so that parities stay in
  // step. All lanes must have waited for a tile before one lets it be refilled.
  HOPPER_DEVICE void skip(int begin, int end) {
    HOPPER_UNROLL_BY(1)
    for (int i = begin; i < end; ++i) {
      ring_.wait_keys(i);
      ring_.wait_values(i);
      warp_sync();
      ring_.release_keys(i);
      ring_.release_values(i);
    }
  }

  HOPPER_DEVICE uint32_t queries(const Piece& piece, bool in_sink) const {
    const int block = piece.narrow ? 0 : group_;
    return smem_u32(shared_.q[C::kSinkQuery && in_sink ? C::kConsumers + block : block]);
  }

  typename C::Shared& shared_;
  const TensorMaps& maps_;
  const CachedAttentionParams& params_;
  const int group_;
  KeyRing<C> ring_;
  float out_[C::kHeadDim / 2];
  OnlineSoftmax softmax_;
};

template <class C>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(C::kThreads, 1)
    cached_attention_kernel(HOPPER_GRID_CONSTANT const TensorMaps maps,
                            HOPPER_GRID_CONSTANT const CachedAttentionParams params) {
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
const char* launch(const CachedAttentionParams& params, const CachedAttentionBuffers& buffers,
                   int ctas, void* stream) {
  TensorMaps maps{};
  MapMaker make_map(params);
  make_map(&maps.q, buffers.q, kQueryBlock);
  if (C::kSinkQuery) make_map(&maps.q_sink, buffers.q_sink, kQueryBlock);
  make_map(&maps.k, buffers.k, C::kKeyTile);
  make_map(&maps.v, buffers.v, C::kKeyTile);
  make_map(&maps.out, buffers.out, kQueryBlock);
  if (make_map.error) return make_map.error;
  return HOPPER_LAUNCH(cached_attention_kernel<C>, dim3(ctas), dim3(C::kThreads),
                       sizeof(typename C::Shared), stream, maps, params);
}

}  // namespace

const char* launch_cached_attention_sm90(const CachedAttentionParams& params,
                                         const CachedAttentionBuffers& buffers, int ctas,
                                         void* stream) {
  // 227 KB of shared memory hold this many stages
  if (params.head_dim == 64) {
    return params.pinned_rotation
               ? launch<Config<64, 128, 4, true>>(params, buffers, ctas, stream)
               : launch<Config<64, 128, 4, false>>(params, buffers, ctas, stream);
  }
  return params.pinned_rotation ? launch<Config<128, 128, 2, true>>(params, buffers, ctas, stream)
                                : launch<Config<128, 128, 2, false>>(params, buffers, ctas, stream);
}

}  // namespace aapt
