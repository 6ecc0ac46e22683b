// The arithmetic of a wgmma, for the rows of one warp: d[m, n] += a[m, k] b[k, n].
#pragma once

namespace aapt::sim {

constexpr int kRows = 16;  // of the 64 rows, per warp
constexpr int kMaxN = 256, kMaxK = 32;

struct Product {
  float a[kRows][kMaxK], b[kMaxK][kMaxN], d[kRows][kMaxN];
};

// Float32 sums, one product after the other.
void multiply_bf16(Product& product, int n, int k);

// Sums of 32 products of E4M3 values and the accumulator, with 13 fraction bits.
void multiply_e4m3(Product& product, int n);

}  // namespace aapt::sim
