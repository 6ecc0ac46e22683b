// The Hopper intrinsics a kernel may use, as functions: inline PTX under nvcc, the host simulator
// of csrc/sim under g++. A kernel includes this file only and is written once for both.
//
// The simulator asks more of a kernel than the GPU does:
//   no asm, __shared__, <<<>>> or other CUDA builtins than threadIdx and its like;
//   shared memory is one struct over HOPPER_SHARED;
//   all lanes reach a warp-wide function (shuffles, elect_one, barriers, wgmma_wait) from one line;
//   accumulators and A fragments outlive their wgmma_wait; a wgmma_fence before each commit group;
//   a thread waits in functions of this layer only, and never for another block of its launch;
//   two threads do not write the same global address, not even the same value.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace aapt::hopper {
// In the order of the TMA enumeration.
enum Swizzle { SW_NONE = 0, SW_32 = 1, SW_64 = 2, SW_128 = 3 };

// What the L2 cache should do with a loaded tile, in the encoding of the instruction.
enum class CacheHint : uint64_t {
  EVICT_FIRST = 0x12F0000000000000,
  EVICT_LAST = 0x14F0000000000000
};
}  // namespace aapt::hopper

#if defined(__CUDACC__)
#include "hopper/launch.cuh"
// after launch.cuh, which has the macros
#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"
#include "hopper/warp.cuh"
#include "hopper/wgmma.cuh"
#else
#include "sim/device.h"
#endif

namespace aapt::hopper {

// The layout field of a descriptor counts in the opposite order of the TMA enumeration.
HOPPER_DEVICE constexpr uint64_t descriptor_layout(Swizzle swizzle) { return (4 - swizzle) % 4; }

// Shared-memory matrix descriptor of wgmma; offsets in bytes. K-major: `sbo` from one group of 8
// rows to the next; `lbo` between the two 16-byte halves of K, without swizzle only. MN-major:
// `lbo` from one swizzle span along M or N to the next, `sbo` between groups of 8 in K (without
// swizzle the two change places).
HOPPER_DEVICE uint64_t make_desc(uint32_t address, uint32_t lbo, uint32_t sbo, Swizzle swizzle) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         static_cast<uint64_t>((lbo & 0x3FFFF) >> 4) << 16 |
         static_cast<uint64_t>((sbo & 0x3FFFF) >> 4) << 32 | descriptor_layout(swizzle) << 62;
}

// The descriptor of the matrix `bytes` further on. Shared memory ends below 2^18, so no sum carries
// out of the address: one addition, where a new descriptor takes a chain of mask, shift and merge.
HOPPER_DEVICE uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor & 0xFFFFFFFF00000000) | low;
}

// Byte offset inside a 1024-byte aligned tile of 128-byte rows.
HOPPER_DEVICE constexpr uint32_t sw128(uint32_t row, uint32_t byte) {
  return row * 128 + (byte ^ ((row & 7) << 4));
}

// Byte offset inside a 256-byte aligned tile of 32-byte rows.
HOPPER_DEVICE constexpr uint32_t sw32(uint32_t row, uint32_t byte) {
  return row * 32 + (byte ^ ((row >> 2 & 1) << 4));
}

// The n-th use of a ring: its stage, and the parity of the stage's barriers then.
template <int kStages>
struct Stage {
  int index;
  uint32_t parity;
  HOPPER_DEVICE explicit Stage(uint32_t n) : index(n % kStages), parity(n / kStages % 2) {}
};

// The two BF16 values of a register, low half first.
HOPPER_DEVICE float2 unpack_bf16(uint32_t pair) {
  return {float_from_bits(pair << 16), float_from_bits(pair & 0xFFFF0000u)};
}

}  // namespace aapt::hopper
