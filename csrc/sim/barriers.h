// mbarriers, as bulk loads see them.
#pragma once

#include "sim/state.h"

namespace aapt::sim {

struct Barrier {
  uint64_t* address;
  int index;
  uint32_t count, pending, phase;
  int64_t transfer_bytes;
  int init_thread, init_fences;
  bool known_to_async;
  Clock arriving, completed;  // what threads that arrive know; what threads that wait learn
};

// The mbarrier that a bulk load names.
Barrier& barrier_for_load(uint64_t* bar, Site site);
void complete_bytes(Barrier& barrier, uint32_t bytes);

}  // namespace aapt::sim
