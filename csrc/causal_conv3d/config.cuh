// The shapes, the shared memory and the tensor maps of causal_conv3d's kernel.
#pragma once

#include "causal_conv3d/params.h"
#include "causal_conv3d/schedule.h"
#include "hopper/hopper.cuh"

namespace aapt {

using namespace hopper;

constexpr int kConsumers = 2;        // warpgroups that multiply
constexpr int kGroupChannels = 64;   // output channels of one consumer: rows of its product
constexpr int kDepth = 64;           // input channels of a slab
constexpr int kMmaDepth = 16;        // input channels of one instruction
constexpr uint32_t kRowBytes = 128;  // of one pixel, and of one output channel's weights
constexpr uint32_t kSwizzleStride = 8 * kRowBytes;
constexpr int kMaxTapRows = 32;  // rows of float sums that fit the staging of a tile

// Divides a tile between the two consumers. If there are more than 64 output channels, they share
// pixels and take 64 channels each; else they share weights and take one frame each. With very few
// channels, a product has a row for every tap in space and channel (kTapsInRows).
//
// A slab is a tile and the margin around it; taps start anywhere inside its swizzle pattern. With
// kShiftedSlabs a slab has as many columns as a tile and is fetched once per tap in x, shifted by
// it: every tap then starts on a boundary of the pattern, for 27 instead of 20.7 bytes per clock
// and multiprocessor from L2.
template <bool kShareWeights_, bool kTapsInRows_ = false, bool kShiftedSlabs_ = false>
struct Config {
  static constexpr bool kShareWeights = kShareWeights_, kTapsInRows = kTapsInRows_;
  static constexpr bool kShiftedSlabs = kShiftedSlabs_;
  static constexpr int kMaxWidth = kTileWidth + (kShiftedSlabs ? 0 : 2 * kMaxMargin);
  static constexpr int kMaxSlabPixels = kMaxWidth * (kTileHeight + 2 * kMaxMargin);
  static constexpr int kSlabBytes = (kMaxSlabPixels * kRowBytes + 1023) / 1024 * 1024;
  static constexpr int kChannels = kShareWeights ? kGroupChannels : kConsumers * kGroupChannels;
  static constexpr int kFrames = kShareWeights ? kConsumers : 1;
  // 227 KB of shared memory hold this many; two frames at once need two slabs at once
  static constexpr int kSlabs = kShareWeights ? 3 : 2;
  static constexpr int kWeightStages = kShareWeights ? 3 : 4;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // Within 65536: 128 x (56 + 2 x 224). With 40, the fetching threads spill.
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  using Schedule = ConvSchedule<kChannels, kFrames, kTapsInRows>;

  struct Shared {
    alignas(1024) uint8_t slab[kSlabs][kSlabBytes];
    alignas(1024) uint8_t weights[kWeightStages][kChannels * kRowBytes];
    // The residual of a tile, then its output: rows of 64 channels
    alignas(1024) uint8_t staging[kConsumers][kTilePixels * kRowBytes];
    // Of each warp's 16 channels, for the norm; then the scale of every pixel, in part 0
    float squares[kConsumers][kGroupChannels / 16][kTilePixels];
    uint64_t slab_full[kSlabs], slab_ready[kSlabs], slab_empty[kSlabs];
    uint64_t weights_full[kWeightStages], weights_empty[kWeightStages];
    uint64_t residual_full[kConsumers], staging_empty[kConsumers];
  };
};

struct TensorMaps {
  TensorMap past, body, tail, weights;
  TensorMap out[kMaxPhases], active[kMaxPhases], residual[kMaxPhases];
};

HOPPER_DEVICE int depth_blocks(const CausalConv3dParams& params) {
  return (params.in_channels + kDepth - 1) / kDepth;
}
template <class C>
HOPPER_DEVICE int slab_width(const CausalConv3dParams& params) {
  return kTileWidth + (C::kTapsInRows || C::kShiftedSlabs ? 0 : 2 * params.margin_x);
}
template <class C>
HOPPER_DEVICE int slab_height(const CausalConv3dParams& params) {
  return kTileHeight + (C::kTapsInRows ? 0 : 2 * params.margin_y);
}
// Products per slab
template <class C>
HOPPER_DEVICE int slab_taps_y(const CausalConv3dParams& params) {
  return C::kTapsInRows ? 1 : params.taps_y;
}
template <class C>
HOPPER_DEVICE int slab_taps_x(const CausalConv3dParams& params) {
  return C::kTapsInRows || C::kShiftedSlabs ? 1 : params.taps_x;
}
// Shifts of a slab, each with the taps of one column
template <class C>
HOPPER_DEVICE int slab_shifts(const CausalConv3dParams& params) {
  return C::kShiftedSlabs ? params.taps_x : 1;
}
// Passes over the input frames: one per block of channels and shift
template <class C>
HOPPER_DEVICE int passes_of(const CausalConv3dParams& params) {
  return depth_blocks(params) * slab_shifts<C>(params);
}
// Input frames that a tile reads, per pass
template <class C>
HOPPER_DEVICE int slabs_per_pass(const CausalConv3dParams& params) {
  return params.taps_time + C::kFrames - 1;
}
// The input column of a slab's first pixel, for a tile and a shift. With `replicate` a slab that
// would lie beyond the last column begins with it, which has the pixels that are repeated.
template <class C>
HOPPER_DEVICE int slab_left(const CausalConv3dParams& params, const ConvTile& tile, int shift) {
  if (!C::kShiftedSlabs) return tile.x - params.margin_x;
  const int left = tile.x + params.phase[tile.phase].tap_x + shift;
  return params.replicate && left >= params.width ? params.width - 1 : left;
}

// The output channels and the frame of one warpgroup in a tile.
template <class C>
HOPPER_DEVICE int group_channel(const ConvTile& tile, int group) {
  return tile.out_channel + (C::kShareWeights ? 0 : group * kGroupChannels);
}
template <class C>
HOPPER_DEVICE int group_frame(const ConvTile& tile, int group) {
  return tile.frame + (C::kShareWeights ? group : 0);
}

}  // namespace aapt
