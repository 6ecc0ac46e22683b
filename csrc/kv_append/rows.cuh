// Rows of head_dim in registers: load, norm, rotation, Hadamard matrix, rounding; and where a new
// token belongs in the cache.
//
// A row (one token, one head) belongs to head_dim / 16 neighbouring lanes; a lane holds 8 elements
// of the row's first half and the 8 of the second half that rotate with them, so rotation needs no
// exchange, and the norm of a head only a short butterfly.
#pragma once

#include "hopper/vector.cuh"
#include "kv_append/params.h"

namespace aapt {

using namespace hopper;

constexpr int kThreads = 256;

template <int kHeadDim>
constexpr int kLanes = kHeadDim / (2 * kVector);

// The two halves of a row that one lane holds, raw or in float32.
struct RawPair {
  uint4 low, high;
};
struct FloatPair {
  float low[kVector], high[kVector];
};
// One lane's share of a row.
struct Place {
  int batch, token, head, column;
};

HOPPER_DEVICE int64_t offset_of(const Strides& strides, const Place& at, int64_t token) {
  return at.batch * strides.batch + token * strides.token + at.head * strides.head + at.column;
}

HOPPER_DEVICE RawPair load_row(const void* tensor, int64_t offset, int half) {
  const auto* row = static_cast<const uint16_t*>(tensor) + offset;
  return {*reinterpret_cast<const uint4*>(row), *reinterpret_cast<const uint4*>(row + half)};
}

HOPPER_DEVICE void store_row(void* tensor, int64_t offset, int half, const RawPair& values) {
  auto* row = static_cast<uint16_t*>(tensor) + offset;
  *reinterpret_cast<uint4*>(row) = values.low;
  *reinterpret_cast<uint4*>(row + half) = values.high;
}

HOPPER_DEVICE FloatPair widen(const RawPair& raw) {
  FloatPair x;
  widen_bf16(raw.low, x.low);
  widen_bf16(raw.high, x.high);
  return x;
}

HOPPER_DEVICE RawPair narrow(const FloatPair& x) {
  return {narrow_bf16(x.low), narrow_bf16(x.high)};
}

HOPPER_DEVICE uint2 narrow_e4m3(const float (&x)[kVector]) {
  return {pack_e4m3(x[0], x[1], x[2], x[3]), pack_e4m3(x[4], x[5], x[6], x[7])};
}

// Weights and angles: BF16 as its bits, or float32.
HOPPER_DEVICE void load_vector(const uint16_t* from, float (&out)[kVector]) {
  widen_bf16(load_readonly(reinterpret_cast<const uint4*>(from)), out);
}

HOPPER_DEVICE void load_vector(const float* from, float (&out)[kVector]) {
  HOPPER_UNROLL
  for (int i = 0; i < kVector; i += 4) {
    const float4 four = load_readonly(reinterpret_cast<const float4*>(from + i));
    out[i] = four.x;
    out[i + 1] = four.y;
    out[i + 2] = four.z;
    out[i + 3] = four.w;
  }
}

HOPPER_DEVICE float sum_of_squares(const RawPair& raw) {
  const FloatPair x = widen(raw);
  float sum = 0.0f;
  HOPPER_UNROLL
  for (int i = 0; i < kVector; ++i) sum += x.low[i] * x.low[i] + x.high[i] * x.high[i];
  return sum;
}

// The sum over `lanes` neighbouring lanes, in each of them.
HOPPER_DEVICE float sum_over(float value, int lanes) {
  HOPPER_UNROLL
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += shfl_xor(value, distance);
  return value;
}

// x scale weight, where scale is 1 / rms(x); without a weight there is no norm.
template <typename Weight>
HOPPER_DEVICE FloatPair normalize(const RawPair& raw, const void* weight, int offset, int half,
                                  float scale) {
  FloatPair x = widen(raw);
  if (weight == nullptr) return x;
  const Weight* from = static_cast<const Weight*>(weight) + offset;
  float w[kVector];
  load_vector(from, w);
  HOPPER_UNROLL
  for (int i = 0; i < kVector; ++i) x.low[i] *= scale * w[i];
  load_vector(from + half, w);
  HOPPER_UNROLL
  for (int i = 0; i < kVector; ++i) x.high[i] *= scale * w[i];
  return x;
}

HOPPER_DEVICE FloatPair rotate(const FloatPair& x, const float* cos, const float* sin, int angle) {
  if (cos == nullptr) return x;
  float c[kVector], s[kVector];
  load_vector(cos + angle, c);
  load_vector(sin + angle, s);
  FloatPair rotated;
  HOPPER_UNROLL
  for (int i = 0; i < kVector; ++i) {
    rotated.low[i] = x.low[i] * c[i] - x.high[i] * s[i];
    rotated.high[i] = x.low[i] * s[i] + x.high[i] * c[i];
  }
  return rotated;
}

HOPPER_DEVICE void multiply(FloatPair& x, float factor) {
  HOPPER_UNROLL
  for (int i = 0; i < kVector; ++i) {
    x.low[i] *= factor;
    x.high[i] *= factor;
  }
}

// x becomes x + y and y becomes x - y.
HOPPER_DEVICE void add_and_subtract(float& x, float& y) {
  const float sum = x + y;
  y = x - y;
  x = sum;
}

// Multiplies a row by the Hadamard matrix, not yet divided by sqrt(head_dim): one step for each bit
// of an element's index. All lanes of the warp take part.
template <int kHeadDim>
HOPPER_DEVICE void multiply_hadamard(FloatPair& x) {
  HOPPER_UNROLL
  for (int i = 0; i < kVector; ++i) add_and_subtract(x.low[i], x.high[i]);
  HOPPER_UNROLL
  for (int step = 1; step < kVector; step *= 2) {
    HOPPER_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (i & step) continue;
      add_and_subtract(x.low[i], x.low[i + step]);
      add_and_subtract(x.high[i], x.high[i + step]);
    }
  }
  HOPPER_UNROLL
  for (int step = 1; step < kLanes<kHeadDim>; step *= 2) {
    const float sign = threadIdx.x & step ? -1.0f : 1.0f;
    HOPPER_UNROLL
    for (int i = 0; i < kVector; ++i) {
      x.low[i] = shfl_xor(x.low[i], step) + sign * x.low[i];
      x.high[i] = shfl_xor(x.high[i], step) + sign * x.high[i];
    }
  }
}

// The slot of the first new frame, counted from the ring's first: below zero for a pinned one.
HOPPER_DEVICE int first_slot(const KvAppendParams& params) {
  const int64_t slot = *params.step - params.sink_frames;
  return static_cast<int>(slot < 0 ? slot : slot % params.ring_frames);
}

// The cache row of a new token. Pinned slots lie before the ring, which the new frames enter or go
// round at most once. Frames are few: counting them takes fewer registers than a division.
HOPPER_DEVICE int cache_row(const KvAppendParams& params, int slot, int token) {
  while (token >= params.tokens_per_frame) {
    token -= params.tokens_per_frame;
    if (++slot == params.ring_frames) slot = 0;
  }
  return params.text_tokens + (params.sink_frames + slot) * params.tokens_per_frame + token;
}

}  // namespace aapt
