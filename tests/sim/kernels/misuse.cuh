// A kernel that can be wrong in many ways, one at a time: each must end in a report.
#pragma once

#include "bugs.h"

namespace misuse {

using namespace aapt::hopper;

enum Bug {
  NO_BUG,
  TRANSPOSE_RACE,
  NULL_POINTER,
  DIVISION_BY_ZERO,
  STACK_OVERFLOW,
  ENDLESS_LOOP,
  ENDLESS_POLLING,
  SHARED_OUT_OF_BOUNDS,
  GLOBAL_OUT_OF_BOUNDS,
  MISALIGNED_VECTOR,
  BARRIER_ID,
  BARRIER_THREADS,
  DIVERGENT_BARRIER,
  UNINITIALISED_MBARRIER,
  OVERWRITTEN_MBARRIER,
  LOAD_AT_EXIT,
  HALF_WARPGROUP,
  DIFFERENT_WGMMA,
  DESCRIPTOR_OUTSIDE,
  WGMMA_AT_EXIT,
  REGISTERS_DOWN,
  LOST_BARRIER,
  GLOBAL_RACE,
};

HOPPER_DEVICE int deep(volatile int* levels) {
  volatile char local[4096];
  local[0] = 1;
  local[4095] = 1;
  *levels = *levels - 1;
  return *levels <= 0 ? local[0] : deep(levels) + local[4095];
}

HOPPER_DEVICE void multiply(uint8_t* raw, uint32_t offset) {
  float d[32];
  const uint64_t a = make_desc(smem_u32(raw), 16, 1024, SW_128);
  const uint64_t b = make_desc(smem_u32(raw) + offset, 16, 1024, SW_128);
  reg_fence(d);
  wgmma_fence();
  wgmma_ss<64, 0, 0>(d, a, b, 0);
  wgmma_commit();
  wgmma_wait<0>();
}

HOPPER_DEVICE void misuse(const BuildBugs& bug, uint8_t* raw, float* out, int n) {
  const int thread = threadIdx.x;
  auto* bar = reinterpret_cast<uint64_t*>(raw + 32 * 1024);
  if (bug(NULL_POINTER)) *static_cast<float*>(nullptr) = 1.0f;
  if (bug(DIVISION_BY_ZERO)) out[0] = 7 / (n % 32);
  if (bug(STACK_OVERFLOW)) {
    int levels = 1000;
    out[0] = deep(&levels);
  }
  if (bug(ENDLESS_LOOP)) {
    while (*static_cast<volatile float*>(out) != 12345.0f) {
    }
  }
  if (bug(SHARED_OUT_OF_BOUNDS)) raw[40 * 1024 + thread] = 1;
  if (bug(GLOBAL_OUT_OF_BOUNDS)) out[n * n + thread] = 1.0f;
  if (bug(MISALIGNED_VECTOR)) *reinterpret_cast<float4*>(out + 1) = {1.0f, 2.0f, 3.0f, 4.0f};
  if (bug(BARRIER_ID)) bar_sync(16, 128);
  if (bug(BARRIER_THREADS)) bar_sync(1, 100);
  if (bug(DIVERGENT_BARRIER) && thread != 5) bar_sync(1, 128);
  if (bug(UNINITIALISED_MBARRIER)) mbar_wait(bar, 0);
  if (bug(LOST_BARRIER) && thread < 32) bar_sync(2, 64);
  if (bug(GLOBAL_RACE) && thread % 32 == 0) out[0] = thread;
  if (bug(HALF_WARPGROUP) && thread < 64) multiply(raw, 8192);
  if (bug(DIFFERENT_WGMMA)) multiply(raw, thread < 32 ? 8192 : 16384);
  if (bug(DESCRIPTOR_OUTSIDE)) multiply(raw, 36 * 1024);
  if (bug(REGISTERS_DOWN)) {
    setmaxnreg_dec<40>();
    setmaxnreg_dec<80>();
  }
  if (bug(WGMMA_AT_EXIT)) {
    float d[32];
    const uint64_t a = make_desc(smem_u32(raw), 16, 1024, SW_128);
    wgmma_fence();
    wgmma_ss<64, 0, 0>(d, a, a, 0);
    wgmma_commit();
  }
  if (thread != 0) return;
  if (bug(ENDLESS_POLLING) || bug(OVERWRITTEN_MBARRIER) || bug(LOAD_AT_EXIT)) {
    mbar_init(bar, 1);
    fence_barrier_init();
  }
  if (bug(ENDLESS_POLLING)) {
    while (!mbar_try_wait(bar, 0)) {
    }
  }
  if (bug(OVERWRITTEN_MBARRIER)) *reinterpret_cast<uint32_t*>(bar) = 0;
  if (bug(LOAD_AT_EXIT)) {
    mbar_arrive_expect_tx(bar, 1024);
    bulk_load(raw, out, 1024, bar);
  }
}

// out = in^T by tiles of 32 x 32 through shared memory; n is a multiple of 32.
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(256, 1)
    transpose(const float* in, float* out, int n, BuildBugs bug) {
  HOPPER_SHARED(raw);
  misuse(bug, raw, out, n);
  if (bug.any() && !bug(TRANSPOSE_RACE)) return;
  auto* tile = reinterpret_cast<float (*)[33]>(raw);
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  for (int i = 0; i < 32; i += 8) {
    tile[y + i][x] = load_readonly(in + (blockIdx.y * 32 + y + i) * n + blockIdx.x * 32 + x);
  }
  if (!bug(TRANSPOSE_RACE)) cta_sync();
  for (int i = 0; i < 32; i += 8) {
    out[(blockIdx.x * 32 + y + i) * n + blockIdx.y * 32 + x] = tile[x][y + i];
  }
}

}  // namespace misuse
