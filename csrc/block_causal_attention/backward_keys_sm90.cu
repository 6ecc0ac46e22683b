// Block-causal attention backward on sm_90a: dk and dv, and the sums of dq (docs/method.md#3).
//
// A CTA keeps 128 keys and their gradients, 64 per warpgroup, and goes through the query tiles that
// see the keys. Scores are transposed, keys by query rows: in the registers where a product leaves
// the scores, they are the left factors of dv and dk. Only for dq do the warpgroups exchange scores
// through shared memory. Each then multiplies one half of dq, transposed, over all 128 keys. A
// thread of the fetching warpgroup adds both halves to global memory by a bulk reduction, during
// the product of dk. Only the order of these reductions varies from run to run.

#include "attention/consumer.cuh"
#include "attention/finite.cuh"
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
  static constexpr int kConsumers = kBackwardConsumers;
  static constexpr int kPanels = kHeadDim / kPanel, kStages = 2;
  using Sums = QuerySums<kHeadDim>;
  static constexpr int kRows = Sums::kRows;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // Within 65536: 128 x (24 + 2 x 240). With 232, products of 80 rows find no registers.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  using KeyBlock = uint16_t[kPanels][64 * kPanel];
  using RowBlock = uint16_t[kPanels][kRows * kPanel];

  struct Shared {
    alignas(1024) KeyBlock k[kConsumers];
    alignas(1024) KeyBlock v[kConsumers];
    alignas(1024) RowBlock q[kStages];
    alignas(1024) RowBlock dout[kStages];
    // Keys by query rows; two copies, so that one barrier per query tile is enough
    alignas(1024) uint16_t ds[2][kRows / Sums::kRowPanel][kKeyTile * Sums::kRowPanel];
    alignas(1024) float dq[kConsumers][Sums::kHalf];
    alignas(16) float lse[kStages][kRows];
    alignas(16) float delta[kStages][kRows];
    int edge_row[kStages];  // first row of a query tile at an edge of the mask; else negative
    Interval seen_by[kKeyTile];
    Work work[2];  // two, because results of the one before may not be stored yet
    uint64_t work_full, keys_full, keys_empty, dq_full, dq_empty;
    uint64_t q_full[kStages], q_empty[kStages], dout_full[kStages], dout_empty[kStages];
    uint64_t raw[kStages];  // of query tiles to be repaired
  };
};

constexpr int kScores = kOwnBarriers;  // a named barrier

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

// Finds the work of every key tile, and fetches its keys and values.
template <class C>
HOPPER_DEVICE void fetch_keys(typename C::Shared& shared, const TensorMaps& maps,
                              const Params& params, const Backward& backward) {
  Schedule schedule = schedule_of(params);
  Item item;
  uint32_t key_tiles = 0;
  for (bool more = true; more; ++key_tiles) {
    more = schedule.next(item);
    mbar_wait(&shared.keys_empty, key_tiles % 2 ^ 1);
    Work& work = shared.work[key_tiles % 2];
    work.is_end = !more;
    if (more) find_work<C>(work, params, backward, item);
    mbar_arrive(&shared.work_full);
    if (!more || work.is_empty()) {
      mbar_arrive(&shared.keys_full);
      continue;
    }
    mbar_arrive_expect_tx(&shared.keys_full, sizeof(shared.k) + sizeof(shared.v));
    for (int block = 0; block < C::kConsumers; ++block) {
      for (int panel = 0; panel < C::kPanels; ++panel) {
        const int row = work.keys.row + 64 * block;
        tma_load_4d(shared.k[block][panel], &maps.k, &shared.keys_full, panel * kPanel, row,
                    item.head, item.batch);
        tma_load_4d(shared.v[block][panel], &maps.v, &shared.keys_full, panel * kPanel, row,
                    item.head, item.batch);
      }
    }
  }
}

// Fetches the query tiles that see each key tile.
template <class C>
HOPPER_DEVICE void fetch_queries(typename C::Shared& shared, const TensorMaps& maps,
                                 const Params& params, const Backward& backward) {
  uint32_t n = 0;
  for (uint32_t key_tiles = 0;; ++key_tiles) {
    mbar_wait(&shared.work_full, key_tiles % 2);
    const Work& work = shared.work[key_tiles % 2];
    if (work.is_end) break;
    mbar_arrive(&shared.keys_empty);
    for (int tile = work.rows.begin; tile < work.rows.end; ++tile, ++n) {
      const Stage<C::kStages> at(n);
      const int stage = at.index, row = tile * C::kRows;
      constexpr uint32_t kStats = C::kRows * sizeof(float);
      const int64_t stats =
          static_cast<int64_t>(work.batch * params.heads + work.head) * backward.padded_rows + row;
      const bool clean = work.clean.contains(tile);

      mbar_wait(&shared.q_empty[stage], at.parity ^ 1);
      shared.edge_row[stage] = clean ? -1 : row;
      uint64_t* q_full = clean ? &shared.q_full[stage] : &shared.raw[stage];
      mbar_arrive_expect_tx(q_full, sizeof(typename C::RowBlock) + kStats);
      for (int panel = 0; panel < C::kPanels; ++panel) {
        if (work.keys.in_sink) {  // q_sink has no text: rows before it give zeros
          tma_load_4d(shared.q[stage][panel], &maps.q_sink, q_full, panel * kPanel,
                      row - params.mask.text_tokens, work.head, work.batch, CacheHint::EVICT_LAST);
        } else {
          tma_load_4d(shared.q[stage][panel], &maps.q, q_full, panel * kPanel, row, work.head,
                      work.batch, CacheHint::EVICT_LAST);
        }
      }
      bulk_load(shared.lse[stage], backward.row_lse + stats, kStats, q_full);

      mbar_wait(&shared.dout_empty[stage], at.parity ^ 1);
      uint64_t* dout_full = clean ? &shared.dout_full[stage] : &shared.raw[stage];
      mbar_arrive_expect_tx(dout_full, sizeof(typename C::RowBlock) + kStats);
      for (int panel = 0; panel < C::kPanels; ++panel) {
        tma_load_4d(shared.dout[stage][panel], &maps.dout, dout_full, panel * kPanel, row,
                    work.head, work.batch, CacheHint::EVICT_LAST);
      }
      bulk_load(shared.delta[stage], backward.row_delta + stats, kStats, dout_full);
    }
  }
}

// Repairs query tiles at an edge of the mask, where a key may be hidden from a row. A row whose lse
// or delta is not finite holds NaN or infinity, or sees some. It becomes zero and gets statistics
// that make its weight infinite, and its ds NaN, at keys that it sees, and both zero at all others.
// Called by one whole warp.
template <class C>
HOPPER_DEVICE void repair_queries(typename C::Shared& shared) {
  constexpr float kInfiniteWeight = -3e38f;  // exp2(0 + 3e38); an infinite lse would not hide -inf
  uint32_t n = 0, parities = 0;              // of the next raw tile in each stage
  for (uint32_t key_tiles = 0;; ++key_tiles) {
    mbar_wait(&shared.work_full, key_tiles % 2);
    const Work& work = shared.work[key_tiles % 2];
    if (work.is_end) break;
    const Interval rows = work.rows, clean = work.clean;
    warp_sync();
    release(&shared.keys_empty);
    for (int tile = rows.begin; tile < rows.end; ++tile, ++n) {
      if (clean.contains(tile)) continue;
      const int stage = Stage<C::kStages>(n).index;
      mbar_wait(&shared.raw[stage], parities >> stage & 1);
      parities ^= 1u << stage;
      HOPPER_UNROLL_BY(1)
      for (int row = threadIdx.x % 32; row < C::kRows; row += 32) {
        float &lse = shared.lse[stage][row], &delta = shared.delta[stage][row];
        if (fabsf(lse) < INFINITY && fabsf(delta) < INFINITY) continue;
        lse = kInfiniteWeight;
        delta = 0.0f;
        zero_row(shared.q[stage], row);
        zero_row(shared.dout[stage], row);
      }
      fence_proxy_async();
      warp_sync();
      release(&shared.q_full[stage]);
      release(&shared.dout_full[stage]);
    }
  }
}

// Adds the sums of dq of every query tile to global memory, once both consumers have written
// theirs.
template <class C>
HOPPER_DEVICE void add_sums(typename C::Shared& shared, const Params& params,
                            const Backward& backward) {
  uint32_t n = 0;
  for (uint32_t key_tiles = 0;; ++key_tiles) {
    mbar_wait(&shared.work_full, key_tiles % 2);
    const Work& work = shared.work[key_tiles % 2];
    if (work.is_end) break;
    int tiles = work.rows.end - work.rows.begin;
    float* sums = C::Sums::half(params, backward.dq_sums, work.keys.in_sink, work.batch, work.head,
                                work.rows.begin, 0);
    mbar_arrive(&shared.keys_empty);
    for (; tiles > 0; --tiles, ++n, sums += C::Sums::kTile) {
      mbar_wait(&shared.dq_full, n % 2);
      bulk_reduce_add_f32(sums, shared.dq[0], sizeof(shared.dq));
      tma_store_commit();
      tma_store_wait_read<0>();
      mbar_arrive(&shared.dq_empty);
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
      if (work.takes_gradient) {
        attend<true>(work);
      } else if constexpr (C::kAddsQueries) {
        attend<false>(work);
      }
      release(&shared_.keys_empty);
      store(work);
    }
  }

 private:
  template <bool kTakesGradient>
  HOPPER_DEVICE void attend(const Work& work) {
    const uint32_t keys = smem_u32(shared_.k[group_]), values = smem_u32(shared_.v[group_]);
    float scores[C::kRows / 2], ds[C::kRows / 2], dq[C::Sums::kHalfRows / 2];
    uint32_t p_factor[C::kRows / kMmaDepth][4], ds_factor[C::kRows / kMmaDepth][4];
    prepare_keys(work);
    for (int tiles = work.rows.end - work.rows.begin; tiles > 0; --tiles, ++n_) {
      const Stage<C::kStages> at(n_);
      const int stage = at.index;
      const uint32_t queries = smem_u32(shared_.q[stage]), dout = smem_u32(shared_.dout[stage]);

      mbar_wait(&shared_.q_full[stage], at.parity);
      const int edge_row = shared_.edge_row[stage];  // here, where nothing waits for it
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
      if (edge_row >= 0) hide(scores, edge_row);
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
      }
      if constexpr (C::kAddsQueries) {
        bar_sync(kScores, 128 * C::kConsumers);  // all scores of this tile are shared
        reg_fence(dq);
        wgmma_fence();
        const int row_panel = C::Sums::row(group_) / C::Sums::kRowPanel;
        multiply_transposed<kKeyTile, C::Sums::kHalfRows>(
            dq, smem_u32(shared_.k[0][C::Sums::column(group_) / kPanel]), sizeof(shared_.k[0]),
            smem_u32(shared_.ds[n_ % 2][row_panel]));
        wgmma_commit();
      }
      if constexpr (kTakesGradient) {
        reg_fence(dk_);
        wgmma_fence();
        multiply_pv<C::kHeadDim, C::kRows>(dk_, ds_factor, queries);
        wgmma_commit();
        wgmma_wait<C::kAddsQueries ? 2 : 1>();
        reg_fence(dv_);
      }
      release(&shared_.dout_empty[stage]);
      if constexpr (C::kAddsQueries) {
        wgmma_wait<kTakesGradient ? 1 : 0>();
        reg_fence(dq);
        give(dq);  // while dk is multiplied
      }
      if constexpr (kTakesGradient) {
        wgmma_wait<0>();
        reg_fence(dk_);
      }
      release(&shared_.q_empty[stage]);
    }
  }

  HOPPER_DEVICE int thread_key(const Work& work, int half) const {
    return work.keys.row + group_ * 64 + thread_row() + 8 * half;
  }

  // Notes which query rows see the keys of this warp, and zeroes keys and values that no row sees
  // or that hold NaN or infinity: lse or delta of a row that sees such a key are NaN already. The
  // gradients of a broken key begin with NaN. Four threads share a key.
  HOPPER_DEVICE void prepare_keys(const Work& work) {
    const int text = text_length(params_.mask, work.batch), lane = threadIdx.x % 4;
    auto &keys = shared_.k[group_], &values = shared_.v[group_];
    HOPPER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int key = thread_key(work, half), row = thread_row() + 8 * half;
      Interval rows = {0, 0};
      if (key < work.keys.end) rows = rows_that_see(params_.mask, text, key);
      if (lane == 0) shared_.seen_by[group_ * 64 + row] = rows;
      const bool seen = rows.begin < rows.end;
      const uint32_t broken_key = any_of_quad(!is_finite_row<4>(keys, row, lane));
      const uint32_t broken_value = any_of_quad(!is_finite_row<4>(values, row, lane));
      if (!seen || broken_key) zero_row<4>(keys, row, lane);
      if (!seen || broken_value) zero_row<4>(values, row, lane);
      HOPPER_UNROLL
      for (int i = 2 * half; i < C::kHeadDim / 2; i += 4) {
        dk_[i] = dk_[i + 1] = dv_[i] = dv_[i + 1] = seen && broken_key ? NAN : 0.0f;
      }
    }
    fence_proxy_async();
    sync_group(group_);
  }

  HOPPER_DEVICE static uint32_t any_of_quad(uint32_t bit) {
    bit |= shfl_xor(bit, 1);
    return bit | shfl_xor(bit, 2);
  }

  HOPPER_DEVICE void hide(float (&scores)[C::kRows / 2], int row) {
    const Interval* own = shared_.seen_by + group_ * 64 + thread_row();
    const Interval seen_by[2] = {own[0], own[8]};
    hide_rows<C::kRows>(scores, seen_by, row);
  }

  // exp(score - lse), in place. Columns are query rows. Settles half of them at a time, so that
  // ptxas keeps no more values of lse in registers.
  HOPPER_DEVICE void weigh(float (&scores)[C::kRows / 2], const float (&lse)[C::kRows]) {
    HOPPER_UNROLL
    for (int first = 0; first < C::kRows / 8; first += C::kRows / 16) {
      uint32_t witness = 0;
      HOPPER_UNROLL
      for (int i = first; i < first + C::kRows / 16; ++i) {
        const float2 offset = reinterpret_cast<const float2*>(lse)[4 * i + threadIdx.x % 4];
        HOPPER_UNROLL
        for (int j = 0; j < 4; ++j) {
          float& score = scores[4 * i + j];
          score = exp2_approx(score * params_.scale_log2 - (j % 2 == 0 ? offset.x : offset.y));
          witness |= bits_from_float(score);
        }
      }
      settle(witness, &shared_.keys_full);
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
  HOPPER_DEVICE void share(
      const uint32_t (&ds)[C::kRows / kMmaDepth][4],
      uint16_t (&panels)[C::kRows / C::Sums::kRowPanel][kKeyTile * C::Sums::kRowPanel]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const uint32_t row = group_ * 64 + warp * 16 + lane % 16, half_columns = lane / 16 * 16;
    HOPPER_UNROLL
    for (int i = 0; i < C::kRows / kMmaDepth; ++i) {
      auto* panel = reinterpret_cast<uint8_t*>(panels[i]);
      stmatrix_x4(panel + sw32(row, half_columns), ds[i][0], ds[i][1], ds[i][2], ds[i][3]);
    }
    fence_proxy_async();
  }

  // Leaves a half of dq to `add_sums`.
  HOPPER_DEVICE void give(const float (&dq)[C::Sums::kHalfRows / 2]) {
    mbar_wait(&shared_.dq_empty, n_ % 2 ^ 1);
    auto* own = reinterpret_cast<float4*>(shared_.dq[group_]);
    HOPPER_UNROLL
    for (int i = 0; i < C::Sums::kHalfRows / 8; ++i) {
      own[i * 128 + threadIdx.x % 128] = {dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]};
    }
    fence_proxy_async();
    release(&shared_.dq_full);
  }

  // Stores row by row, because a tile may end among the keys of another CTA.
  HOPPER_DEVICE void store(const Work& work) {
    const FrameMask& mask = params_.mask;
    HOPPER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int key = thread_key(work, half);
      const bool zero = !backward_.prefix_grad && key >= mask.text_tokens && key < prefix_end(mask);
      const int64_t row = static_cast<int64_t>(work.batch) * mask.key_rows + key;
      const int64_t at = (row * params_.heads + work.head) * C::kHeadDim + threadIdx.x % 4 * 8;
      HOPPER_UNROLL
      for (int i = 0; i < C::kHeadDim / 32; ++i) {
        uint4 dk = gather_columns<C::kHeadDim>(dk_, i, half, params_.scale);
        uint4 dv = gather_columns<C::kHeadDim>(dv_, i, half, 1.0f);
        if (key >= work.keys.end) continue;
        if (zero) dk = dv = {0, 0, 0, 0};
        *reinterpret_cast<uint4*>(backward_.dk + at + 32 * i) = dk;
        *reinterpret_cast<uint4*>(backward_.dv + at + 32 * i) = dv;
      }
    }
  }

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
    prefetch(maps.q, maps.k, maps.v, maps.dout);
    mbar_init(&shared.work_full, 1);
    mbar_init(&shared.keys_full, 1);
    mbar_init(&shared.keys_empty, 4 * C::kConsumers + (C::kAddsQueries ? 3 : 2));
    mbar_init(&shared.dq_full, 4 * C::kConsumers);
    mbar_init(&shared.dq_empty, 1);
    for (int i = 0; i < C::kStages; ++i) {
      mbar_init(&shared.q_full[i], 1);
      mbar_init(&shared.dout_full[i], 1);
      mbar_init(&shared.raw[i], 2);
      mbar_init(&shared.q_empty[i], 4 * C::kConsumers);
      mbar_init(&shared.dout_empty[i], 4 * C::kConsumers);
    }
    fence_barrier_init();
  }
  cta_sync();

  const int group = shfl_idx(static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 0) {
    setmaxnreg_dec<C::kProducerRegisters>();
    const int warp = shfl_idx(static_cast<int>(threadIdx.x) / 32, 0);
    if (warp == 0 && elect_one()) fetch_keys<C>(shared, maps, params, backward);
    if constexpr (C::kAddsQueries) {
      if (warp == 1 && elect_one()) add_sums<C>(shared, params, backward);
    }
    if (warp == 2) repair_queries<C>(shared);
    if (warp == 3 && elect_one()) fetch_queries<C>(shared, maps, params, backward);
  } else {
    setmaxnreg_inc<C::kConsumerRegisters>();
    Consumer<C>(shared, params, backward, group - 1).run();
  }
}

template <class C>
const char* launch(const Params& params, const Backward& backward, const BackwardBuffers& buffers,
                   int ctas, void* stream) {
  static_assert(sizeof(typename C::Shared) <= 227 * 1024, "more than a block may have");
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
