// Operations of all lanes of a warp: each lane stores its values, the last lane acts, then all
// continue.
#pragma once

#include "sim/state.h"

namespace aapt::sim {

enum CollectiveKind {
  SHUFFLE,
  WARP_SYNC,
  ELECT,
  MATRIX,
  REGISTERS,
  NAMED_BARRIER,
  WGMMA_FENCE,
  WGMMA_WAIT
};

using Slot = uint64_t[4];

struct Warp {
  int index;
  uint64_t collectives;  // completed
  int arrived, left;
  CollectiveKind kind;
  Site site;
  // Two sets: a lane may enter the next collective before others have read this one's values.
  Slot slots[2][kWarp];
  int registers;  // of each thread
};
extern std::vector<Warp> warps;

// Returns the slots of all lanes. `last` runs in the lane that arrives last.
Slot* collective(CollectiveKind kind, const uint64_t* values, int count, void (*last)(Warp&, Slot*),
                 const char* what);

}  // namespace aapt::sim
