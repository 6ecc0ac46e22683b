#pragma once

#include "hopper/hopper.cuh"

namespace aapt::sim {

// Bytes that a row of a swizzled tile spans; 16 without swizzle.
constexpr uint32_t span_of(hopper::Swizzle swizzle) { return 16u << swizzle; }

// Exclusive-ors bits 4 to 6 of a shared-memory address with bits 7 to 9: one bit for a span of 32
// bytes, two for 64, three for 128.
constexpr uint32_t swizzle_address(uint32_t address, hopper::Swizzle swizzle) {
  return address ^ ((address >> 7 & ((1u << swizzle) - 1)) << 4);
}

}  // namespace aapt::sim
