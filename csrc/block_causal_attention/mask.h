// The mask (docs/method.md#3): the keys that query rows see, and the query rows that see keys. Both
// are a few integers, computed from FrameMask; only tiles at an edge need arithmetic per element.
//
// A row sees the text, the sink frames up to its own frame, and the frames of its window: three
// intervals of keys, or fewer if they touch. A key is seen by one interval of query rows. Tiles may
// cut frames, because the edges of every interval grow with the row (or key): the edges of a tile
// follow from its first and last row (or key).
#pragma once

#include "attention/intervals.h"
#include "block_causal_attention/params.h"
#include "hopper/hopper.cuh"

namespace aapt::block_causal {

HOPPER_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
HOPPER_DEVICE int larger(int a, int b) { return a < b ? b : a; }

HOPPER_DEVICE int text_length(const FrameMask& mask, int batch) {
  if (mask.text_lens == nullptr) return mask.text_tokens;
  const int64_t given = mask.text_lens[batch];
  return given < 0 ? 0 : given < mask.text_tokens ? static_cast<int>(given) : mask.text_tokens;
}

// The frames that a query row sees, as key rows: the sink from the end of the text to `sink_end`,
// and the window after it. A row of text sees no frame.
struct RowView {
  int sink_end;
  Interval window;

  RowView() = default;
  HOPPER_DEVICE RowView(const FrameMask& mask, int row) {
    const int text = mask.text_tokens, tokens = mask.tokens_per_frame;
    if (row < text) {
      sink_end = text;
      window = {text, text};
      return;
    }
    const int position = mask.frames_before + (row - text) / tokens;
    const int sinks = smaller(mask.sink_frames, position + 1);
    const int oldest = larger(position - mask.window_frames, sinks);
    sink_end = text + sinks * tokens;
    window = {text + oldest * tokens, text + (position + 1) * tokens};
  }

  // Every key before this one is seen, except padding of the text.
  HOPPER_DEVICE int head_end() const { return window.begin == sink_end ? window.end : sink_end; }
};

struct KeyTile {
  int row, end;  // first key row; keys from `end` on are not in the tile
  bool in_sink;  // multiplied with q_sink
  bool clean;    // every row sees every key

  HOPPER_DEVICE int visible() const { return end - row; }  // kKeyTile or more if all are
};

// The keys that query rows see, in tiles.
class VisibleKeys {
 public:
  HOPPER_DEVICE VisibleKeys(const FrameMask& mask, bool pinned_rotation, int batch, int first_row,
                            int last_row) {
    const int text_tokens = mask.text_tokens;
    keys_.text = {0, text_length(mask, batch)};
    const RowView first(mask, first_row), last(mask, last_row);
    const int oldest = RowView(mask, larger(first_row, text_tokens)).window.begin;
    keys_.sink = {text_tokens, last.sink_end};
    keys_.rest = {smaller(larger(oldest, last.sink_end), last.window.end), last.window.end};
    // If the window has left the sink, it has left the sink for all later rows too
    head_end_ = last.window.begin == last.sink_end ? first.head_end() : first.sink_end;
    window_ = {last.window.begin, first.window.end};
    if (pinned_rotation) return;
    // One query for all keys: neighbouring intervals become one
    const int begin = keys_.text.end == text_tokens ? 0 : text_tokens;
    if (begin == 0) keys_.text.end = 0;
    if (keys_.sink.end == keys_.rest.begin) {
      keys_.rest.begin = begin;
      keys_.sink.end = keys_.sink.begin;
    } else {
      keys_.sink.begin = begin;
    }
    plain_sink_ = true;
  }

  HOPPER_DEVICE int tiles() const { return keys_.tiles(); }
  // If the sink has a query of its own: the tiles multiplied with q_sink, or with q.
  HOPPER_DEVICE int sink_tiles() const { return keys_.sink_tiles(); }
  HOPPER_DEVICE int tiles_with(bool q_sink) const {
    return q_sink ? sink_tiles() : tiles() - sink_tiles();
  }
  HOPPER_DEVICE int index_with(bool q_sink, int i) const {
    const int text_tiles = keys_.text_tiles();
    return q_sink ? text_tiles + i : i < text_tiles ? i : i + sink_tiles();
  }

  HOPPER_DEVICE KeyTile tile(int index) const {
    const auto tile = keys_.tile(index);
    const int row = tile.row, row_end = row + kKeyTile;
    const bool seen = row_end <= head_end_ || (row >= window_.begin && row_end <= window_.end);
    return {row, tile.end, tile.in_sink && !plain_sink_, seen && row_end <= tile.end};
  }

 private:
  KeyIntervals<kKeyTile> keys_;
  // Every row sees the keys before head_end_, except padding of the text, and those of window_
  int head_end_;
  Interval window_;
  bool plain_sink_ = false;
};

// A key tile of the backward. `clean` is not used: VisibleRows says which query tiles are.
HOPPER_DEVICE KeyTile key_tile(const FrameMask& mask, const KeyRegions& regions, int index) {
  const int sink_index = index - regions.head_tiles, rest_index = sink_index - regions.sink_tiles;
  const bool in_head = sink_index < 0, in_sink = !in_head && rest_index < 0;
  const int row = in_head   ? index * kKeyTile
                  : in_sink ? regions.head_end + sink_index * kKeyTile
                            : regions.sink_end + rest_index * kKeyTile;
  const int end = in_head ? regions.head_end : in_sink ? regions.sink_end : mask.key_rows;
  return {row, smaller(end, row + kKeyTile), in_sink, false};
}

// The query rows that see a key. Text keys from `text` on are padding.
HOPPER_DEVICE Interval rows_that_see(const FrameMask& mask, int text, int key) {
  const int text_tokens = mask.text_tokens, tokens = mask.tokens_per_frame;
  if (key < text_tokens) return {0, key < text ? mask.query_rows : 0};
  const int frame = (key - text_tokens) / tokens;
  const int first = larger(frame - mask.frames_before, 0);
  int last = mask.frames;  // the first that does not see it any more
  if (frame >= mask.sink_frames) {
    last = larger(smaller(last, frame + mask.window_frames - mask.frames_before + 1), first);
  }
  return {text_tokens + first * tokens, text_tokens + last * tokens};
}

// The tiles of kRows query rows that see any key of a tile. Every row of a clean tile sees every
// key.
template <int kRows>
struct VisibleRows {
  Interval tiles = {0, 0}, clean = {0, 0};

  HOPPER_DEVICE VisibleRows(const FrameMask& mask, int batch, const KeyTile& keys) {
    const int text = text_length(mask, batch), text_tokens = mask.text_tokens;
    const bool any_text = keys.row < text;
    // Without text, the first visible key is a frame's, if any
    const int first_key = any_text ? keys.row : larger(keys.row, text_tokens);
    if (first_key >= keys.end) return;
    const Interval first = rows_that_see(mask, text, first_key);
    const Interval last = rows_that_see(mask, text, keys.end - 1);
    const int end = any_text ? mask.query_rows : last.end;
    if (first.begin < end) tiles = {first.begin / kRows, (end + kRows - 1) / kRows};
    const bool padding = text < text_tokens && keys.row < text_tokens && keys.end > text;
    if (padding || keys.end - keys.row < kKeyTile) return;
    clean = {(last.begin + kRows - 1) / kRows, first.end / kRows};
  }
};

}  // namespace aapt::block_causal
