// The functions of csrc/hopper for g++. The other files of this folder implement them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define HOPPER_DEVICE inline
#define HOPPER_KERNEL void
#define HOPPER_LAUNCH_BOUNDS(threads, blocks)
#define HOPPER_GRID_CONSTANT
#define HOPPER_UNROLL
#define HOPPER_UNROLL_BY(count)
#define HOPPER_SHARED(name) uint8_t* const name = ::aapt::sim::shared_memory()
#define HOPPER_LAUNCH(kernel, grid, block, shared_bytes, ...) \
  ::aapt::hopper::launch(kernel, grid, block, shared_bytes, __VA_ARGS__)
#define HOPPER_LAUNCH_DEPENDENT HOPPER_LAUNCH

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace aapt::sim {

// The place in a kernel that a report names.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// A kernel with its arguments, as every thread starts it.
struct Call {
  void (*run)(const void* state);
  const void* state;
  size_t state_bytes;
};
const char* launch(dim3 grid, dim3 block, size_t shared_bytes, const Call& call);

struct WgmmaShape {
  int n;
  bool a_mn_major, b_mn_major, e4m3;
};

uint8_t* shared_memory();
void wgmma(float* d, const WgmmaShape& shape, const uint32_t* a_registers, uint64_t a, uint64_t b,
           bool accumulate, Where where);
void wgmma_wait(int groups, Where where);
void store_wait(int groups, bool only_read, Where where);
void set_registers(bool more, int count, Where where);
uint32_t shuffle(uint32_t value, int lane_or_mask, bool is_xor, Where where);
void load_readonly(void* value, const void* global, size_t bytes, Where where);

template <typename T>
T shuffle_as(T value, int lane_or_mask, bool is_xor, Where where) {
  static_assert(sizeof(T) == 4, "shuffles exchange 32-bit values");
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  bits = shuffle(bits, lane_or_mask, is_xor, where);
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

}  // namespace aapt::sim

namespace aapt::hopper {

using sim::Where;
#define HOPPER_WHERE Where where = Where::here()

struct TensorMap {
  char* base;
  int element_bytes, rank;
  Swizzle swizzle;
  uint64_t dims[5], strides[5];  // strides in bytes, the first is element_bytes
  uint32_t box[5];
};
const char* make_tensor_map(TensorMap* map, void* base, int element_bytes, int rank,
                            const uint64_t* dims, const uint64_t* strides_bytes,
                            const uint32_t* box, Swizzle swizzle);

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   void* /*stream*/, const Arguments&... arguments) {
  // The arguments are copied once, as on the device: later changes by the host do not show.
  struct State {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const State state{kernel, std::tuple<Parameters...>(arguments...)};
  const auto run = [](const void* self) {
    const State& state = *static_cast<const State*>(self);
    std::apply(state.kernel, state.arguments);
  };
  return sim::launch(grid, block, shared_bytes, {run, &state, sizeof(state)});
}

// Barriers and fences
uint32_t smem_u32(const void* pointer);
void mbar_init(uint64_t* bar, uint32_t arrivals, HOPPER_WHERE);
void mbar_arrive(uint64_t* bar, HOPPER_WHERE);
void mbar_expect_tx(uint64_t* bar, uint32_t bytes, HOPPER_WHERE);
void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes, HOPPER_WHERE);
bool mbar_try_wait(uint64_t* bar, uint32_t parity, HOPPER_WHERE);
void mbar_wait(uint64_t* bar, uint32_t parity, HOPPER_WHERE);
void fence_barrier_init();
void fence_proxy_async();
void cta_sync(HOPPER_WHERE);
void warp_sync(HOPPER_WHERE);
void bar_sync(int id, int threads, HOPPER_WHERE);
void bar_arrive(int id, int threads, HOPPER_WHERE);
// Blocks run one after another and atomics order them, so these have nothing to do.
inline void fence_gpu() {}
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

// Bulk copies
inline void tma_prefetch(const TensorMap*) {}
void tma_load(void* smem, const TensorMap* map, uint64_t* bar, int rank, const int* at,
              Where where);
void tma_store(const TensorMap* map, const void* smem, int rank, const int* at, bool add,
               Where where);
inline void tma_load_2d(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1,
                        HOPPER_WHERE) {
  const int at[] = {c0, c1};
  tma_load(smem, map, bar, 2, at, where);
}
inline void tma_load_3d(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2,
                        HOPPER_WHERE) {
  const int at[] = {c0, c1, c2};
  tma_load(smem, map, bar, 3, at, where);
}
inline void tma_load_4d(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2,
                        int c3, HOPPER_WHERE) {
  const int at[] = {c0, c1, c2, c3};
  tma_load(smem, map, bar, 4, at, where);
}
inline void tma_load_4d(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2,
                        int c3, CacheHint, HOPPER_WHERE) {
  tma_load_4d(smem, map, bar, c0, c1, c2, c3, where);
}
inline void tma_load_5d(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2,
                        int c3, int c4, HOPPER_WHERE) {
  const int at[] = {c0, c1, c2, c3, c4};
  tma_load(smem, map, bar, 5, at, where);
}
inline void tma_load_5d(void* smem, const TensorMap* map, uint64_t* bar, int c0, int c1, int c2,
                        int c3, int c4, CacheHint, HOPPER_WHERE) {
  tma_load_5d(smem, map, bar, c0, c1, c2, c3, c4, where);
}
#define HOPPER_TMA_TO_GLOBAL(name, add)                                                         \
  inline void name##_2d(const TensorMap* map, const void* smem, int c0, int c1, HOPPER_WHERE) { \
    const int at[] = {c0, c1};                                                                  \
    tma_store(map, smem, 2, at, add, where);                                                    \
  }                                                                                             \
  inline void name##_3d(const TensorMap* map, const void* smem, int c0, int c1, int c2,         \
                        HOPPER_WHERE) {                                                         \
    const int at[] = {c0, c1, c2};                                                              \
    tma_store(map, smem, 3, at, add, where);                                                    \
  }                                                                                             \
  inline void name##_4d(const TensorMap* map, const void* smem, int c0, int c1, int c2, int c3, \
                        HOPPER_WHERE) {                                                         \
    const int at[] = {c0, c1, c2, c3};                                                          \
    tma_store(map, smem, 4, at, add, where);                                                    \
  }                                                                                             \
  inline void name##_5d(const TensorMap* map, const void* smem, int c0, int c1, int c2, int c3, \
                        int c4, HOPPER_WHERE) {                                                 \
    const int at[] = {c0, c1, c2, c3, c4};                                                      \
    tma_store(map, smem, 5, at, add, where);                                                    \
  }
HOPPER_TMA_TO_GLOBAL(tma_store, false)
HOPPER_TMA_TO_GLOBAL(tma_reduce_add, true)
#undef HOPPER_TMA_TO_GLOBAL
void bulk_load(void* smem, const void* global, uint32_t bytes, uint64_t* bar, HOPPER_WHERE);
void bulk_store(void* global, const void* smem, uint32_t bytes, HOPPER_WHERE);
void bulk_reduce_add_f32(float* global, const float* smem, uint32_t bytes, HOPPER_WHERE);
void tma_store_commit();
template <int N>
inline void tma_store_wait(HOPPER_WHERE) {
  sim::store_wait(N, false, where);
}
template <int N>
inline void tma_store_wait_read(HOPPER_WHERE) {
  sim::store_wait(N, true, where);
}

// Matrix multiply
void wgmma_fence(HOPPER_WHERE);
void wgmma_commit();
template <int N>
inline void wgmma_wait(HOPPER_WHERE) {
  sim::wgmma_wait(N, where);
}
// The simulator keeps the order of the source.
inline void settle(uint32_t /*witness*/, const void* smem) { smem_u32(smem); }
template <int N>
inline void reg_fence(float (&)[N]) {}
template <int N, int TA, int TB>
inline void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate, HOPPER_WHERE) {
  sim::wgmma(d, {N, TA != 0, TB != 0, false}, nullptr, a, b, accumulate != 0, where);
}
template <int N, int TB>
inline void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate,
                     HOPPER_WHERE) {
  sim::wgmma(d, {N, false, TB != 0, false}, a, 0, b, accumulate != 0, where);
}
template <int N>
inline void wgmma_ss_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate, HOPPER_WHERE) {
  sim::wgmma(d, {N, false, false, true}, nullptr, a, b, accumulate != 0, where);
}
template <int N>
inline void wgmma_rs_e4m3(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate,
                          HOPPER_WHERE) {
  sim::wgmma(d, {N, false, false, true}, a, 0, b, accumulate != 0, where);
}

// Warps
template <typename T>
inline T shfl_xor(T value, int mask, HOPPER_WHERE) {
  return sim::shuffle_as(value, mask, true, where);
}
template <typename T>
inline T shfl_idx(T value, int lane, HOPPER_WHERE) {
  return sim::shuffle_as(value, lane, false, where);
}
inline uint32_t ballot(bool value, HOPPER_WHERE) {
  uint32_t bits = static_cast<uint32_t>(value) << threadIdx.x % 32;
  for (int mask = 1; mask < 32; mask *= 2) bits |= sim::shuffle(bits, mask, true, where);
  return bits;
}
bool elect_one(HOPPER_WHERE);
template <int N>
inline void setmaxnreg_inc(HOPPER_WHERE) {
  sim::set_registers(true, N, where);
}
template <int N>
inline void setmaxnreg_dec(HOPPER_WHERE) {
  sim::set_registers(false, N, where);
}
void stmatrix_x4(void* smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d, HOPPER_WHERE);
void stmatrix_x4_trans(void* smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d, HOPPER_WHERE);
void ldmatrix_x4(uint32_t (&r)[4], const void* smem, HOPPER_WHERE);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem, HOPPER_WHERE);

// Global memory
uint32_t atomic_add_acq_rel(uint32_t* global, uint32_t value, HOPPER_WHERE);
float4 load_l2(const float4* global, HOPPER_WHERE);
template <typename T>
inline T load_readonly(const T* global, HOPPER_WHERE) {
  T value;
  sim::load_readonly(&value, global, sizeof(T), where);
  return value;
}

// Mathematics
inline float float_from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }
inline float rsqrt_approx(float x) { return 1.0f / sqrtf(x); }
// As inexact as the chip may be: cut to 11 bits after the leading one.
inline float tanh_approx(float x) { return float_from_bits(bits_from_float(tanhf(x)) & ~0xFFFu); }
inline uint32_t round_to_bf16(float value) {
  const uint32_t bits = bits_from_float(value);
  return value != value ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) {
  return round_to_bf16(low) | round_to_bf16(high) << 16;
}
inline uint32_t round_to_e4m3(float value) {
  const uint32_t sign = bits_from_float(value) >> 24 & 128;
  if (value != value) return 0x7F;
  int exponent;
  const float size = fminf(fabsf(value), 448.0f);
  frexpf(size, &exponent);
  const float spacing = ldexpf(1.0f, (exponent > -5 ? exponent : -5) - 4);
  const float rounded = nearbyintf(size / spacing) * spacing;
  if (rounded < 0.015625f) return sign | static_cast<uint32_t>(rounded * 512.0f);
  return sign | ((bits_from_float(rounded) >> 20) - (120u << 3));
}
inline uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  return round_to_e4m3(x0) | round_to_e4m3(x1) << 8 | round_to_e4m3(x2) << 16 |
         round_to_e4m3(x3) << 24;
}
inline uint32_t multiply_add_bf16(uint32_t a, uint32_t b, uint32_t c) {
  const auto low = [](uint32_t pair) { return float_from_bits(pair << 16); };
  const auto high = [](uint32_t pair) { return float_from_bits(pair & 0xFFFF0000u); };
  return pack_bf16(fmaf(low(a), low(b), low(c)), fmaf(high(a), high(b), high(c)));
}

#undef HOPPER_WHERE

}  // namespace aapt::hopper
