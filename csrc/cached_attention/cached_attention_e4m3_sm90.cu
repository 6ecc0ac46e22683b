// Attention from new frames to a KV cache of E4M3 on sm_90a (docs/method.md#16).
//
// As the kernel for BF16, with products that take half the time. A consumer rounds its block of
// queries once per piece of work. The tensor core adds with about 13 fraction bits, so the sums of
// every key tile are promoted to float32, in the multiply-add that also rescales the older ones:
// no rescale is worth skipping. Registers hold the older sums, those of a tile and the scores of
// the next one, and nothing more: so the consumer finds the maximum during the products, promotes,
// and turns scores into weights in the registers of the sums.

#include "cached_attention/blocks.cuh"
#include "cached_attention/e4m3.cuh"

namespace aapt {
namespace {

using namespace hopper;

template <int kStages_, bool kSinkQuery_>
struct Config {
  static constexpr int kHeadDim = kTileRow, kKeyTile = kTileRow, kStages = kStages_;
  static constexpr bool kSinkQuery = kSinkQuery_;
  static constexpr Repair kRepair = Repair::COLUMNS;
  using Keys = VisibleKeys<kKeyTile, kKeyGroup>;
  static constexpr int kConsumers = query_consumers(kHeadDim);
  static constexpr int kQueryTile = query_tile(kHeadDim);
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

  struct Shared {
    alignas(1024) QueryBlock<kHeadDim> q[kSinkQuery ? 2 * kConsumers : kConsumers];  // then q_sink
    alignas(1024) QueryBlock<kHeadDim> out[kConsumers];  // or sums for another warpgroup
    alignas(1024) E4m3Block rounded[kConsumers][kSinkQuery ? 2 : 1];  // q, q_sink
    alignas(1024) E4m3Keys k[kStages];
    alignas(1024) E4m3Values v[kStages];
    float4 stats[Part<kHeadDim>::kStats];
    uint64_t q_full, q_empty;
    uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    uint64_t raw[kStages];
    uint32_t arrived[kConsumers];
  };
};

struct TensorMaps {
  TensorMap q, q_sink, v, out;
  KeyMap k;
};

// One of the warpgroups that multiply.
template <class C>
class Consumer : public BlockConsumer<C, TensorMaps, Consumer<C>> {
  using Base = BlockConsumer<C, TensorMaps, Consumer<C>>;
  using Base::group_, Base::out_, Base::params_, Base::ring_, Base::shared_, Base::skip,
      Base::softmax_;
  using Tile = typename C::Keys::Tile;

 public:
  using Base::Base;

  HOPPER_DEVICE void attend(const Piece& piece) {
    const typename C::Keys keys(params_, piece.batch);
    const int stride = piece.narrow ? C::kConsumers : 1, first = piece.narrow ? group_ : 0;
    // All consumers take equally many turns, even if one has a tile less
    const int turns = (piece.count + stride - 1) / stride;
    float scores[C::kKeyTile / 2], sums[C::kHeadDim / 2], rescale[2];
    uint32_t p[C::kKeyTile / kE4m3Depth][4];

    softmax_ = OnlineSoftmax();
    HOPPER_UNROLL
    for (int i = 0; i < C::kHeadDim / 2; ++i) out_[i] = 0.0f;
    take_queries(piece);

    skip(0, first < piece.count ? first : piece.count);
    Tile tile = keys.tile(piece.tile_at(first));
    if (first < piece.count) {
      ring_.wait_keys(first);
      reg_fence(scores);
      wgmma_fence();
      multiply_qk(scores, queries(tile), ring_.keys(first));
      wgmma_commit();
      wgmma_wait<0>();
      reg_fence(scores);
      ring_.release_keys(first);
      see(tile, scores, rescale);
      weigh(tile, scores, rescale, p);
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
      multiply_qk(scores, queries(tile), ring_.keys(i));
      wgmma_commit();
      reg_fence(sums);
      wgmma_fence();
      multiply_pv(sums, p, ring_.values(before));
      wgmma_commit();
      pass_turn<C>(group_);
      wgmma_wait<1>();
      reg_fence(scores);
      ring_.release_keys(i);
      float next[2];
      see(tile, scores, next);
      settle(bits_from_float(next[0]) | bits_from_float(next[1]), &shared_.q_full);
      wgmma_wait<0>();
      reg_fence(sums);
      ring_.release_values(before);
      promote(sums, rescale);
      rescale[0] = next[0];
      rescale[1] = next[1];
      weigh(tile, scores, rescale, p);
    }
    if (first < piece.count) {
      const int last = first + (piece.count - 1 - first) / stride * stride;
      ring_.wait_values(last);
      reg_fence(sums);
      wgmma_fence();
      multiply_pv(sums, p, ring_.values(last));
      wgmma_commit();
      wgmma_wait<0>();
      reg_fence(sums);
      ring_.release_values(last);
      promote(sums, rescale);
      if (piece.narrow) skip(last + 1, piece.count);
    }
    softmax_.reduce();
  }

  HOPPER_DEVICE static float scale_log2() { return 1.0f; }  // the maxima are powers of two

  HOPPER_DEVICE float factor(const Piece& piece) const {
    return load_readonly(params_.v_scale + piece.head);
  }

 private:
  // What turns scores into powers of two, for either row of this thread.
  struct Scales {
    float of_row[2];
  };

  // Rounds this consumer's queries, and gives back the block that TMA has written.
  HOPPER_DEVICE void take_queries(const Piece& piece) {
    const float factor = params_.scale_log2 * load_readonly(params_.k_scale + piece.head);
    HOPPER_UNROLL
    for (int i = 0; i < kQueries; ++i) {
      round_queries(shared_.q[this->block_of(piece, i == 1)], shared_.rounded[group_][i],
                    scales_[i].of_row);
      scales_[i].of_row[0] *= factor;
      scales_[i].of_row[1] *= factor;
    }
    fence_proxy_async();
    sync_group(group_);
    release(&shared_.q_empty);
  }

  HOPPER_DEVICE uint32_t queries(const Tile& tile) const {
    return smem_u32(&shared_.rounded[group_][C::kSinkQuery && tile.in_sink]);
  }

  HOPPER_DEVICE Scales scales(const Tile& tile) const {
    return C::kSinkQuery && tile.in_sink ? scales_[kQueries - 1] : scales_[0];
  }

  // Hides scores of a tile, and finds their maximum.
  HOPPER_DEVICE void see(const Tile& tile, float (&scores)[C::kKeyTile / 2], float (&rescale)[2]) {
    hide_keys(scores, tile.hidden(), tile.visible());
    raise_maximum(softmax_, scores, rescale, scales(tile).of_row);
  }

  // Turns scores into weights.
  HOPPER_DEVICE void weigh(const Tile& tile, float (&scores)[C::kKeyTile / 2],
                           const float (&rescale)[2], uint32_t (&p)[C::kKeyTile / kE4m3Depth][4]) {
    add_weights(softmax_, scores, rescale, scales(tile).of_row);
    pack_weights(scores, p);
  }

  // Adds the sums of one tile, relative to its maximum, to those before, relative to an older one.
  HOPPER_DEVICE void promote(const float (&sums)[C::kHeadDim / 2], const float (&rescale)[2]) {
    HOPPER_UNROLL
    for (int i = 0; i < C::kHeadDim / 2; ++i) out_[i] = out_[i] * rescale[i / 2 % 2] + sums[i];
  }

  static constexpr int kQueries = C::kSinkQuery ? 2 : 1;
  Scales scales_[kQueries];
};

template <class C>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(C::kThreads, 1)
    cached_attention_e4m3_kernel(HOPPER_GRID_CONSTANT const TensorMaps maps,
                                 HOPPER_GRID_CONSTANT const CachedAttentionParams params) {
  HOPPER_SHARED(memory);
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  if (threadIdx.x == 0) prefetch(maps.q, maps.k.map, maps.v, maps.out);
  run_block<C, Consumer<C>>(shared, maps, params);
}

const char* make_key_map(KeyMap* keys, const CachedAttentionBuffers& buffers) {
  keys->groups = buffers.key_groups;
  const uint64_t token = buffers.k.token_stride;
  const uint64_t dims[] = {kTileRow, 2, 4, 2, static_cast<uint64_t>(keys->groups.groups)};
  const uint64_t strides[] = {token, 4 * token, 2 * token, kKeyGroup * token};
  const uint32_t box[] = {kTileRow, 2, 4, 2, kTileRow / kKeyGroup};
  return make_tensor_map(&keys->map, buffers.k.data, 1, 5, dims, strides, box, SW_128);
}

const char* make_value_map(TensorMap* map, const CachedAttentionParams& params,
                           const CachedAttentionBuffers& buffers) {
  const RowBuffer& v = buffers.v;
  const uint64_t dims[] = {static_cast<uint64_t>(v.tokens), kTileRow,
                           static_cast<uint64_t>(params.heads),
                           static_cast<uint64_t>(params.batch)};
  const uint64_t strides[] = {buffers.v_column_stride, v.head_stride, v.batch_stride};
  const uint32_t box[] = {kTileRow, kTileRow, 1, 1};
  return make_tensor_map(map, v.data, 1, 4, dims, strides, box, SW_128);
}

template <class C>
const char* launch(const CachedAttentionParams& params, const CachedAttentionBuffers& buffers,
                   int ctas, void* stream) {
  TensorMaps maps{};
  MapMaker make_map(params);
  make_map(&maps.q, buffers.q, kQueryBlock);
  if (C::kSinkQuery) make_map(&maps.q_sink, buffers.q_sink, kQueryBlock);
  make_map(&maps.out, buffers.out, kQueryBlock);
  if (make_map.error) return make_map.error;
  if (const char* error = make_key_map(&maps.k, buffers)) return error;
  if (const char* error = make_value_map(&maps.v, params, buffers)) return error;
  return HOPPER_LAUNCH(cached_attention_e4m3_kernel<C>, dim3(ctas), dim3(C::kThreads),
                       sizeof(typename C::Shared), stream, maps, params);
}

}  // namespace

const char* launch_cached_attention_e4m3_sm90(const CachedAttentionParams& params,
                                              const CachedAttentionBuffers& buffers, int ctas,
                                              void* stream) {
  // 227 KB of shared memory hold this many stages
  return params.pinned_rotation ? launch<Config<3, true>>(params, buffers, ctas, stream)
                                : launch<Config<4, false>>(params, buffers, ctas, stream);
}

}  // namespace aapt
