// The work of one CTA of causal_conv3d, tile by tile, as its producers and consumers both walk it.
#pragma once

#include "causal_conv3d/params.h"
#include "hopper/hopper.cuh"

namespace aapt {

// A tile of output: pixels of one frame, or of two successive frames, and a block of output
// channels. Its coordinates count input pixels; `phase` says which output elements they are. With
// the taps in the rows of the product (kTapsInRows), the margin is part of the tile.
constexpr int kTileWidth = 8;  // a group of rows of wgmma
constexpr int kTileHeight = 32;
constexpr int kTilePixels = kTileWidth * kTileHeight;

struct ConvTile {
  int phase, batch, frame, y, x, out_channel;
};

template <int kChannels, int kFrames, bool kTapsInRows>
class ConvSchedule {
 public:
  HOPPER_DEVICE explicit ConvSchedule(const CausalConv3dParams& params)
      : params_(params),
        width_(kTileWidth - (kTapsInRows ? 2 * params.margin_x : 0)),
        height_(kTileHeight - (kTapsInRows ? 2 * params.margin_y : 0)),
        columns_((params.width + width_ - 1) / width_),
        rows_((params.height + height_ - 1) / height_),
        blocks_((params.out_channels + kChannels - 1) / kChannels) {}

  // Output pixels of one frame per tile.
  HOPPER_DEVICE int tile_width() const { return width_; }
  HOPPER_DEVICE int tile_height() const { return height_; }

  // Finds the tile of an index; false after the last tile. Neighbouring CTAs share weights and the
  // edges of their tiles.
  HOPPER_DEVICE bool locate(int index, ConvTile& tile) const {
    for (int phase = 0; phase < params_.phases; ++phase) {
      const int groups = (params_.phase[phase].frames + kFrames - 1) / kFrames;
      const int count = columns_ * rows_ * groups * params_.batch * blocks_;
      if (index < count) {
        tile.phase = phase;
        tile.x = index % columns_ * width_;
        index /= columns_;
        tile.y = index % rows_ * height_;
        index /= rows_;
        tile.frame = params_.phase[phase].first_frame + index % groups * kFrames;
        index /= groups;
        tile.batch = index % params_.batch;
        tile.out_channel = index / params_.batch * kChannels;
        return true;
      }
      index -= count;
    }
    return false;
  }

 private:
  const CausalConv3dParams& params_;
  const int width_, height_, columns_, rows_, blocks_;
};

}  // namespace aapt
