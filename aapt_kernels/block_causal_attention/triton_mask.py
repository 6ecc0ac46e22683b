"""The mask of `FrameLayout` inside Triton kernels (csrc/block_causal_attention/mask.h has it in
words): the keys that a tile of query rows sees, and the rows that see a tile of keys. Both are cut
into tiles. Tiles without an edge of the mask come first, in a loop of their own.

`layout` is (text, tokens, frames, before, window, sinks): text tokens, tokens per frame, frames of
the query, earlier frames of the key, and window and sink in frames.
"""

import triton
import triton.language as tl

INTEGERS = ["rows", "text", "tokens", "frames", "before", "window", "sinks", "key_rows"]


@triton.jit
def views(row, layout):
    """Return sink_end, window_begin and window_end of query rows, as key rows; nothing for text."""
    text, tokens, _, before, window, sinks = layout
    in_frame = row >= text
    position = before + tl.maximum(row - text, 0) // tokens
    shown = tl.minimum(sinks, position + 1)
    oldest = tl.maximum(position - window, shown)
    sink_end = text + tl.where(in_frame, shown * tokens, 0)
    window_begin = text + tl.where(in_frame, oldest * tokens, 0)
    window_end = text + tl.where(in_frame, (position + 1) * tokens, 0)
    return sink_end, window_begin, window_end


@triton.jit
def text_length(text_lens, batch, text):
    """Return the number of text tokens of a sample, 0 ... text."""
    if text_lens is None:
        return text
    else:
        return tl.minimum(tl.maximum(tl.load(text_lens + batch), 0), text).to(tl.int32)


@triton.jit
def visible_keys(row, length, layout, SPLIT: tl.constexpr):
    """Return the intervals of text, sink and window that query rows see, each as (begin,
    clean_begin, clean_end, end): all rows see the clean part. Unless SPLIT, intervals that touch
    are joined."""
    text = layout[0]
    sink_end, window_begin, window_end = views(row, layout)
    last_sink, last = tl.max(sink_end, 0), tl.max(window_end, 0)
    first_sink, first_last = tl.min(sink_end, 0), tl.min(window_end, 0)
    latest = tl.max(window_begin, 0)
    # Rows of text have no window; the first one is that of the first frame
    oldest = tl.maximum(tl.min(tl.where(row >= text, window_begin, last), 0), last_sink)
    text_end, sink_begin = length, text
    if not SPLIT:
        joined = latest == last_sink  # then it is for all rows before
        first_sink = tl.where(joined, first_last, first_sink)
        last_sink = tl.where(joined, last, last_sink)
        oldest = tl.where(joined, last, oldest)
        sink_begin = tl.where(length == text, 0, text)
        text_end = tl.where(length == text, 0, length)
    return (
        (0, 0, text_end, text_end),
        (sink_begin, sink_begin, first_sink, last_sink),
        (oldest, latest, first_last, last),
    )


@triton.jit
def rows_that_see(key, end, length, rows, layout):
    """Return begin and end of the query rows that see each key; none sees padding, nor keys from
    `end` on."""
    text, tokens, frames, before, window, sinks = layout
    frame = tl.maximum(key - text, 0) // tokens
    first = tl.maximum(frame - before, 0)
    last = tl.maximum(tl.minimum(frames, frame + window - before + 1), first)
    last = tl.where(frame < sinks, frames, last)
    in_text = key < text
    begin = tl.where(in_text, 0, text + first * tokens)
    stop = tl.where(in_text, tl.where(key < length, rows, 0), text + last * tokens)
    return begin, tl.where(key < end, stop, 0)


@triton.jit
def hide(s, key, end, row, layout):
    """Return scores (rows, keys) at an edge, -inf for a key that its row does not see and from
    `end` on."""
    sink_end, window_begin, window_end = views(row, layout)
    head_end = tl.where(window_begin == sink_end, window_end, sink_end)[:, None]
    key = key[None, :]
    recent = (key >= window_begin[:, None]) & (key < window_end[:, None])
    return tl.where(((key < head_end) | recent) & (key < end), s, float("-inf"))


@triton.jit
def cut(begin, clean_begin, clean_end, end, TILE: tl.constexpr):
    """Cut an interval into tiles from `begin` on; return begin, end, and the numbers of tiles
    before the clean tiles, of clean tiles, and of all. A clean tile is within the clean
    interval."""
    count = tl.maximum(tl.cdiv(end - begin, TILE), 0)
    ahead = tl.minimum(tl.maximum(tl.cdiv(clean_begin - begin, TILE), 0), count)
    clean = tl.maximum((tl.minimum(clean_end, end) - begin) // TILE - ahead, 0)
    return begin, end, ahead, clean, count


@triton.jit
def visible_tiles(row, length, layout, SPLIT: tl.constexpr, TILE: tl.constexpr):
    """Return the intervals of `visible_keys`, each `cut`, and an empty one."""
    text, sink, recent = visible_keys(row, length, layout, SPLIT)
    return (
        cut(text[0], text[1], text[2], text[3], TILE),
        cut(sink[0], sink[1], sink[2], sink[3], TILE),
        cut(recent[0], recent[1], recent[2], recent[3], TILE),
        cut(0, 0, 0, 0, TILE),
    )


@triton.jit
def clean_place(index, a, b, c, TILE: tl.constexpr):
    """Return the begin of a clean tile, by its index among the clean tiles of three intervals."""
    after_a = index - a[3]
    after_b = after_a - b[3]
    at_c = c[0] + (c[2] + after_b) * TILE
    at = tl.where(after_b < 0, b[0] + (b[2] + after_a) * TILE, at_c)
    return tl.where(after_a < 0, a[0] + (a[2] + index) * TILE, at)


@triton.jit
def edge_place(index, a, b, c, TILE: tl.constexpr):
    """Return the begin of an edge tile, by its index among those of three intervals, and the end of
    its interval."""
    after_a = index - (a[4] - a[3])
    after_b = after_a - (b[4] - b[3])
    in_a, in_c = after_a < 0, after_b >= 0
    within = tl.where(in_a, index, tl.where(in_c, after_b, after_a))
    begin = tl.where(in_a, a[0], tl.where(in_c, c[0], b[0]))
    end = tl.where(in_a, a[1], tl.where(in_c, c[1], b[1]))
    ahead = tl.where(in_a, a[2], tl.where(in_c, c[2], b[2]))
    clean = tl.where(in_a, a[3], tl.where(in_c, c[3], b[3]))
    return begin + (within + tl.where(within < ahead, 0, clean)) * TILE, end
