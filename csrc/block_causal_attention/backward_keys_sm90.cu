// Block-causal attention backward on sm_90a: dk and dv, and the sums of dq (docs/method.md#3).
//
// A CTA keeps 128 keys and their gradients, 64 per warpgroup, and goes through the query tiles that
// see the keys. Scores are transposed, keys by query rows: in the registers where a product leaves
// the scores, they are the left factors of dv and dk. Only for dq do the warpgroups exchange scores
// through shared memory. Each then multiplies one half of dq over all 128 keys, and adds it to
// global memory by a bulk reduction. Only the order of these reductions varies from run to run.

#include "attention/consumer.cuh"
#include "attention/maps.cuh"
#include "attention/products.cuh"
#include "block_causal_attention/backward.h"
#include "block_causal_attention/hide.cuh"
#include "block_causal_attention/mask.h"
#include "block_causal_attention/schedule.h"
#include "block_causal_attention/sums.h"
#include "hopper/hopper.cuh"

namespace aapt::block_causal {
namespace {

using namespace hopper;

// A tile of keys and the work on it. The fetching thread computes it and stores it in shared
// memory, because the consumers have no registers to spare.
struct Work {
  bool is_end;  // after the last tile; nothing else is set
  int batch, head;
  KeyTile keys;
  Interval rows, clean;  // tiles of query rows, see VisibleRows
  bool takes_gradient;   // else its dk and dv are zero

  HOPPER_DEVICE bool is_empty() const { return rows.begin == rows.end; }
};

// kAddsQueries: this kernel sums dq; if not, backward_queries_sm90.cu computes dq.
template <int kHeadDim_, bool kAddsQueries_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kAddsQueries = kAddsQueries_;
  static constexpr int kPanels = kHeadDim / kPanel, kStages = 2;
  using Sums = QuerySums<kHeadDim>;
  static constexpr int kRows = Sums::kRows;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // Within 65536: 128 x (24 + 2 x 240)
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  using KeyBlock = uint16_t[kPanels][64 * kPanel];
  using RowBlock = uint16_t[kPanels][kRows * kPanel];

  struct Shared {
    alignas(1024) KeyBlock k[kConsumers];
    alignas(1024) KeyBlock v[kConsumers];
    alignas(1024) RowBlock q[kStages];
    alignas(1024) RowBlock dout[kStages];
    // Keys by query rows, 64 query rows per panel; two copies, so that one barrier per query tile
    // is enough
    alignas(1024) uint16_t ds[2][Sums::kRowPanels][kKeyTile * kPanel];
    alignas(1024) float dq[kConsumers][Sums::kHalf];
    alignas(16) float lse[kStages][kRows];
    alignas(16) float delta[kStages][kRows];
    Work work[2];  // two, because results of the one before may not be stored yet
    uint64_t keys_full, keys_empty;
    uint64_t q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
  };
};

// Named barriers; 0 is __syncthreads.
enum Barrier { kScores = 1, kGroup };

struct TensorMaps {
  TensorMap q, q_sink, k, v, dout;
};

// The end of the keys of frames before the query's.
HOPPER_DEVICE int prefix_end(const FrameMask& mask) {
  return mask.text_tokens + mask.frames_before * mask.tokens_per_frame;
}

// Earlier keys are seen by more rows: the first tile is the longest.
HOPPER_DEVICE Schedule schedule_of(const Params& params) {
  return Schedule(params.regions.tiles, params.batch, params.heads, blockIdx.x, gridDim.x);
}

template <class C>
HOPPER_DEVICE void find_work(Work& work, const Params& params, const Backward& backward,
                             const Item& item) {
  const KeyTile keys = key_tile(params.mask, params.regions, item.rank);
  const VisibleRows<C::kRows> rows(params.mask, item.batch, keys);
  work.batch = item.batch;
  work.head = item.head;
  work.keys = keys;
  work.takes_gradient = backward.prefix_grad || keys.row < params.mask.text_tokens ||
                        keys.end > prefix_end(params.mask);
  work.rows = C::kAddsQueries || work.takes_gradient ? rows.tiles : Interval{0, 0};
  work.clean = rows.clean;
}

template <class C>
HOPPER_DEVICE void fetch(typename C::Shared& shared, const TensorMaps& maps, const Params& params,
                         const Backward& backward) {
  Schedule schedule = schedule_of(params);
  Item item;
  uint32_t n = 0, key_tiles = 0;
  for (bool more = true; more; ++key_tiles) {
    more = schedule.next(item);
    mbar_wait(&shared.keys_empty, key_tiles % 2 ^ 1);
    Work& work = shared.work[key_tiles % 2];
    work.is_end = !more;
    if (more) find_work<C>(work, params, backward, item);
    if (!more || work.is_empty()) {
      mbar_arrive(&shared.keys_full);
      continue;
    }
    mbar_arrive_expect_tx(&shared.keys_full, sizeof(shared.k) + sizeof(shared.v));
    for (int block = 0; block < kConsumers; ++block) {
      for (int panel = 0; panel < C::kPanels; ++panel) {
        const int row = work.keys.row + 64 * block;
        tma_load_4d(shared.k[block][panel], &maps.k, &shared.keys_full, panel * kPanel, row,
                    item.head, item.batch);
        tma_load_4d(shared.v[block][panel], &maps.v, &shared.keys_full, panel * kPanel, row,
                    item.head, item.batch);
      }
    }
    const int64_t pair = static_cast<int64_t>(item.batch) * params.heads + item.head;
    for (int tile = work.rows.begin; tile < work.rows.end; ++tile, ++n) {
      const Stage<C::kStages> at(n);
      const int stage = at.index, row = tile * C::kRows;
      constexpr uint32_t kStats = C::kRows * sizeof(float);
      const int64_t stats = pair * backward.padded_rows + row;

      mbar_wait(&shared.q_empty[stage], at.parity ^ 1);
      mbar_arrive_expect_tx(&shared.q_full[stage], sizeof(typename C::RowBlock) + kStats);
      for (int panel = 0; panel < C::kPanels; ++panel) {
        if (work.keys.in_sink) {  // q_sink has no text: rows before it give zeros
          tma_load_4d(shared.q[stage][panel], &maps.q_sink, &shared.q_full[stage], panel * kPanel,
                      row - params.mask.text_tokens, item.head, item.batch);
        } else {
          tma_load_4d(shared.q[stage][panel], &maps.q, &shared.q_full[stage], panel * kPanel, row,
                      item.head, item.batch);
        }
      }
      bulk_load(shared.lse[stage], backward.row_lse + stats, kStats, &shared.q_full[stage]);

      mbar_wait(&shared.dout_empty[stage], at.parity ^ 1);
      mbar_arrive_expect_tx(&shared.dout_full[stage], sizeof(typename C::RowBlock) + kStats);
      for (int panel = 0; panel < C::kPanels; ++panel) {
        tma_load_4d(shared.dout[stage][panel], &maps.dout, &shared.dout_full[stage], panel * kPanel,
                    row, item.head, item.batch);
      }
      bulk_load(shared.delta[stage], backward.row_delta + stats, kStats, &shared.dout_full[stage]);
    }
  }
}

// One of the two warpgroups that multiply: 64 of the keys.
template <class C>
class Consumer {
 public:
  HOPPER_DEVICE Consumer(typename C::Shared& shared, const Params& params, const Backward& backward,
                         int group)
      : shared_(shared), params_(params), backward_(backward), group_(group) {}

  HOPPER_DEVICE void run() {
    for (uint32_t key_tiles = 0;; ++key_tiles) {
      mbar_wait(&shared_.keys_full, key_tiles % 2);
      const Work& work = shared_.work[key_tiles % 2];
      if (work.is_end) break;
      HOPPER_UNROLL
      for (int i = 0; i < C::kHeadDim / 2; ++i) dk_[i] = dv_[i] = 0.0f;
      if (work.takes_gradient) {
        attend<true>(work);
      } else if constexpr (C::kAddsQueries) {
        attend<false>(work);
      }
      release(&shared_.keys_empty);
      store(work);
    }
    // The last sums are still being read
    if (is_leader()) tma_store_wait_read<0>();
  }

 private:
  template <bool kTakesGradient>
  HOPPER_DEVICE void attend(const Work& work) {
    const uint32_t keys = smem_u32(shared_.k[group_]), values = smem_u32(shared_.v[group_]);
    float scores[C::kRows / 2], ds[C::kRows / 2], dq[kPanel / 2];
    uint32_t p_factor[C::kRows / kMmaDepth][4], ds_factor[C::kRows / kMmaDepth][4];

    for (int tile = work.rows.begin; tile < work.rows.end; ++tile, ++n_) {
      const Stage<C::kStages> at(n_);
      const int stage = at.index;
      const uint32_t queries = smem_u32(shared_.q[stage]), dout = smem_u32(shared_.dout[stage]);

      mbar_wait(&shared_.q_full[stage], at.parity);
      reg_fence(scores);
      wgmma_fence();
      multiply_qk<C::kHeadDim, C::kRows>(scores, keys, queries);
      wgmma_commit();
      mbar_wait(&shared_.dout_full[stage], at.parity);
      reg_fence(ds);
      wgmma_fence();
      multiply_qk<C::kHeadDim, C::kRows>(ds, values, dout);
      wgmma_commit();

      wgmma_wait<1>();
      reg_fence(scores);
      if (tile < work.clean.begin || tile >= work.clean.end) hide(scores, work, tile * C::kRows);
      weigh(scores, shared_.lse[stage]);
      wgmma_wait<0>();
      reg_fence(ds);
      differentiate(ds, scores, shared_.delta[stage]);
      pack_factor<C::kRows>(ds, ds_factor);
      if constexpr (C::kAddsQueries) share(ds_factor, shared_.ds[n_ % 2]);
      if constexpr (kTakesGradient) {
        pack_factor<C::kRows>(scores, p_factor);
        reg_fence(dv_);
        wgmma_fence();
        multiply_pv<C::kHeadDim, C::kRows>(dv_, p_factor, dout);
        wgmma_commit();
        reg_fence(dk_);
        wgmma_fence();
        multiply_pv<C::kHeadDim, C::kRows>(dk_, ds_factor, queries);
        wgmma_commit();
      }
      if constexpr (kTakesGradient) {
        wgmma_wait<1>();
        reg_fence(dv_);
      }
      release(&shared_.dout_empty[stage]);
      if constexpr (C::kAddsQueries) {
        // The sums of the tile before have been read, and all scores of this tile are shared
        if (is_leader()) tma_store_wait_read<0>();
        bar_sync(kScores, 128 * kConsumers);
        reg_fence(dq);
        wgmma_fence();
        multiply_transposed<kKeyTile>(dq, smem_u32(shared_.ds[n_ % 2][C::Sums::row(group_) / 64]),
                                      smem_u32(shared_.k[0][C::Sums::column(group_) / kPanel]),
                                      sizeof(shared_.k[0]));
        wgmma_commit();
      }
      if constexpr (kTakesGradient) {
        wgmma_wait<C::kAddsQueries ? 1 : 0>();
        reg_fence(dk_);
      }
      release(&shared_.q_empty[stage]);
      if constexpr (C::kAddsQueries) {
        wgmma_wait<0>();
        reg_fence(dq);
        add(dq, work, tile);
      }
    }
  }

  HOPPER_DEVICE void hide(float (&scores)[C::kRows / 2], const Work& work, int row) {
    const int text = text_length(params_.mask, work.batch);
    Interval seen_by[2];
    HOPPER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int key = work.keys.row + group_ * 64 + thread_row() + 8 * half;
      seen_by[half] = {0, 0};
      if (key < work.keys.end) seen_by[half] = rows_that_see(params_.mask, text, key);
    }
    hide_rows<C::kRows>(scores, seen_by, row);
  }

  // exp(score - lse), in place. Columns are query rows.
  HOPPER_DEVICE void weigh(float (&scores)[C::kRows / 2], const float (&lse)[C::kRows]) {
    HOPPER_UNROLL
    for (int i = 0; i < C::kRows / 8; ++i) {
      const float2 offset = reinterpret_cast<const float2*>(lse)[4 * i + threadIdx.x % 4];
      HOPPER_UNROLL
      for (int j = 0; j < 4; ++j) {
        scores[4 * i + j] = exp2_approx(scores[4 * i + j] * params_.scale_log2 -
                                        (j % 2 == 0 ? offset.x : offset.y));
      }
    }
  }

  // p (dp - delta), in place of dp.
  HOPPER_DEVICE void differentiate(float (&ds)[C::kRows / 2], const float (&p)[C::kRows / 2],
                                   const float (&delta)[C::kRows]) {
    HOPPER_UNROLL
    for (int i = 0; i < C::kRows / 8; ++i) {
      const float2 offset = reinterpret_cast<const float2*>(delta)[4 * i + threadIdx.x % 4];
      HOPPER_UNROLL
      for (int j = 0; j < 4; ++j) {
        ds[4 * i + j] = p[4 * i + j] * (ds[4 * i + j] - (j % 2 == 0 ? offset.x : offset.y));
      }
    }
  }

  // Stores the scores of this warpgroup's keys for both warpgroups to read.
  HOPPER_DEVICE void share(const uint32_t (&ds)[C::kRows / kMmaDepth][4],
                           uint16_t (&panels)[C::Sums::kRowPanels][kKeyTile * kPanel]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const uint32_t row = group_ * 64 + warp * 16 + lane % 16, half_columns = lane / 16 * 16;
    HOPPER_UNROLL
    for (int i = 0; i < C::kRows / kMmaDepth; ++i) {
      auto* panel = reinterpret_cast<uint8_t*>(panels[i / 4]);
      stmatrix_x4(panel + sw128(row, i % 4 * 32 + half_columns), ds[i][0], ds[i][1], ds[i][2],
                  ds[i][3]);
    }
    fence_proxy_async();
  }

  HOPPER_DEVICE void add(const float (&dq)[kPanel / 2], const Work& work, int tile) {
    auto* own = reinterpret_cast<float4*>(shared_.dq[group_]);
    HOPPER_UNROLL
    for (int i = 0; i < kPanel / 8; ++i) {
      own[i * 128 + threadIdx.x % 128] = {dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]};
    }
    fence_proxy_async();
    bar_sync(kGroup + group_, 128);
    if (is_leader()) {
      float* sums = C::Sums::half(params_, backward_.dq_sums, work.keys.in_sink, work.batch,
                                  work.head, tile, group_);
      bulk_reduce_add_f32(sums, shared_.dq[group_], sizeof(shared_.dq[group_]));
      tma_store_commit();
    }
  }

  // Stores row by row, because a tile may end among the keys of another CTA.
  HOPPER_DEVICE void store(const Work& work) {
    const FrameMask& mask = params_.mask;
    HOPPER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int key = work.keys.row + group_ * 64 + thread_row() + 8 * half;
      if (key >= work.keys.end) continue;
      const bool zero = !backward_.prefix_grad && key >= mask.text_tokens && key < prefix_end(mask);
      const float dk_scale = zero ? 0.0f : params_.scale, dv_scale = zero ? 0.0f : 1.0f;
      const int64_t row = static_cast<int64_t>(work.batch) * mask.key_rows + key;
      const int64_t at = (row * params_.heads + work.head) * C::kHeadDim + threadIdx.x % 4 * 2;
      HOPPER_UNROLL
      for (int i = 0; i < C::kHeadDim / 8; ++i) {
        const auto pair = [&](const float (&x)[C::kHeadDim / 2], float scale) {
          return pack_bf16(x[4 * i + 2 * half] * scale, x[4 * i + 2 * half + 1] * scale);
        };
        *reinterpret_cast<uint32_t*>(backward_.dk + at + 8 * i) = pair(dk_, dk_scale);
        *reinterpret_cast<uint32_t*>(backward_.dv + at + 8 * i) = pair(dv_, dv_scale);
      }
    }
  }

  HOPPER_DEVICE static bool is_leader() { return threadIdx.x % 128 == 0; }
  // Gives a buffer back once all lanes of the warp have read it.
  HOPPER_DEVICE void release(uint64_t* empty) {
    warp_sync();
    if (threadIdx.x % 32 == 0) mbar_arrive(empty);
  }

  typename C::Shared& shared_;
  const Params& params_;
  const Backward& backward_;
  const int group_;
  uint32_t n_ = 0;  // query tiles so far
  float dk_[C::kHeadDim / 2], dv_[C::kHeadDim / 2];
};

template <class C>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(C::kThreads, 1)
    block_causal_backward_kernel(HOPPER_GRID_CONSTANT const TensorMaps maps,
                                 HOPPER_GRID_CONSTANT const Params params,
                                 HOPPER_GRID_CONSTANT const Backward backward) {
  HOPPER_SHARED(memory);
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  if (threadIdx.x == 0) {
    mbar_init(&shared.keys_full, 1);
    mbar_init(&shared.keys_empty, 4 * kConsumers);
    for (int i = 0; i < C::kStages; ++i) {
      mbar_init(&shared.q_full[i], 1);
      mbar_init(&shared.dout_full[i], 1);
      mbar_init(&shared.q_empty[i], 4 * kConsumers);
      mbar_init(&shared.dout_empty[i], 4 * kConsumers);
    }
    fence_barrier_init();
  }
  cta_sync();

  const int group = shfl_idx(static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 0) {
    setmaxnreg_dec<C::kProducerRegisters>();
    const int warp = shfl_idx(static_cast<int>(threadIdx.x) / 32, 0);
    if (warp == 0 && elect_one()) fetch<C>(shared, maps, params, backward);
  } else {
    setmaxnreg_inc<C::kConsumerRegisters>();
    Consumer<C>(shared, params, backward, group - 1).run();
  }
}

template <class C>
const char* launch(const Params& params, const Backward& backward, const BackwardBuffers& buffers,
                   int ctas, void* stream) {
  TensorMaps maps{};
  MapMaker make_map(params);
  const Buffers& forward = buffers.forward;
  make_map(&maps.q, forward.q, C::kRows);
  if (params.pinned_rotation) make_map(&maps.q_sink, forward.q_sink, C::kRows);
  make_map(&maps.k, forward.k, 64);
  make_map(&maps.v, forward.v, 64);
  make_map(&maps.dout, buffers.dout, C::kRows);
  if (make_map.error) return make_map.error;
  return HOPPER_LAUNCH(block_causal_backward_kernel<C>, dim3(ctas), dim3(C::kThreads),
                       sizeof(typename C::Shared), stream, maps, params, backward);
}

}  // namespace

const char* launch_backward_sm90(const Params& params, const Backward& backward,
                                 const BackwardBuffers& buffers, int ctas, void* stream) {
  const auto run = [&](auto kernel) { return kernel(params, backward, buffers, ctas, stream); };
  const char* error = launch_rows(params, backward, buffers, stream);
  if (error) return error;
  if (backward.dq_sums != nullptr) {
    error = params.head_dim == 64 ? run(launch<Config<64, true>>) : run(launch<Config<128, true>>);
    return error ? error : launch_convert(params, backward, stream);
  }
  error = params.head_dim == 64 ? run(launch<Config<64, false>>) : run(launch<Config<128, false>>);
  return error ? error : launch_dq(params, backward, buffers, ctas, stream);
}

}  // namespace aapt::block_causal
