// Bulk copies between global and shared memory, tiled (TMA) and plain, for nvcc.
// One thread issues them. Loads complete on an mbarrier; stores and reductions join the thread's
// bulk group.
#pragma once

namespace aapt::hopper {

HOPPER_DEVICE void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

HOPPER_DEVICE void tma_load_2d(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(smem_u32(smem)),
      "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1)
      : "memory");
}
HOPPER_DEVICE void tma_load_3d(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1,
                               int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem_u32(smem)),
      "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
HOPPER_DEVICE void tma_load_4d(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1,
                               int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem_u32(smem)),
      "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
HOPPER_DEVICE void tma_load_4d(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1,
                               int c2, int c3, CacheHint hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem_u32(smem)),
      "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}
HOPPER_DEVICE void tma_load_5d(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1,
                               int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(smem_u32(smem)),
      "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
HOPPER_DEVICE void tma_load_5d(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1,
                               int c2, int c3, int c4, CacheHint hint) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem_u32(smem)),
      "l"(map), "r"(smem_u32(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// tma_store_{2,3,4,5}d write the tile; tma_reduce_add_{2,3,4,5}d add it (FP32 maps).
#define HOPPER_TMA_TO_GLOBAL(name, copy, kind)                                                   \
  HOPPER_DEVICE void name##_2d(const TensorMap* map, const void* smem, int c0, int c1) {         \
    asm volatile(copy ".tensor.2d.global.shared::cta" kind " [%0, {%2, %3}], [%1];" ::"l"(map),  \
                 "r"(smem_u32(smem)), "r"(c0), "r"(c1)                                           \
                 : "memory");                                                                    \
  }                                                                                              \
  HOPPER_DEVICE void name##_3d(const TensorMap* map, const void* smem, int c0, int c1, int c2) { \
    asm volatile(copy ".tensor.3d.global.shared::cta" kind                                       \
                      " [%0, {%2, %3, %4}], [%1];" ::"l"(map),                                   \
                 "r"(smem_u32(smem)), "r"(c0), "r"(c1), "r"(c2)                                  \
                 : "memory");                                                                    \
  }                                                                                              \
  HOPPER_DEVICE void name##_4d(const TensorMap* map, const void* smem, int c0, int c1, int c2,   \
                               int c3) {                                                         \
    asm volatile(copy ".tensor.4d.global.shared::cta" kind                                       \
                      " [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),                               \
                 "r"(smem_u32(smem)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)                         \
                 : "memory");                                                                    \
  }                                                                                              \
  HOPPER_DEVICE void name##_5d(const TensorMap* map, const void* smem, int c0, int c1, int c2,   \
                               int c3, int c4) {                                                 \
    asm volatile(copy ".tensor.5d.global.shared::cta" kind                                       \
                      " [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),                           \
                 "r"(smem_u32(smem)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)                \
                 : "memory");                                                                    \
  }
HOPPER_TMA_TO_GLOBAL(tma_store, "cp.async.bulk", ".bulk_group")
HOPPER_TMA_TO_GLOBAL(tma_reduce_add, "cp.reduce.async.bulk", ".add.bulk_group")
#undef HOPPER_TMA_TO_GLOBAL

// One-dimensional copies: addresses and sizes are multiples of 16 bytes.
HOPPER_DEVICE void bulk_load(void* smem, const void* global, uint32_t bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem_u32(smem)),
      "l"(global), "r"(bytes), "r"(smem_u32(bar))
      : "memory");
}
HOPPER_DEVICE void bulk_store(void* global, const void* smem, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(smem_u32(smem)), "r"(bytes)
               : "memory");
}
HOPPER_DEVICE void bulk_reduce_add_f32(float* global, const float* smem, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
      "r"(smem_u32(smem)), "r"(bytes)
      : "memory");
}

HOPPER_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most N groups still run. The writes of all others are then visible.
template <int N>
HOPPER_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}

// Waits until at most N groups still read shared memory. That of all others may then be
// overwritten.
template <int N>
HOPPER_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

}  // namespace aapt::hopper
