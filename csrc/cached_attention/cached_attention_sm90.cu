// Attention from new frames to the KV cache, in place, on sm_90a (docs/method.md#3,
// docs/method.md#5).
//
// Compute-bound: 4 head_dim FLOPs per query and key, but 4 head_dim bytes per key for all 1196
// queries. So the tensor cores must never wait. One warpgroup fetches (TMA) and two multiply
// (wgmma), three at head_dim 64. They alternate: the softmax of one runs during the products of the
// others. Within a warpgroup, the scores of the next key tile are computed together with the values
// of the current one. `schedule.h` keeps every SM busy to the end.

#include "cached_attention/blocks.cuh"

namespace aapt {
namespace {

using namespace hopper;

template <int kHeadDim_, int kKeyTile_, int kStages_, bool kSinkQuery_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_, kKeyTile = kKeyTile_, kStages = kStages_;
  static constexpr bool kSinkQuery = kSinkQuery_;
  static constexpr Repair kRepair = Repair::END;  // a step's rows all see the same keys
  using Keys = VisibleKeys<kKeyTile, 1>;
  static constexpr int kConsumers = query_consumers(kHeadDim);
  static constexpr int kQueryTile = query_tile(kHeadDim);
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // Within 65536: 128 x (40 + 2 x 232) or 128 x (32 + 3 x 160)
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;

  using KeyBlock = uint16_t[kHeadDim / kPanel][kKeyTile * kPanel];

  struct Shared {
    alignas(1024) QueryBlock<kHeadDim> q[kSinkQuery ? 2 * kConsumers : kConsumers];  // then q_sink
    alignas(1024) QueryBlock<kHeadDim> out[kConsumers];  // or sums for another warpgroup
    alignas(1024) KeyBlock k[kStages];
    alignas(1024) KeyBlock v[kStages];
    float4 stats[Part<kHeadDim>::kStats];
    uint64_t q_full, q_empty;
    uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    uint64_t raw[kStages];
    uint32_t arrived[kConsumers];
  };
};

struct TensorMaps {
  TensorMap q, q_sink, k, v, out;
};

// One of the warpgroups that multiply.
template <class C>
class Consumer : public BlockConsumer<C, TensorMaps, Consumer<C>> {
  using Base = BlockConsumer<C, TensorMaps, Consumer<C>>;
  using Base::group_, Base::out_, Base::params_, Base::ring_, Base::shared_, Base::skip,
      Base::softmax_;

 public:
  using Base::Base;

  HOPPER_DEVICE void attend(const Piece& piece) {
    const typename C::Keys keys(params_, piece.batch);
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

  HOPPER_DEVICE float scale_log2() const { return params_.scale_log2; }
  HOPPER_DEVICE static float factor(const Piece&) { return 1.0f; }

 private:
  // Once the scores of tile i are there: gives back its keys, and after the last tile the queries,
  // so that the next ones arrive during the last products and the store.
  HOPPER_DEVICE void release_factors(int i, bool last) {
    ring_.release_keys(i);
    if (last) release(&shared_.q_empty);
  }

  HOPPER_DEVICE uint32_t queries(const Piece& piece, bool in_sink) const {
    return smem_u32(shared_.q[this->block_of(piece, in_sink)]);
  }
};

template <class C>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(C::kThreads, 1)
    cached_attention_kernel(HOPPER_GRID_CONSTANT const TensorMaps maps,
                            HOPPER_GRID_CONSTANT const CachedAttentionParams params) {
  HOPPER_SHARED(memory);
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  if (threadIdx.x == 0) prefetch(maps.q, maps.k, maps.v, maps.out);
  run_block<C, Consumer<C>>(shared, maps, params);
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
