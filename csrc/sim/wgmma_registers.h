#pragma once

#include "sim/state.h"

namespace aapt::sim {

// Of the hooks: fails if the access meets an accumulator that a wgmma holds.
void check_accumulator_access(const Thread& thread, const void* pointer, bool write, Site site);

}  // namespace aapt::sim
