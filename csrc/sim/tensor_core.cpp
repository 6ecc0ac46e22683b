#include "sim/tensor_core.h"

#include <algorithm>
#include <cmath>

#include "hopper/hopper.cuh"

namespace aapt::sim {
namespace {

constexpr int kFraction = 13;      // bits that the adder and the accumulator keep
constexpr int kNothing = -100;     // exponent of zero: below that of every product
constexpr int kSmallestE4m3 = -6;  // exponent of a subnormal value
constexpr uint32_t kDropped = (1u << (23 - kFraction)) - 1;

int exponent_of(float value) {
  return static_cast<int>(hopper::bits_from_float(value) >> 23 & 255) - 127;
}

int exponent_of_e4m3(float value) {
  return value == 0.0f ? kNothing : std::max(exponent_of(value), kSmallestE4m3);
}

float power_of_two(int exponent) {
  return hopper::float_from_bits(static_cast<uint32_t>(exponent + 127) << 23);
}

// One row of the result. Exact in float32 and int32: products have 8 bits, powers of two are exact,
// and 33 terms stay below 2^21.
__attribute__((target_clones("avx2", "default"))) void add_row(const float* a,
                                                               const int* a_exponents,
                                                               const float (*b)[kMaxN],
                                                               const int (*b_exponents)[kMaxN],
                                                               float* d, int n) {
  int highest[kMaxN], sums[kMaxN];
  float scales[kMaxN];
  for (int i = 0; i < n; ++i) highest[i] = d[i] == 0.0f ? kNothing : exponent_of(d[i]);
  for (int j = 0; j < kMaxK; ++j) {
    const int exponent = a_exponents[j];
    for (int i = 0; i < n; ++i) highest[i] = std::max(highest[i], exponent + b_exponents[j][i]);
  }
  for (int i = 0; i < n; ++i) {
    highest[i] = std::max(highest[i], kNothing);
    scales[i] = power_of_two(kFraction - highest[i]);
    sums[i] = static_cast<int>(d[i] * scales[i]);
  }
  for (int j = 0; j < kMaxK; ++j) {
    for (int i = 0; i < n; ++i) sums[i] += static_cast<int>(a[j] * b[j][i] * scales[i]);
  }
  for (int i = 0; i < n; ++i) {
    const float sum = static_cast<float>(sums[i]) * power_of_two(highest[i] - kFraction);
    d[i] = hopper::float_from_bits(hopper::bits_from_float(sum) & ~kDropped);
  }
}

}  // namespace

// Not fused, so that sums are equal on every machine.
__attribute__((target_clones("avx2", "default"))) void multiply_bf16(Product& product, int n,
                                                                     int k) {
  for (int row = 0; row < kRows; ++row) {
    for (int j = 0; j < k; ++j) {
      const float a = product.a[row][j];
      const float* b = product.b[j];
      float* d = product.d[row];
      for (int column = 0; column < n; column += 8) {
        for (int i = column; i < column + 8; ++i) d[i] += a * b[i];
      }
    }
  }
}

// The adder aligns all terms at the highest exponent, which for a product is the sum of its
// factors' exponents, and cuts each towards zero; the sum is cut once more. This is the arithmetic
// of Hopper as arXiv 2511.10909 (MMA-Sim) measures it.
void multiply_e4m3(Product& product, int n) {
  int a_exponents[kRows][kMaxK], b_exponents[kMaxK][kMaxN];
  float a_invalid[kRows] = {}, b_invalid[kMaxN] = {};  // NaN if a factor is
  for (int row = 0; row < kRows; ++row) {
    for (int j = 0; j < kMaxK; ++j) {
      float& value = product.a[row][j];
      a_invalid[row] += 0.0f * value;
      if (value != value) value = 0.0f;
      a_exponents[row][j] = exponent_of_e4m3(value);
    }
  }
  for (int j = 0; j < kMaxK; ++j) {
    for (int i = 0; i < n; ++i) {
      float& value = product.b[j][i];
      b_invalid[i] += 0.0f * value;
      if (value != value) value = 0.0f;
      b_exponents[j][i] = exponent_of_e4m3(value);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    float* d = product.d[row];
    float added[kMaxN];  // to what is not finite: itself
    for (int i = 0; i < n; ++i) {
      added[i] = std::isfinite(d[i]) ? 0.0f : d[i];
      if (added[i] != 0.0f) d[i] = 0.0f;
    }
    add_row(product.a[row], a_exponents[row], product.b, b_exponents, d, n);
    for (int i = 0; i < n; ++i) d[i] += added[i] + a_invalid[row] + b_invalid[i];
  }
}

}  // namespace aapt::sim
