// The work of each CTA: stream-K over the key tiles of all query tiles.
//
// 1196 queries of 3 heads are 30 tiles of 128 rows: whole tiles cannot fill 132 SMs. So the work of
// all tiles is laid end to end, in steps, and cut into equal shares, one per CTA. A share covers
// whole query tiles and, at either end, a piece of one; `partials.cuh` adds the pieces up. The
// lengths depend on counters in device memory, so every CTA computes its own share.
//
// One step is 128 queries against one tile of keys. A last tile of at most 64 queries is *narrow*:
// its two warpgroups take alternate key tiles for the same rows, which halves its cost.
#pragma once

#include "attention/intervals.h"
#include "cached_attention/params.h"
#include "hopper/hopper.cuh"

namespace aapt {

// The cache rows that one batch entry sees: one interval, or three if the sink frames have a query
// of their own.
template <int kKeyTile>
struct VisibleKeys : KeyIntervals<kKeyTile> {
  using KeyIntervals<kKeyTile>::text, KeyIntervals<kKeyTile>::sink, KeyIntervals<kKeyTile>::rest;

  HOPPER_DEVICE VisibleKeys(const CachedAttentionParams& params, int batch) {
    const int64_t step = *params.step, capacity = params.sink_frames + params.ring_frames;
    const int frames = static_cast<int>(step < capacity ? step + 1 : capacity);
    const int sinks = frames < params.sink_frames ? frames : params.sink_frames;
    const int64_t given = params.text_lens[batch];
    const int length = static_cast<int>(given < params.text_tokens ? given : params.text_tokens);
    const int end = params.text_tokens + frames * params.tokens;
    text = {params.text_tokens - length, params.text_tokens};
    sink = {text.end, text.end};
    if (params.pinned_rotation) sink.end += sinks * params.tokens;
    rest.begin = sink.end;
    rest.end = end;
    if (this->sink_tiles() == 0) {  // one query for all keys: one interval
      rest.begin = text.begin;
      text.end = text.begin;
    }
  }
};

// Part of one query tile: all its rows, some of its key tiles.
struct Piece {
  int batch, head, tile;
  bool narrow;
  int first, count;    // key tiles
  int steps_begin;     // of the whole query tile, among all steps
  int steps;           // of the whole query tile
  bool starts, whole;  // begins at the tile's first key tile; has all of them
};

template <int kKeyTile>
class Schedule {
 public:
  HOPPER_DEVICE Schedule(const CachedAttentionParams& params, int cta, int ctas) : params_(params) {
    total_ = 0;
    for (int batch = 0; batch < params.batch; ++batch) {
      total_ += params.heads * steps_per_head(key_tiles(batch));
    }
    ctas_ = ctas < total_ ? ctas : total_;
    at_ = share_begin(cta < ctas_ ? cta : ctas_);
    end_ = share_begin(cta < ctas_ ? cta + 1 : ctas_);
  }

  // Sets `piece` to the next one of this CTA's share; false if none is left.
  HOPPER_DEVICE bool next(Piece& piece) {
    if (at_ >= end_) return false;
    int rest = at_, keys = key_tiles(0);
    piece.batch = 0;
    while (rest >= params_.heads * steps_per_head(keys)) {
      rest -= params_.heads * steps_per_head(keys);
      keys = key_tiles(++piece.batch);
    }
    piece.head = rest / steps_per_head(keys);
    rest -= piece.head * steps_per_head(keys);

    const int wide = wide_tiles();
    piece.tile = rest / keys < wide ? rest / keys : wide;
    piece.narrow = piece.tile == wide;
    piece.steps = piece.narrow ? (keys + 1) / 2 : keys;
    rest -= piece.tile * keys;
    piece.steps_begin = at_ - rest;

    const int left = end_ - at_;
    const int steps = piece.steps - rest < left ? piece.steps - rest : left;
    const int tiles_per_step = piece.narrow ? 2 : 1;
    piece.first = rest * tiles_per_step;
    piece.count = steps * tiles_per_step;
    if (piece.first + piece.count > keys) piece.count = keys - piece.first;
    piece.starts = rest == 0;
    piece.whole = steps == piece.steps;
    at_ += steps;
    return true;
  }

  // The CTAs that share the query tile of a piece: first and last.
  HOPPER_DEVICE Interval sharers(const Piece& piece) const {
    return {cta_of(piece.steps_begin), cta_of(piece.steps_begin + piece.steps - 1)};
  }

 private:
  HOPPER_DEVICE int key_tiles(int batch) const {
    return VisibleKeys<kKeyTile>(params_, batch).tiles();
  }

  HOPPER_DEVICE int wide_tiles() const {
    return (params_.tokens + kQueryTile - kQueryBlock - 1) / kQueryTile;
  }

  HOPPER_DEVICE int steps_per_head(int keys) const {
    const bool narrow = params_.query_tiles > wide_tiles();
    return wide_tiles() * keys + (narrow ? (keys + 1) / 2 : 0);
  }

  HOPPER_DEVICE int share_begin(int cta) const {
    return static_cast<int>(static_cast<int64_t>(cta) * total_ / ctas_);
  }

  // The CTA whose share holds a step: the last one that begins at it or before.
  HOPPER_DEVICE int cta_of(int step) const {
    return static_cast<int>(((static_cast<int64_t>(step) + 1) * ctas_ - 1) / total_);
  }

  const CachedAttentionParams& params_;
  int total_, ctas_, at_, end_;
};

}  // namespace aapt
