// One wgmma tile for every swizzle, major-ness and operand kind, to test descriptors. c[64, N] =
// a[64, K] b[N, K]^T.
#pragma once

#include "bugs.h"

namespace matrix {

using namespace aapt::hopper;

// K = 64, BF16 from shared memory. A K-major operand is stored (rows, 64), an MN-major one
// (64, rows); either is loaded in slices as wide as the swizzle span.
template <int N, Swizzle kSwizzle, int TA, int TB>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(128, 1)
    multiply(HOPPER_GRID_CONSTANT const TensorMap ta, HOPPER_GRID_CONSTANT const TensorMap tb,
             float* c) {
  constexpr int kSpan = kSwizzle == SW_NONE ? 16 : 16 << kSwizzle, kWidth = kSpan / 2;
  struct Shared {
    alignas(1024) uint16_t a[64 * 64];
    alignas(1024) uint16_t b[N * 64];
    uint64_t full;
  };
  HOPPER_SHARED(raw);
  auto& shared = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    mbar_init(&shared.full, 1);
    fence_barrier_init();
  }
  cta_sync();
  if (threadIdx.x == 0) {
    mbar_arrive_expect_tx(&shared.full, sizeof(shared.a) + sizeof(shared.b));
    for (int i = 0; i < 64 / kWidth; ++i) {
      tma_load_2d(shared.a + i * 64 * kWidth, &ta, &shared.full, i * kWidth, 0);
    }
    for (int i = 0; i < (TB ? N : 64) / kWidth; ++i) {
      tma_load_2d(shared.b + i * (TB ? 64 : N) * kWidth, &tb, &shared.full, i * kWidth, 0);
    }
  }
  mbar_wait(&shared.full, 0);

  // A slice holds `rows` rows of kSpan bytes. Without swizzle a group of 8 rows is 128 bytes, in
  // both orders; the offsets then change places for MN-major operands.
  const auto descriptor = [](const void* tile, int rows, bool mn_major, int step) {
    const uint32_t slice = rows * kSpan, group = 8 * kSpan;
    uint32_t at = smem_u32(tile);
    uint32_t lbo = slice, sbo = group;
    if (mn_major) {
      at += step * 16 * kSpan;
      if (kSwizzle == SW_NONE) {
        lbo = group;
        sbo = slice;
      }
    } else {
      at += step * 32 / kSpan * slice + step * 32 % kSpan;
    }
    return make_desc(at, lbo, sbo, kSwizzle);
  };
  float d[N / 2];
  reg_fence(d);
  wgmma_fence();
  HOPPER_UNROLL
  for (int step = 0; step < 4; ++step) {
    wgmma_ss<N, TA, TB>(d, descriptor(shared.a, 64, TA, step),
                        descriptor(shared.b, TB ? 64 : N, TB, step), step != 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  reg_fence(d);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  HOPPER_UNROLL
  for (int i = 0; i < N / 2; ++i) {
    const int row = warp * 16 + lane / 4 + (i / 2 & 1) * 8;
    c[row * N + i / 4 * 8 + (lane % 4) * 2 + (i & 1)] = d[i];
  }
}

// K = 128 in two slabs of 64, 128-byte swizzle. B is an image of `rows` x `width` pixels, (rows,
// width, 128): column 8 g + i of the product is pixel first + g width + i, as a convolution reads a
// halo tile. So descriptors start anywhere in the swizzle's pattern of 8 rows, and groups of 8 are
// any number of rows apart.
template <int N>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(128, 1)
    multiply_halo(HOPPER_GRID_CONSTANT const TensorMap ta, HOPPER_GRID_CONSTANT const TensorMap tb,
                  float* c, int rows, int width, int first) {
  constexpr int kSlabs = 2;
  struct Shared {
    alignas(1024) uint16_t a[kSlabs][64 * 64];
    alignas(1024) uint16_t b[kSlabs][344 * 64];  // whole patterns, as the slabs of causal_conv3d
    uint64_t full;
  };
  HOPPER_SHARED(raw);
  auto& shared = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    mbar_init(&shared.full, 1);
    fence_barrier_init();
  }
  cta_sync();
  if (threadIdx.x == 0) {
    mbar_arrive_expect_tx(&shared.full, sizeof(shared.a) + kSlabs * rows * width * 128);
    for (int slab = 0; slab < kSlabs; ++slab) {
      tma_load_2d(shared.a[slab], &ta, &shared.full, slab * 64, 0);
      tma_load_3d(shared.b[slab], &tb, &shared.full, slab * 64, 0, 0);
    }
  }
  mbar_wait(&shared.full, 0);
  float d[N / 2];
  reg_fence(d);
  wgmma_fence();
  HOPPER_UNROLL
  for (int slab = 0; slab < kSlabs; ++slab) {
    HOPPER_UNROLL
    for (int step = 0; step < 4; ++step) {
      const uint32_t at = step * 32;
      wgmma_ss<N, 0, 0>(
          d, make_desc(smem_u32(shared.a[slab]) + at, 16, 1024, SW_128),
          make_desc(smem_u32(shared.b[slab]) + first * 128 + at, 16, width * 128, SW_128),
          slab + step != 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  reg_fence(d);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  HOPPER_UNROLL
  for (int i = 0; i < N / 2; ++i) {
    const int row = warp * 16 + lane / 4 + (i / 2 & 1) * 8;
    c[row * N + i / 4 * 8 + (lane % 4) * 2 + (i & 1)] = d[i];
  }
}

// K = 32 bytes. A comes from registers: (64, K) in global memory; B is (N, K), K-major.
template <int N, bool kE4m3>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(128, 1)
    multiply_registers(const uint8_t* a, HOPPER_GRID_CONSTANT const TensorMap tb, float* c) {
  struct Shared {
    alignas(1024) uint8_t b[N * 32];
    uint64_t full;
  };
  HOPPER_SHARED(raw);
  auto& shared = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    mbar_init(&shared.full, 1);
    fence_barrier_init();
    mbar_arrive_expect_tx(&shared.full, sizeof(shared.b));
    tma_load_2d(shared.b, &tb, &shared.full, 0, 0);
  }
  cta_sync();
  mbar_wait(&shared.full, 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t fragment[4];
  HOPPER_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int row = warp * 16 + lane / 4 + (j & 1) * 8;
    fragment[j] = *reinterpret_cast<const uint32_t*>(a + row * 32 + lane % 4 * 4 + j / 2 * 16);
  }
  float d[N / 2];
  reg_fence(d);
  wgmma_fence();
  const uint64_t b = make_desc(smem_u32(shared.b), 16, 256, SW_32);
  if constexpr (kE4m3) {
    wgmma_rs_e4m3<N>(d, fragment, b, 0);
  } else {
    wgmma_rs<N, 0>(d, fragment, b, 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  reg_fence(d);
  HOPPER_UNROLL
  for (int i = 0; i < N / 2; ++i) {
    const int row = warp * 16 + lane / 4 + (i / 2 & 1) * 8;
    c[row * N + i / 4 * 8 + (lane % 4) * 2 + (i & 1)] = d[i];
  }
}

// FP8 GEMM with scales along K: c[m, n] = sum over blocks of 128 in K of
// a_scale[m, block] b_scale[block] (a b^T). 64 x 128 tiles, a producer warp, four stages. Sums move
// from the tensor core to float32 every `interval` blocks, whose scales must be equal.
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(256, 1)
    gemm_e4m3(HOPPER_GRID_CONSTANT const TensorMap ta, HOPPER_GRID_CONSTANT const TensorMap tb,
              const float* a_scale, const float* b_scale, float* c, int m, int n, int k,
              int interval) {
  constexpr int kStages = 4;
  struct Shared {
    alignas(1024) uint8_t a[kStages][64 * 128];
    alignas(1024) uint8_t b[kStages][128 * 128];
    uint64_t full[kStages], empty[kStages];
  };
  HOPPER_SHARED(raw);
  auto& shared = *reinterpret_cast<Shared*>(raw);
  const int first_row = blockIdx.x * 64, first_column = blockIdx.y * 128, steps = k / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbar_init(&shared.full[i], 1);
      mbar_init(&shared.empty[i], 128);
    }
    fence_barrier_init();
  }
  cta_sync();
  if (shfl_idx(static_cast<int>(threadIdx.x) / 128, 0) == 0) {
    if (shfl_idx(static_cast<int>(threadIdx.x) / 32, 0) == 0 && elect_one()) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % kStages;
        mbar_wait(&shared.empty[stage], (step / kStages & 1) ^ 1);
        mbar_arrive_expect_tx(&shared.full[stage], sizeof(shared.a[0]) + sizeof(shared.b[0]));
        tma_load_2d(shared.a[stage], &ta, &shared.full[stage], step * 128, first_row);
        tma_load_2d(shared.b[stage], &tb, &shared.full[stage], step * 128, first_column);
      }
    }
    return;
  }
  float d[64], sum[64];
  HOPPER_UNROLL
  for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
  const int thread = threadIdx.x - 128;
  const int row = first_row + thread / 32 * 16 + thread % 32 / 4;
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const float low = (row < m ? a_scale[row * steps + step] : 0.0f) * b_scale[step];
    const float high = (row + 8 < m ? a_scale[(row + 8) * steps + step] : 0.0f) * b_scale[step];
    while (!mbar_try_wait(&shared.full[stage], step / kStages & 1)) {
    }
    reg_fence(d);
    wgmma_fence();
    HOPPER_UNROLL
    for (int i = 0; i < 4; ++i) {
      wgmma_ss_e4m3<128>(d, make_desc(smem_u32(shared.a[stage]) + i * 32, 16, 1024, SW_128),
                         make_desc(smem_u32(shared.b[stage]) + i * 32, 16, 1024, SW_128),
                         step % interval + i != 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    reg_fence(d);
    mbar_arrive(&shared.empty[stage]);
    if ((step + 1) % interval != 0 && step + 1 != steps) continue;
    HOPPER_UNROLL
    for (int i = 0; i < 64; ++i) sum[i] += d[i] * (i / 2 & 1 ? high : low);
  }
  HOPPER_UNROLL
  for (int i = 0; i < 64; ++i) {
    const int at = row + (i / 2 & 1) * 8;
    const int column = first_column + i / 4 * 8 + (thread % 4) * 2 + (i & 1);
    if (at < m && column < n) c[static_cast<size_t>(at) * n + column] = sum[i];
  }
}

// Two FP8 products without a shuffle between them: c = p v^T with p = q k^T rounded to E4M3. q is
// (64, 128), k (keys, 128) and v (128, keys). Of k and v a tile of 128 keys from `first` on, a
// multiple of 16, takes part. The accumulator of a lane has columns 2 t and 2 t + 1 of every 8, the
// operand needs bytes 4 t to 4 t + 3 of every 16: so the tensor map of k brings key 4 t + 2 h + i
// of a group as row 8 h + 2 t + i.
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(128, 1)
    chain_e4m3(HOPPER_GRID_CONSTANT const TensorMap tq, HOPPER_GRID_CONSTANT const TensorMap tk,
               HOPPER_GRID_CONSTANT const TensorMap tv, float* c, int first) {
  struct Shared {
    alignas(1024) uint8_t q[64 * 128];
    alignas(1024) uint8_t k[128 * 128];
    alignas(1024) uint8_t v[128 * 128];
    uint64_t full;
  };
  HOPPER_SHARED(raw);
  auto& shared = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    mbar_init(&shared.full, 1);
    fence_barrier_init();
    mbar_arrive_expect_tx(&shared.full, sizeof(shared.q) + sizeof(shared.k) + sizeof(shared.v));
    tma_load_2d(shared.q, &tq, &shared.full, 0, 0);
    tma_load_5d(shared.k, &tk, &shared.full, 0, 0, 0, 0, first / 16);
    tma_load_2d(shared.v, &tv, &shared.full, first, 0);
  }
  cta_sync();
  mbar_wait(&shared.full, 0);
  float scores[64], out[64];
  reg_fence(scores);
  wgmma_fence();
  HOPPER_UNROLL
  for (int i = 0; i < 4; ++i) {
    wgmma_ss_e4m3<128>(scores, make_desc(smem_u32(shared.q) + i * 32, 16, 1024, SW_128),
                       make_desc(smem_u32(shared.k) + i * 32, 16, 1024, SW_128), i != 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  reg_fence(scores);
  uint32_t p[4][4];
  HOPPER_UNROLL
  for (int i = 0; i < 16; ++i) {
    const float* of = scores + (i / 4 * 2 + i % 4 / 2) * 8 + i % 2 * 2;
    p[i / 4][i % 4] = pack_e4m3(of[0], of[1], of[4], of[5]);
  }
  reg_fence(out);
  wgmma_fence();
  HOPPER_UNROLL
  for (int i = 0; i < 4; ++i) {
    wgmma_rs_e4m3<128>(out, p[i], make_desc(smem_u32(shared.v) + i * 32, 16, 1024, SW_128), i != 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  reg_fence(out);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  HOPPER_UNROLL
  for (int i = 0; i < 64; ++i) {
    const int row = warp * 16 + lane / 4 + (i / 2 & 1) * 8;
    c[row * 128 + i / 4 * 8 + (lane % 4) * 2 + (i & 1)] = out[i];
  }
}

}  // namespace matrix
