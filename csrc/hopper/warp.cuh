// Warp exchange, register allocation, coherent and read-only loads, atomics, fast mathematics,
// for nvcc.
#pragma once

namespace aapt::hopper {

template <typename T>
HOPPER_DEVICE T shfl_xor(T value, int mask) {
  static_assert(sizeof(T) == 4, "shuffles exchange 32-bit values");
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
template <typename T>
HOPPER_DEVICE T shfl_idx(T value, int lane) {
  static_assert(sizeof(T) == 4, "shuffles exchange 32-bit values");
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}

// Bit l of the result is what lane l says.
HOPPER_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xFFFFFFFFu, value); }

// True in one lane of the warp, which the hardware chooses.
HOPPER_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected != 0;
}

template <int N>
HOPPER_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
HOPPER_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
HOPPER_DEVICE void stmatrix_x4(void* smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_u32(smem)),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}
HOPPER_DEVICE void stmatrix_x4_trans(void* smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   smem_u32(smem)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
HOPPER_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(smem))
               : "memory");
}
HOPPER_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(smem))
               : "memory");
}

// Adds, and returns the value before. Releases all writes that this thread knows of, and acquires
// all writes released at this address.
HOPPER_DEVICE uint32_t atomic_add_acq_rel(uint32_t* global, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(global), "r"(value)
               : "memory");
  return before;
}

// Loads past the L1 cache, for data that other blocks of this launch have written.
HOPPER_DEVICE float4 load_l2(const float4* global) {
  float4 value;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(global)
               : "memory");
  return value;
}

// Loads through the read-only cache, for data that no block of this launch writes.
template <typename T>
HOPPER_DEVICE T load_readonly(const T* global) {
  return __ldg(global);
}

HOPPER_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
HOPPER_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
HOPPER_DEVICE float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Has a relative error of at most 2^-11.
HOPPER_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

HOPPER_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Four E4M3 values, the first in the low byte; what is beyond 448 becomes 448, NaN stays NaN.
HOPPER_DEVICE uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
  uint32_t four;
  asm("{.reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, %2, %1; "
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3; mov.b32 %0, {low, high};}"
      : "=r"(four)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return four;
}

// a b + c of two pairs of BF16 values, each rounded once.
HOPPER_DEVICE uint32_t multiply_add_bf16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

HOPPER_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
HOPPER_DEVICE uint32_t bits_from_float(float value) { return __float_as_uint(value); }

}  // namespace aapt::hopper
