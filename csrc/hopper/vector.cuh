// Eight BF16 values in 16 bytes, the widest load of a thread.
#pragma once

#include "hopper/hopper.cuh"

namespace aapt::hopper {

constexpr int kVector = 8;

HOPPER_DEVICE void widen_bf16(const uint4& raw, float (&out)[kVector]) {
  const uint32_t pairs[] = {raw.x, raw.y, raw.z, raw.w};
  HOPPER_UNROLL
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = unpack_bf16(pairs[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

HOPPER_DEVICE uint4 narrow_bf16(const float (&x)[kVector]) {
  return {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
          pack_bf16(x[6], x[7])};
}

}  // namespace aapt::hopper
