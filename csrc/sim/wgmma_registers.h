#pragma once

#include "sim/state.h"

namespace aapt::sim {

// Called by the hooks: fails if the access is to an accumulator that a wgmma holds.
void check_accumulator_access(const Thread& thread, const void* pointer, bool write, Site site);

}  // namespace aapt::sim
