// Code that the attention kernels share: one warpgroup fetches (the producer), two or three
// multiply (the consumers).
//
// A kernel's configuration C gives kHeadDim, kConsumers, kKeyTile, kStages, kRepair and Shared, the
// struct of its shared memory:
//   q, out                               blocks of kQueryBlock rows: out has one per consumer
//   k, v                                 rings of kStages tiles
//   q_full, q_empty                      barriers of q
//   k_full, k_empty, v_full, v_empty     barriers of k and v, one per stage
//   raw                                  barriers of tiles to be repaired, one per stage
//   broken                               Repair::VALUES: bits of a tile's values that are broken
#pragma once

#include "attention/finite.cuh"
#include "attention/products.cuh"
#include "attention/rows.h"
#include "attention/softmax.cuh"
#include "hopper/hopper.cuh"

namespace aapt {

constexpr int kMostConsumers = 3;

// Named barriers, one per consumer; 0 is __syncthreads, and a kernel's own begin at kOwnBarriers.
enum ConsumerBarrier {
  kTurn = 1,
  kGroup = kTurn + kMostConsumers,
  kOwnBarriers = kGroup + kMostConsumers
};

// Consumers alternate: one's softmax runs while the tensor cores multiply for the others. A barrier
// is one consumer's turn, passed by the consumer before it.
HOPPER_DEVICE void take_turn(int group) { hopper::bar_sync(kTurn + group, 2 * 128); }
template <class C>
HOPPER_DEVICE void pass_turn(int group) {
  hopper::bar_arrive(kTurn + (group == C::kConsumers - 1 ? 0 : group + 1), 2 * 128);
}

HOPPER_DEVICE void sync_group(int group) { hopper::bar_sync(kGroup + group, 128); }

HOPPER_DEVICE bool leads_group() { return threadIdx.x % 128 == 0; }

// A thread has two rows of a block of 64: this one, and the one 8 rows after it.
HOPPER_DEVICE int thread_row() { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

// Counts this warp as done with a buffer that all its lanes have read.
HOPPER_DEVICE void release(uint64_t* empty) {
  if (threadIdx.x % 32 == 0) hopper::mbar_arrive(empty);
}

// Which rows of a tile are zeroed before the consumers see it, so that a weight of zero hides them.
enum class Repair {
  END,      // values that are nobody's: padding of the text, frames to come, frames forgotten
  COLUMNS,  // as END, if the keys of a tile of values are its columns
  VALUES,   // and values that hold NaN or infinity; `broken` says which
  BOTH      // and keys like values, because both are right factors; `broken` is not needed
};

// Called by all threads. One thread per warp gives queries, keys and values back.
template <class C>
HOPPER_DEVICE void init_barriers(typename C::Shared& shared) {
  using namespace hopper;
  if (threadIdx.x == 0) {
    mbar_init(&shared.q_full, 1);
    mbar_init(&shared.q_empty, 4 * C::kConsumers);
    for (int i = 0; i < C::kStages; ++i) {
      mbar_init(&shared.k_full[i], 1);
      mbar_init(&shared.v_full[i], 1);
      mbar_init(&shared.k_empty[i], 4 * C::kConsumers);
      mbar_init(&shared.v_empty[i], 4 * C::kConsumers);
      mbar_init(&shared.raw[i], C::kRepair == Repair::BOTH ? 2 : 1);
    }
    fence_barrier_init();
  }
  cta_sync();
}

// Fetches a tile of BF16 rows that begins at token `row`.
template <int kPanels, int kSize>
HOPPER_DEVICE void load_tile(uint16_t (&tile)[kPanels][kSize], const hopper::TensorMap& map,
                             uint64_t* full, int row, int head, int batch) {
  for (int panel = 0; panel < kPanels; ++panel) {
    // Other query tiles read the same rows soon
    hopper::tma_load_4d(tile[panel], &map, full, panel * kPanel, row, head, batch,
                        hopper::CacheHint::EVICT_LAST);
  }
}

// The rings of keys and values, as the fetching thread, the repairing warp or a consumer goes
// through them. A consumer counts tiles from the first of its work item.
//
// A tile to be repaired arrives at the barrier `raw`, and the repairing warp passes it on to the
// barriers that consumers wait for. All other tiles arrive there at once and cost nothing.
template <class C>
class KeyRing {
 public:
  HOPPER_DEVICE explicit KeyRing(typename C::Shared& shared) : shared_(shared) {}

  // Fetches the next tile, which begins at token `row`, once the consumers have released its
  // stages. is_raw: it needs repair.
  template <class TensorMaps>
  HOPPER_DEVICE void fetch(const TensorMaps& maps, int row, int head, int batch, bool is_raw) {
    const Stage stage(before_++);
    const auto fetch = [&](auto& tile, const auto& map, uint64_t* full, uint64_t* empty) {
      hopper::mbar_wait(empty, stage.parity ^ 1);
      hopper::mbar_arrive_expect_tx(full, sizeof(tile));
      load_tile(tile, map, full, row, head, batch);
    };
    uint64_t* raw = &shared_.raw[stage.index];
    fetch(shared_.k[stage.index], maps.k,
          is_raw && C::kRepair == Repair::BOTH ? raw : &shared_.k_full[stage.index],
          &shared_.k_empty[stage.index]);
    fetch(shared_.v[stage.index], maps.v, is_raw ? raw : &shared_.v_full[stage.index],
          &shared_.v_empty[stage.index]);
  }

  // Repairs the next tile if it is raw. Called by one whole warp.
  template <class Tile>
  HOPPER_DEVICE void repair(const Tile& tile, bool is_raw) {
    const Stage stage(before_++);
    if (!is_raw) return;
    hopper::mbar_wait(&shared_.raw[stage.index], raw_parities_ >> stage.index & 1);
    raw_parities_ ^= 1u << stage.index;
    if constexpr (C::kRepair == Repair::COLUMNS) {
      zero_columns(shared_.v[stage.index], tile.hidden(), tile.visible());
    } else if constexpr (C::kRepair == Repair::VALUES) {
      repair_rows(shared_.v[stage.index], tile.visible(), shared_.broken[stage.index]);
    } else {
      repair_rows(shared_.v[stage.index], tile.visible(), nullptr);
    }
    if constexpr (C::kRepair == Repair::BOTH) {
      repair_rows(shared_.k[stage.index], tile.visible(), nullptr);
    }
    hopper::fence_proxy_async();
    hopper::warp_sync();
    release(&shared_.v_full[stage.index]);
    if constexpr (C::kRepair == Repair::BOTH) release(&shared_.k_full[stage.index]);
  }

  // Moves on to the next work item, after one of `tiles` tiles.
  HOPPER_DEVICE void finish_item(int tiles) { before_ += tiles; }

  HOPPER_DEVICE void wait_keys(int i) {
    hopper::mbar_wait(&shared_.k_full[stage_of(i).index], stage_of(i).parity);
  }
  HOPPER_DEVICE void wait_values(int i) {
    hopper::mbar_wait(&shared_.v_full[stage_of(i).index], stage_of(i).parity);
  }
  HOPPER_DEVICE uint32_t keys(int i) const {
    return hopper::smem_u32(&shared_.k[stage_of(i).index]);
  }
  HOPPER_DEVICE uint32_t values(int i) const {
    return hopper::smem_u32(&shared_.v[stage_of(i).index]);
  }
  // Of a tile of 128 keys that was repaired.
  HOPPER_DEVICE uint4 broken(int i) const {
    return *reinterpret_cast<const uint4*>(shared_.broken[stage_of(i).index]);
  }
  HOPPER_DEVICE void release_keys(int i) { release(&shared_.k_empty[stage_of(i).index]); }
  HOPPER_DEVICE void release_values(int i) { release(&shared_.v_empty[stage_of(i).index]); }

 private:
  using Stage = hopper::Stage<C::kStages>;
  HOPPER_DEVICE Stage stage_of(int i) const { return Stage(before_ + i); }

  // Rows from `visible` on are nobody's.
  template <class Tile>
  HOPPER_DEVICE static void repair_rows(Tile& tile, int visible, uint32_t* broken) {
    HOPPER_UNROLL_BY(1)
    for (int first = 0; first < C::kKeyTile; first += 32) {
      const int row = first + threadIdx.x % 32;
      bool is_broken = false;
      if constexpr (C::kRepair != Repair::END) {
        is_broken = row < visible && !is_finite_row(tile, row);
      }
      if (is_broken || row >= visible) zero_row(tile, row);
      if constexpr (C::kRepair == Repair::VALUES) {
        const uint32_t bits = hopper::ballot(is_broken);
        if (threadIdx.x % 32 == 0) broken[first / 32] = bits;
      }
    }
  }

  typename C::Shared& shared_;
  uint32_t before_ = 0;        // tiles before this item, or fetched
  uint32_t raw_parities_ = 0;  // bit s: of the next raw tile in stage s
};

// What the fetching warpgroup does. visit_keys(visit) calls visit(tile, head, batch, is_raw) for
// the key tiles of this CTA, in the order of the consumers; is_raw: the tile needs repair.
//
// Two threads fetch, so that keys arrive while queries wait for their buffer. The branches exclude
// each other, or the compiler would keep what they share in registers that they lack.
template <class C, class TensorMaps, class VisitKeys, class FetchQueries>
HOPPER_DEVICE void produce(typename C::Shared& shared, const TensorMaps& maps,
                           const VisitKeys& visit_keys, const FetchQueries& fetch_queries) {
  hopper::setmaxnreg_dec<C::kProducerRegisters>();
  const int warp = hopper::shfl_idx(static_cast<int>(threadIdx.x) / 32, 0);
  KeyRing<C> ring(shared);
  if (warp == 0) {
    if (!hopper::elect_one()) return;
    visit_keys([&](const auto& tile, int head, int batch, bool is_raw) {
      ring.fetch(maps, tile.row, head, batch, is_raw);
    });
  } else if (warp == 1) {
    if (hopper::elect_one()) fetch_queries();
  } else if (warp == 2) {
    visit_keys([&](const auto& tile, int, int, bool is_raw) { ring.repair(tile, is_raw); });
  }
}

// Writes the log-sum-exps of this thread's two rows, the first of which is `row`, to lse[row]; rows
// from `rows` on are not stored.
HOPPER_DEVICE void store_lse(const OnlineSoftmax& softmax, float scale_log2, float* lse, int row,
                             int rows) {
  HOPPER_UNROLL
  for (int half = 0; half < 2; ++half, row += 8) {
    if (threadIdx.x % 4 == 0 && row < rows) lse[row] = softmax.log_sum_exp(half, scale_log2);
  }
}

// Waits until this consumer's stores have read shared memory.
HOPPER_DEVICE void finish_stores() {
  if (leads_group()) hopper::tma_store_wait_read<0>();
}

// Rounds a consumer's 64 rows of results to BF16 and stores them from token `row` on, through its
// own block of shared memory. The store may still read it at the end; see finish_stores.
template <class C>
HOPPER_DEVICE void store_rows(typename C::Shared& shared, const hopper::TensorMap& map,
                              const float (&results)[C::kHeadDim / 2], int group, int row, int head,
                              int batch) {
  using namespace hopper;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const uint32_t block_row = warp * 16 + lane % 16, half_columns = lane / 16 * 16;
  finish_stores();
  sync_group(group);
  HOPPER_UNROLL
  for (int i = 0; i < C::kHeadDim / 16; ++i) {
    const auto pair = [&](int j) {
      return pack_bf16(results[8 * i + 2 * j], results[8 * i + 2 * j + 1]);
    };
    auto* panel = reinterpret_cast<uint8_t*>(shared.out[group][i / 4]);
    stmatrix_x4(panel + sw128(block_row, i % 4 * 32 + half_columns), pair(0), pair(1), pair(2),
                pair(3));
  }
  fence_proxy_async();
  sync_group(group);
  if (leads_group()) {
    for (int panel = 0; panel < C::kHeadDim / kPanel; ++panel) {
      tma_store_4d(&map, shared.out[group][panel], panel * kPanel, row, head, batch);
    }
    tma_store_commit();
  }
}

}  // namespace aapt
