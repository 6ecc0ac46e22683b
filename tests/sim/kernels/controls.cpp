// The simulator's controls, for ctypes.
#include "bugs.h"
#include "sim/control.h"

namespace sim = aapt::sim;

EXPORT void set_options(int seed, int tma, int wgmma, int races) {
  sim::options() = {};
  sim::options().seed = seed;
  sim::options().tma = tma;
  sim::options().wgmma = wgmma;
  sim::options().races = races != 0;
}
EXPORT void allow(const void* begin, size_t bytes) { sim::allow(begin, bytes); }
EXPORT void forget() { sim::forget(); }
EXPORT const sim::Statistics* get_statistics() { return &sim::statistics(); }
EXPORT void count_banks(int on) { sim::options().banks = on != 0; }
// Instructions, cycles without conflicts and cycles of all places together.
EXPORT void get_banks(uint64_t* sums) {
  for (const auto& [place, count] : sim::bank_counts()) {
    sums[0] += count.instructions;
    sums[1] += count.least;
    sums[2] += count.wavefronts;
  }
}
