// Planted bugs of the test kernels. The simulator's build has all of them, and one is chosen at run
// time; the GPU's build has none.
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
