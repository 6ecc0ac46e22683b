// Bulk copies, additions to global memory, and blocks that meet at a counter.
#pragma once

#include "bugs.h"

namespace copies {

using namespace aapt::hopper;

enum Bug {
  NO_BUG,
  TOO_FEW_BYTES,
  TOO_MANY_BYTES,
  MISALIGNED,
  TOO_LONG,
  NO_WAIT,
  NO_FENCE,
  NO_BARRIER,
  NO_STORE_WAIT,
  NO_SYNC_BEFORE_ATOMIC,
  NO_SYNC_AFTER_ATOMIC,
  NO_ATOMIC,
  PLAIN_COUNTER,
  READONLY_PARTIALS,
  BULK_LOAD_OF_PLAIN,
  ONLY_READ_WAIT,
  FAR_ROWS,
  FAR_BASE,
  BOX_OUTSIDE_SHARED,
  BYTE_MAP_ADD,
};

constexpr int kRow = 256, kThreads = 128;

// out[row] = 2 in[row], each row of kRow floats through shared memory.
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(kThreads, 1)
    double_rows(const float* in, float* out, int rows, BuildBugs bug) {
  struct Shared {
    alignas(128) float row[kRow];
    uint64_t full;
  };
  HOPPER_SHARED(raw);
  auto& shared = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    mbar_init(&shared.full, 1);
    fence_barrier_init();
  }
  cta_sync();
  for (int row = blockIdx.x, turn = 0; row < rows; row += gridDim.x, ++turn) {
    if (threadIdx.x == 0) {
      const uint32_t bytes = bug(TOO_LONG) ? 16 * sizeof(shared.row) : sizeof(shared.row);
      const uint32_t expected = bug(TOO_FEW_BYTES) ? bytes - 16 : bytes;
      mbar_arrive_expect_tx(&shared.full, bug(TOO_MANY_BYTES) ? bytes + 16 : expected);
      bulk_load(shared.row, in + row * kRow + (bug(MISALIGNED) ? 1 : 0), bytes, &shared.full);
    }
    if (!bug(NO_WAIT)) mbar_wait(&shared.full, turn & 1);
    for (int i = threadIdx.x; i < kRow; i += kThreads) shared.row[i] *= 2.0f;
    if (!bug(NO_FENCE)) fence_proxy_async();
    if (!bug(NO_BARRIER)) cta_sync();
    if (threadIdx.x == 0) {
      bulk_store(out + row * kRow, shared.row, sizeof(shared.row));
      tma_store_commit();
      if (!bug(NO_STORE_WAIT)) tma_store_wait_read<0>();
    }
    cta_sync();
  }
  // The loop waits for reads only: writes are complete at the end of the kernel.
}

// out += in, summed over blocks by the memory system; each block has one row of `in`.
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(kThreads, 1)
    sum_rows(const float* in, float* out, BuildBugs bug) {
  HOPPER_SHARED(raw);
  float* row = reinterpret_cast<float*>(raw);
  for (int i = threadIdx.x; i < kRow; i += kThreads) row[i] = in[blockIdx.x * kRow + i];
  if (!bug(NO_FENCE)) fence_proxy_async();
  if (!bug(NO_BARRIER)) cta_sync();
  if (threadIdx.x == 0) {
    bulk_reduce_add_f32(out, row, kRow * sizeof(float));
    tma_store_commit();
    if (!bug(NO_STORE_WAIT)) tma_store_wait_read<0>();
  }
}

// out (rows, 32) += each block's tile of `in`, in tiles of 8 x 32.
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(kThreads, 1)
    sum_tiles(HOPPER_GRID_CONSTANT const TensorMap in, HOPPER_GRID_CONSTANT const TensorMap out,
              BuildBugs bug) {
  struct Shared {
    alignas(1024) float tile[8 * 32];
    uint64_t full;
  };
  HOPPER_SHARED(raw);
  auto& shared = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    mbar_init(&shared.full, 1);
    fence_barrier_init();
    mbar_arrive_expect_tx(&shared.full, sizeof(shared.tile));
    tma_load_3d(shared.tile + (bug(BOX_OUTSIDE_SHARED) ? 4096 : 0), &in, &shared.full, 0, 0,
                blockIdx.x);
    mbar_wait(&shared.full, 0);
    tma_reduce_add_2d(&out, shared.tile, 0, 0);
    tma_store_commit();
    tma_store_wait<0>();
  }
}

// out[i] = sum over blocks of in[block, i]: the last block at the counter adds up the partial sums
// of all blocks.
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(kThreads, 1)
    meet(const float* in, float* partials, uint32_t* counter, float* out, BuildBugs bug) {
  struct Shared {
    alignas(128) float row[kThreads];
    uint64_t full;
    uint32_t last;
  };
  HOPPER_SHARED(raw);
  auto& shared = *reinterpret_cast<Shared*>(raw);
  const int i = threadIdx.x;
  float* mine = partials + blockIdx.x * kThreads;
  if (bug(ONLY_READ_WAIT)) {
    shared.row[i] = in[blockIdx.x * kThreads + i];
    fence_proxy_async();
    cta_sync();
    if (i == 0) {
      bulk_store(mine, shared.row, sizeof(shared.row));
      tma_store_commit();
      tma_store_wait_read<0>();
    }
  } else {
    mine[i] = in[blockIdx.x * kThreads + i];
  }
  if (!bug(NO_SYNC_BEFORE_ATOMIC)) cta_sync();
  if (i == 0) {
    uint32_t before;
    if (bug(PLAIN_COUNTER)) {
      before = (*counter)++;
    } else if (bug(NO_ATOMIC)) {
      before = blockIdx.x;
    } else {
      fence_gpu();
      before = atomic_add_acq_rel(counter, 1);
    }
    shared.last = before == gridDim.x - 1;
  }
  if (!bug(NO_SYNC_AFTER_ATOMIC)) cta_sync();
  if (bug(NO_SYNC_AFTER_ATOMIC) ? blockIdx.x != gridDim.x - 1 : !shared.last) return;
  float sum = 0.0f;
  if (bug(BULK_LOAD_OF_PLAIN)) {
    if (i == 0) {
      mbar_init(&shared.full, 1);
      fence_barrier_init();
      mbar_arrive_expect_tx(&shared.full, sizeof(shared.row));
      bulk_load(shared.row, partials, sizeof(shared.row), &shared.full);
    }
    cta_sync();
    mbar_wait(&shared.full, 0);
    sum = shared.row[i];
  } else if (i < kThreads / 4) {
    float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
    for (unsigned block = 0; block < gridDim.x; ++block) {
      const auto* from = reinterpret_cast<const float4*>(partials + block * kThreads) + i;
      const float4 part = bug(READONLY_PARTIALS) ? load_readonly(from) : load_l2(from);
      total.x += part.x;
      total.y += part.y;
      total.z += part.z;
      total.w += part.w;
    }
    reinterpret_cast<float4*>(out)[i] = total;
  }
  if (bug(BULK_LOAD_OF_PLAIN)) out[i] = sum;
}

// out = in^T for one 16 x 16 tile of BF16, by one warp.
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(32, 1)
    transpose_matrices(const uint16_t* in, uint16_t* out, int transpose_store) {
  HOPPER_SHARED(raw);
  auto* tile = reinterpret_cast<uint16_t*>(raw);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile[i] = in[i];
  warp_sync();
  // Matrix m of a fragment: rows m % 2 * 8, columns m / 2 * 8; of its transpose the other way
  // round.
  const int row = lane / 8 % 2 * 8 + lane % 8, column = lane / 16 * 8;
  const int other_row = lane / 16 * 8 + lane % 8, other_column = lane / 8 % 2 * 8;
  uint32_t r[4];
  if (transpose_store) {
    ldmatrix_x4(r, tile + row * 16 + column);
    warp_sync();
    stmatrix_x4_trans(tile + other_row * 16 + other_column, r[0], r[1], r[2], r[3]);
  } else {
    ldmatrix_x4_trans(r, tile + other_row * 16 + other_column);
    warp_sync();
    stmatrix_x4(tile + row * 16 + column, r[0], r[1], r[2], r[3]);
  }
  warp_sync();
  for (int i = lane; i < 256; i += 32) out[i] = tile[i];
}

}  // namespace copies
