// Accesses to shared memory: the agents that last wrote and read each word, and whether the next
// access is ordered after theirs.
#pragma once

#include "sim/state.h"

namespace aapt::sim {

enum Proxy : uint8_t { GENERIC = 1, ASYNC = 2 };

// The author of an access: an agent, the time on its clock, and what it knows of other clocks.
struct Actor {
  int agent;
  uint32_t time;
  const Clock* knows;
  Proxy proxy;
};
inline Actor actor_of(const Thread& thread) {
  const Clock& clock = clock_of(thread);
  return {thread.index, clock.at[thread.index], &clock, GENERIC};
}

void read_shared(const void* pointer, size_t bytes, const Actor& actor, Site site);
void write_shared(const void* pointer, size_t bytes, const Actor& actor, Site site);

// The swizzle of data from a bulk load, for wgmma to compare with its descriptor; -1 for other
// data.
void tag_layout(const void* pointer, size_t bytes, int swizzle);
int layout_of(const void* pointer);

// The words of an mbarrier: nothing else may write them.
void tag_barrier(const void* pointer);

}  // namespace aapt::sim
