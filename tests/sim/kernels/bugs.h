// The same kernel with and without a planted bug: under the simulator compiled once with all of
// them, one chosen at run time; for the GPU without any.
#pragma once

#include "hopper/hopper.cuh"

template <bool kPlanted>
struct Bugs {
  int chosen;
  HOPPER_DEVICE constexpr bool any() const { return kPlanted && chosen != 0; }
  HOPPER_DEVICE constexpr bool operator()(int bug) const { return kPlanted && chosen == bug; }
};

#if defined(__CUDACC__)
using BuildBugs = Bugs<false>;
#else
using BuildBugs = Bugs<true>;
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))
