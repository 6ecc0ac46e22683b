// The keys that queries see, as intervals of rows, and the tiles that cover the intervals.
#pragma once

#include "hopper/hopper.cuh"

namespace aapt {

struct Interval {
  int begin, end;  // rows, half-open

  HOPPER_DEVICE bool contains(int row) const { return row >= begin && row < end; }
  HOPPER_DEVICE int tiles(int rows) const { return (end - begin + rows - 1) / rows; }
};

// The text, the sink frames and the frames after them. Each is cut into tiles of kKeyTile rows,
// from a multiple of kGroup on; a tile does not cross from one interval into the next.
template <int kKeyTile, int kGroup = 1>
struct KeyIntervals {
  Interval text, sink, rest;

  struct Tile {
    int row, begin, end;  // first row of the tile; its interval
    bool in_sink;

    // Rows at the front that are not in the interval: 0 or less if none is.
    HOPPER_DEVICE int hidden() const { return begin - row; }
    HOPPER_DEVICE int visible() const { return end - row; }  // kKeyTile or more if all are
    HOPPER_DEVICE bool is_ragged() const {
      return visible() < kKeyTile || (kGroup > 1 && hidden() > 0);
    }
  };

  HOPPER_DEVICE static int tiles_of(const Interval& interval) {
    if (kGroup > 1 && interval.begin == interval.end) return 0;
    return Interval{interval.begin / kGroup * kGroup, interval.end}.tiles(kKeyTile);
  }

  HOPPER_DEVICE int text_tiles() const { return tiles_of(text); }
  HOPPER_DEVICE int sink_tiles() const { return tiles_of(sink); }
  HOPPER_DEVICE int tiles() const { return text_tiles() + sink_tiles() + tiles_of(rest); }

  HOPPER_DEVICE Tile tile(int index) const {
    const int in_texts = text_tiles(), in_sinks = sink_tiles();
    const bool in_text = index < in_texts, in_sink = !in_text && index < in_texts + in_sinks;
    const int within = in_text ? index : in_sink ? index - in_texts : index - in_texts - in_sinks;
    const int begin = in_text ? text.begin : in_sink ? sink.begin : rest.begin;
    const int end = in_text ? text.end : in_sink ? sink.end : rest.end;
    return {begin / kGroup * kGroup + within * kKeyTile, begin, end, in_sink};
  }
};

}  // namespace aapt
