// The work of each CTA. An item is one tile of one operand against all visible tiles of the other.
// Items are dealt to persistent CTAs, the longest first, there and back (0 1 2 2 1 0 0 ...), so
// that all CTAs get about equal work. Successive items alternate between the 24 (batch, head) pairs
// of a group: all CTAs work on few pairs at a time and share their data in the L2 cache.
#pragma once

#include "hopper/hopper.cuh"

namespace aapt::block_causal {

constexpr int kPairsTogether = 24;

struct Item {
  int rank;  // of the tile, 0 is the longest
  int batch, head;
};

class Schedule {
 public:
  HOPPER_DEVICE Schedule(int tiles, int batch, int heads, int cta, int ctas)
      : tiles_(tiles), pairs_(batch * heads), heads_(heads), cta_(cta), ctas_(ctas) {}

  // Sets `item` to the next one of this CTA; false if none is left.
  HOPPER_DEVICE bool next(Item& item) {
    const int place = round_ % 2 == 0 ? cta_ : ctas_ - 1 - cta_;
    const int index = round_ * ctas_ + place;
    if (index >= tiles_ * pairs_) return false;
    ++round_;
    const int group = index / (tiles_ * kPairsTogether);
    const int first = group * kPairsTogether, left = pairs_ - first;
    const int together = left < kPairsTogether ? left : kPairsTogether;
    const int within = index - first * tiles_;
    const int pair = first + within % together;
    item = {within / together, pair / heads_, pair % heads_};
    return true;
  }

 private:
  const int tiles_, pairs_, heads_, cta_, ctas_;
  int round_ = 0;
};

}  // namespace aapt::block_causal
