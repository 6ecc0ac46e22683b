// Bank conflicts in shared memory, counted per place in the source.
#pragma once

#include "sim/state.h"

namespace aapt::sim {

void reset_banks();  // at the start of a block

// One lane's access. The n-th access of every lane at one place is taken as one instruction of the
// warp; lanes that took another path leave theirs uncounted.
void count_banks(const Thread& thread, Site site, uint32_t address, size_t bytes);

// One instruction whose 32 rows of 16 bytes are read or written 8 at a time.
void count_matrix_banks(Site site, const uint32_t (&addresses)[kWarp]);

}  // namespace aapt::sim
