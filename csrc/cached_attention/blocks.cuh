// Code that the kernels of cached_attention share: the order of the work, and what happens to a
// query block before and after its products.
#pragma once

#include "attention/consumer.cuh"
#include "attention/maps.cuh"
#include "attention/products.cuh"
#include "attention/softmax.cuh"
#include "cached_attention/params.h"
#include "cached_attention/partials.cuh"
#include "cached_attention/schedule.h"
#include "hopper/hopper.cuh"

namespace aapt {

constexpr int kMerge = kOwnBarriers;  // a named barrier

// BF16 queries as TMA writes them.
template <int kHeadDim>
using QueryBlock = uint16_t[kHeadDim / kPanel][kQueryBlock * kPanel];

template <class C>
using ScheduleOf = Schedule<typename C::Keys, C::kConsumers>;

template <class C, class TensorMaps>
HOPPER_DEVICE void fetch_queries(typename C::Shared& shared, const TensorMaps& maps,
                                 const CachedAttentionParams& params) {
  using namespace hopper;
  ScheduleOf<C> schedule(params, blockIdx.x, gridDim.x);
  Piece piece;
  for (uint32_t n = 0; schedule.next(piece); ++n) {
    const int blocks = piece.narrow ? 1 : C::kConsumers;
    const uint32_t bytes = blocks * sizeof(QueryBlock<C::kHeadDim>);
    mbar_wait(&shared.q_empty, n % 2 ^ 1);
    mbar_arrive_expect_tx(&shared.q_full, C::kSinkQuery ? 2 * bytes : bytes);
    for (int block = 0; block < blocks; ++block) {
      const int row = piece.tile * C::kQueryTile + block * kQueryBlock;
      for (int panel = 0; panel < C::kHeadDim / kPanel; ++panel) {
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
  ScheduleOf<C> schedule(params, blockIdx.x, gridDim.x);
  Piece piece;
  while (schedule.next(piece)) {
    const typename C::Keys keys(params, piece.batch);
    for (int i = 0; i < piece.count; ++i) {
      const auto tile = keys.tile(piece.tile_at(i));
      visit(tile, piece.head, piece.batch, tile.is_ragged());
    }
  }
}

// One of the warpgroups that multiply. `Self`, the class that derives from this one, has
//   attend(piece)   goes through the key tiles of a piece: all, or if it is narrow this consumer's
//                   share, one in kConsumers; leaves the sums in out_ and the softmax reduced
//   scale_log2()    what turns maxima of the softmax into powers of two
//   factor(piece)   of the results
template <class C, class TensorMaps, class Self>
class BlockConsumer {
 public:
  HOPPER_DEVICE BlockConsumer(typename C::Shared& shared, const TensorMaps& maps,
                              const CachedAttentionParams& params, int group)
      : shared_(shared), maps_(maps), params_(params), group_(group), ring_(shared) {}

  HOPPER_DEVICE void run() {
    ScheduleOf<C> schedule(params_, blockIdx.x, gridDim.x);
    Piece piece;
    if (group_ == C::kConsumers - 1) pass_turn<C>(group_);  // the first consumer begins
    for (uint32_t n = 0; schedule.next(piece); ++n) {
      hopper::mbar_wait(&shared_.q_full, n % 2);
      self().attend(piece);
      ring_.finish_item(piece.count);
      finish(piece, schedule.sharers(piece));
    }
    if (group_ == 0) take_turn(group_);  // leaves no barrier half full
    finish_stores();
  }

 protected:
  // Releases tiles of the other consumers once they have been fetched, so that parities stay in
  // step. All lanes must have waited for a tile before one lets it be refilled.
  HOPPER_DEVICE void skip(int begin, int end) {
    HOPPER_UNROLL_BY(1)
    for (int i = begin; i < end; ++i) {
      ring_.wait_keys(i);
      ring_.wait_values(i);
      hopper::warp_sync();
      ring_.release_keys(i);
      ring_.release_values(i);
    }
  }

  // The place in shared.q of this consumer's block of queries.
  HOPPER_DEVICE int block_of(const Piece& piece, bool in_sink) const {
    const int block = piece.narrow ? 0 : group_;
    return C::kSinkQuery && in_sink ? C::kConsumers + block : block;
  }

  typename C::Shared& shared_;
  const TensorMaps& maps_;
  const CachedAttentionParams& params_;
  const int group_;
  KeyRing<C> ring_;
  float out_[C::kHeadDim / 2];
  OnlineSoftmax softmax_;

 private:
  HOPPER_DEVICE Self& self() { return static_cast<Self&>(*this); }

  // Adds up the parts of the query block and stores it.
  HOPPER_DEVICE void finish(const Piece& piece, const Interval& sharers) {
    using namespace hopper;
    if (piece.narrow) {
      finish_stores();  // of all: the memory is free
      bar_sync(kMerge, 128 * C::kConsumers);
      const Part<C::kHeadDim> part(reinterpret_cast<float4*>(shared_.out), shared_.stats);
      HOPPER_UNROLL_BY(1)
      for (int other = 1; other < C::kConsumers; ++other) {
        if (group_ == other) part.write(out_, softmax_);
        bar_sync(kMerge, 128 * C::kConsumers);
        if (group_ == 0) add_part<C::kHeadDim>(out_, softmax_, part, self().scale_log2());
        bar_sync(kMerge, 128 * C::kConsumers);
      }
      if (group_ != 0) return;
    }
    bool complete = piece.whole;
    if (!complete) {
      Part<C::kHeadDim>(params_, blockIdx.x, piece.starts, group_).write(out_, softmax_);
      complete = arrive_last(piece, sharers.end - sharers.begin + 1);
      if (complete) {
        add_parts<C::kHeadDim>(out_, softmax_, params_, sharers, group_, self().scale_log2());
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
          hopper::atomic_add_acq_rel(params_.arrivals + tile * C::kConsumers + group_, 1);
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
    const float factor = self().factor(piece);
    const float factors[2] = {factor / softmax_.sum[0], factor / softmax_.sum[1]};
    store_lse(softmax_, self().scale_log2(), params_.lse + head * params_.tokens,
              first + thread_row(), params_.tokens);
    scale_rows(out_, factors);
    store_rows<C>(shared_, maps_.out, out_, group_, first, piece.head, piece.batch);
  }
};

// The whole kernel, of which `Consumer` is a class that derives from BlockConsumer.
template <class C, class Consumer, class TensorMaps>
HOPPER_DEVICE void run_block(typename C::Shared& shared, const TensorMaps& maps,
                             const CachedAttentionParams& params) {
  init_barriers<C>(shared);
  const int group = hopper::shfl_idx(static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 0) {
    produce<C>(
        shared, maps, [&](const auto& visit) { visit_keys<C>(params, visit); },
        [&] { fetch_queries<C>(shared, maps, params); });
  } else {
    hopper::setmaxnreg_inc<C::kConsumerRegisters>();
    Consumer(shared, maps, params, group - 1).run();
  }
}

}  // namespace aapt
