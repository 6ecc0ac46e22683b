// The simulator's options and reports, for host code and tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

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
  bool shuffle_blocks = true;   // if seed is not 0
  int multiprocessors = 4;      // of the device that host code sizes a grid for
  int registers = 0;            // of a thread at launch, as ptxas reports; 0: as many as fit
  bool banks = false;           // count bank conflicts
  bool inside_patterns = true;  // wgmma descriptors may start inside a swizzle pattern
};

// Counts of the last launch. Bytes are those that bulk copies and reductions move between shared
// memory and the L2 cache.
struct Statistics {
  uint64_t blocks, switches, bulk_loads, bulk_stores, wgmmas, accesses, loaded_bytes, stored_bytes;
};

// Accesses to shared memory at one place of the source, by whole warps: wavefronts are cycles that
// the banks took, `least` the cycles without a conflict.
struct BankCount {
  uint64_t instructions, least, wavefronts;
};

AAPT_SIM_API Options& options();
AAPT_SIM_API Statistics& statistics();
// Of all launches with Options::banks since the last call, by place.
AAPT_SIM_API std::vector<std::pair<std::string, BankCount>> bank_counts();
AAPT_SIM_API const char* last_report();  // of the last launch; empty if it was clean

// The global memory that kernels may touch: each access must lie wholly inside one such range.
AAPT_SIM_API void allow(const void* begin, size_t bytes);
AAPT_SIM_API void forget();

}  // namespace aapt::sim
