#pragma once

#include "hopper/hopper.cuh"

namespace aapt::sim {

// Runs the block at blockIdx to its end. Returns false if the block failed; last_report() says how.
bool run_block(const Call& call);

}  // namespace aapt::sim
