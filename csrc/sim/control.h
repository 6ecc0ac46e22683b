// The simulator's options and reports, for host code and tests.
#pragma once

#include <cstddef>
#include <cstdint>

#define AAPT_SIM_API __attribute__((visibility("default")))

namespace aapt::sim {

// When an asynchronous operation takes effect: as it is issued, at some random moment, or as late
// as the synchronisation allows.
enum Completion { EAGER = 0, RANDOM = 1, LATE = 2 };

struct Options {
  int seed = 0;      // 0: fixed order; else random blocks, warps, elected lanes and completions
  int tma = LATE;    // Completion of bulk copies
  int wgmma = LATE;  // Completion of wgmma
  bool races = true;
  bool shuffle_blocks = true;  // if seed is not 0
  int multiprocessors = 4;     // of the device that host code sizes a grid for
};

// Counts of the last launch.
struct Statistics {
  uint64_t blocks, switches, bulk_loads, bulk_stores, wgmmas, accesses;
};

AAPT_SIM_API Options& options();
AAPT_SIM_API Statistics& statistics();
AAPT_SIM_API const char* last_report();  // of the last launch; empty if it was clean

// The global memory that kernels may touch: each access must lie wholly inside one such range.
AAPT_SIM_API void allow(const void* begin, size_t bytes);
AAPT_SIM_API void forget();

}  // namespace aapt::sim
