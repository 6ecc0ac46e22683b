// The barriers of a kernel whose producer fetches queries once and keys and values in stages.
#pragma once

#include "hopper/hopper.cuh"

namespace aapt {

// All threads call it. One elected thread per consumer group gives queries back, one per warp keys
// and values.
template <int kStages, class Shared>
HOPPER_DEVICE void init_barriers(Shared& shared, int consumers) {
  using namespace hopper;
  if (threadIdx.x == 0) {
    mbar_init(&shared.q_full, 1);
    mbar_init(&shared.q_empty, consumers);
    for (int i = 0; i < kStages; ++i) {
      mbar_init(&shared.k_full[i], 1);
      mbar_init(&shared.v_full[i], 1);
      mbar_init(&shared.k_empty[i], 4 * consumers);
      mbar_init(&shared.v_empty[i], 4 * consumers);
    }
    fence_barrier_init();
  }
  cta_sync();
}

}  // namespace aapt
