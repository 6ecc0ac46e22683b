// Writes values to a cache of E4M3, in which the keys of one column are side by side.
//
// A tile of keys goes through shared memory: its rows are read 16 bytes at a time, its columns are
// written in words of four keys. Tiles begin at multiples of their size, so words are aligned
// wherever a slot begins. A slot may begin and end inside a word: bytes are written there, because
// the others belong to the neighbouring frames.
#pragma once

#include "hopper/hopper.cuh"
#include "kv_append/rows.cuh"

namespace aapt {

constexpr int kWordKeys = 4;

template <int kHeadDim>
struct ValueTile {
  static constexpr int kOctets = kHeadDim / kVector;  // of columns
  static constexpr int kWords = kThreads / kOctets;   // of a column
  static constexpr int kKeys = kWordKeys * kWords;

  uint32_t words[kHeadDim][kWords];

  // Lanes with neighbouring octets write to different banks.
  HOPPER_DEVICE uint32_t& at(int column, int word) {
    return words[column][word ^ column / kVector * (kWords / kOctets)];
  }

  // The most tiles that the keys of one frame touch.
  HOPPER_DEVICE static int count(int keys) { return (keys + kKeys - 2) / kKeys + 1; }
};

// Writes the keys of a word that are between `begin` and `end`.
HOPPER_DEVICE void store_word(uint8_t* column, int key, uint32_t word, int begin, int end) {
  if (key >= begin && key + kWordKeys <= end) {
    *reinterpret_cast<uint32_t*>(column + key) = word;
    return;
  }
  HOPPER_UNROLL
  for (int i = 0; i < kWordKeys; ++i) {
    if (key + i >= begin && key + i < end) column[key + i] = word >> 8 * i & 255;
  }
}

template <int kHeadDim>
HOPPER_DEVICE void append_values(const KvAppendParams& params, void* shared) {
  using Tile = ValueTile<kHeadDim>;
  Tile& tile = *static_cast<Tile*>(shared);
  const int slot = first_slot(params);
  const int heads = params.heads, keys = params.tokens_per_frame, frames = params.tokens / keys;
  const int tiles = Tile::count(keys), all_tiles = params.batch * frames * tiles * heads;
  for (int work = blockIdx.x; work < all_tiles; work += gridDim.x) {
    const int head = work % heads, index = work / heads % tiles;
    const int frame = work / heads / tiles % frames, batch = work / heads / tiles / frames;
    const int begin = cache_row(params, slot, frame * keys), end = begin + keys;
    const int first = (begin / Tile::kKeys + index) * Tile::kKeys;
    if (first >= end) continue;
    const float inverse = 1.0f / load_readonly(params.v_scale + head);

    for (int i = threadIdx.x; i < kThreads; i += blockDim.x) {
      const int octet = i % Tile::kOctets, word = i / Tile::kOctets;
      float v[kWordKeys][kVector];
      HOPPER_UNROLL
      for (int j = 0; j < kWordKeys; ++j) {
        const int key = first + word * kWordKeys + j;
        const Place at{batch, 0, head, octet * kVector};
        uint4 raw{0, 0, 0, 0};
        if (key >= begin && key < end) {
          const auto* row = static_cast<const uint16_t*>(params.v);
          raw = *reinterpret_cast<const uint4*>(
              row + offset_of(params.v_strides, at, frame * keys + key - begin));
        }
        widen_bf16(raw, v[j]);
      }
      HOPPER_UNROLL
      for (int j = 0; j < kVector; ++j) {
        tile.at(octet * kVector + j, word) =
            pack_e4m3(v[0][j] * inverse, v[1][j] * inverse, v[2][j] * inverse, v[3][j] * inverse);
      }
    }
    cta_sync();
    for (int i = threadIdx.x; i < kHeadDim * Tile::kWords; i += blockDim.x) {
      const int column = i / Tile::kWords, word = i % Tile::kWords;
      auto* out = static_cast<uint8_t*>(params.v_cache) + batch * params.v_cache_strides.batch +
                  head * params.v_cache_strides.head + column * params.v_cache_column_stride;
      store_word(out, first + word * kWordKeys, tile.at(column, word), begin, end);
    }
    cta_sync();
  }
}

}  // namespace aapt
