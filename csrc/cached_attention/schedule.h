// The work of each CTA: stream-K over the key tiles of all query tiles.
//
// 1196 queries of 3 heads are 30 tiles of 128 rows: whole tiles cannot fill 132 SMs. So the work of
// all tiles is laid end to end, in steps, and cut into equal shares, one per CTA. A share covers
// whole query tiles and, at either end, a piece of one; `partials.cuh` adds the pieces up. The
// lengths depend on counters in device memory, so every CTA computes its own share.
//
// A CTA does the pieces of its share from the last to the first, so that it begins with a tile's
// first keys, as nearly all others do. Where it has all of a tile, or nothing but a part of one,
// the order of the keys is free: it is rotated so that step n is at key tile n, modulo the length.
// Thus the CTAs of a head read the same keys at about the same time, and the L2 cache serves all
// but the first (benchmarks/schedule_model.py counts the bytes).
//
// One step is one tile of queries, 64 per warpgroup, against one tile of keys. A last tile of at
// most 64 queries is *narrow*: its warpgroups share the key tiles in turn for these rows, so that
// it costs a half of its steps, or a third.
#pragma once

#include "attention/intervals.h"
#include "cached_attention/params.h"
#include "hopper/hopper.cuh"

namespace aapt {

// The cache rows that one batch entry sees: one interval, or three if the sink frames have a query
// of their own.
template <int kKeyTile, int kGroup>
struct VisibleKeys : KeyIntervals<kKeyTile, kGroup> {
  using Intervals = KeyIntervals<kKeyTile, kGroup>;
  using Intervals::text, Intervals::sink, Intervals::rest;

  HOPPER_DEVICE VisibleKeys(const CachedAttentionParams& params, int batch) {
    const int64_t step = *params.step, capacity = params.sink_frames + params.ring_frames;
    const int64_t made = step + params.frames;
    const int frames = static_cast<int>(made < capacity ? made : capacity);
    const int sinks = frames < params.sink_frames ? frames : params.sink_frames;
    const int64_t given = params.text_lens[batch];
    const int length =
        given < 0 ? 0 : static_cast<int>(given < params.text_tokens ? given : params.text_tokens);
    const int end = params.text_tokens + frames * params.tokens_per_frame;
    text = {params.text_tokens - length, params.text_tokens};
    sink = {text.end, text.end};
    if (params.pinned_rotation) sink.end += sinks * params.tokens_per_frame;
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
  int rotation;        // of the order of its key tiles

  // The key tile that comes i-th.
  HOPPER_DEVICE int tile_at(int i) const {
    const int turned = i + rotation;
    return first + (turned < count ? turned : turned - count);
  }
};

// Keys: VisibleKeys.
template <class Keys, int kConsumers>
class Schedule {
 public:
  HOPPER_DEVICE Schedule(const CachedAttentionParams& params, int cta, int ctas) : params_(params) {
    total_ = 0;
    for (int batch = 0; batch < params.batch; ++batch) {
      total_ += params.heads * steps_per_head(key_tiles(batch));
    }
    ctas_ = ctas < total_ ? ctas : total_;
    begin_ = share_begin(cta < ctas_ ? cta : ctas_);
    end_ = share_begin(cta < ctas_ ? cta + 1 : ctas_);
  }

  // Sets `piece` to the next one of this CTA's share; false if none is left.
  HOPPER_DEVICE bool next(Piece& piece) {
    if (begin_ >= end_) return false;
    int rest = end_ - 1, keys = key_tiles(0);
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
    piece.steps = piece.narrow ? narrow_steps(keys) : keys;
    rest -= piece.tile * keys;
    piece.steps_begin = end_ - 1 - rest;

    const int begin = piece.steps_begin > begin_ ? piece.steps_begin : begin_;
    const int steps = end_ - begin;
    const int tiles_per_step = piece.narrow ? kConsumers : 1;
    piece.first = (begin - piece.steps_begin) * tiles_per_step;
    piece.count = steps * tiles_per_step;
    if (piece.first + piece.count > keys) piece.count = keys - piece.first;
    piece.starts = piece.first == 0;
    piece.whole = steps == piece.steps;
    piece.rotation = 0;
    if (!piece.narrow && piece.whole) piece.rotation = done_ % piece.count;
    if (!piece.narrow && done_ == 0) {
      piece.rotation = (piece.count - piece.first % piece.count) % piece.count;
    }
    end_ = begin;
    done_ += steps;
    return true;
  }

  // The CTAs that share the query tile of a piece: first and last.
  HOPPER_DEVICE Interval sharers(const Piece& piece) const {
    return {cta_of(piece.steps_begin), cta_of(piece.steps_begin + piece.steps - 1)};
  }

 private:
  HOPPER_DEVICE int key_tiles(int batch) const { return Keys(params_, batch).tiles(); }

  HOPPER_DEVICE int wide_tiles() const {
    return (params_.tokens + (kConsumers - 1) * kQueryBlock - 1) / (kConsumers * kQueryBlock);
  }

  HOPPER_DEVICE static int narrow_steps(int keys) { return (keys + kConsumers - 1) / kConsumers; }

  HOPPER_DEVICE int steps_per_head(int keys) const {
    const bool narrow = params_.query_tiles > wide_tiles();
    return wide_tiles() * keys + (narrow ? narrow_steps(keys) : 0);
  }

  HOPPER_DEVICE int share_begin(int cta) const {
    return static_cast<int>(static_cast<int64_t>(cta) * total_ / ctas_);
  }

  // The CTA whose share holds a step: the last one that begins at it or before.
  HOPPER_DEVICE int cta_of(int step) const {
    return static_cast<int>(((static_cast<int64_t>(step) + 1) * ctas_ - 1) / total_);
  }

  const CachedAttentionParams& params_;
  int total_, ctas_;
  int begin_, end_;  // what is left of the share
  int done_ = 0;     // steps
};

}  // namespace aapt
