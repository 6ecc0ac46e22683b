// Global memory: the ranges that kernels may touch, and the order of accesses by threads, blocks
// and engines.
#pragma once

#include "sim/races.h"
#include "sim/state.h"

namespace aapt::sim {

enum class GlobalAccess : uint8_t {
  READ,
  READ_ONLY,
  READ_ASYNC,
  WRITE,
  WRITE_ASYNC,
  ADD,
  ADD_ASYNC
};

void begin_global_launch(const Call& call);
void end_global_launch();

bool is_allowed(const void* pointer, size_t bytes);
// Fails with `what` unless the bytes lie inside one allowed range.
void check_allowed(const void* pointer, size_t bytes, Site site, const char* what);

// The access must be allowed.
void access_global(const void* pointer, size_t bytes, GlobalAccess access, const Actor& actor,
                   Site site);

// A plain access outside shared memory and the thread's stack.
void access_elsewhere(const void* pointer, size_t bytes, bool write, Site site);

}  // namespace aapt::sim
