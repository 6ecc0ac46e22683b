// Causal 3D convolution as an implicit matrix product on sm_90a (SPEC 9).
//
// Compute-bound where public decoders are not: the taps of a tile all read one halo tile in shared
// memory. Output channels are wgmma's M, pixels its N: a tile is 8 x 32 pixels, 256 columns of the
// product, and each tap a descriptor that starts some rows further into the halo tile (a *slab*:
// one input frame, 64 channels, the tile and its margin). Slabs and the weights of each tap stream
// through two rings. Input frames come from where they lie: the state, the input, the next state.
//
// Sums run over channel blocks, then taps in time, then in space, whatever the chunk: decoding in
// any chunks gives the same bits.

#include <algorithm>

#include "causal_conv3d/params.h"
#include "causal_conv3d/schedule.h"
#include "hopper/hopper.cuh"

namespace aapt {
namespace {

using namespace hopper;

constexpr int kGroups = 2;           // warpgroups that multiply
constexpr int kGroupChannels = 64;   // output channels of one
constexpr int kDepth = 64;           // input channels of a slab
constexpr int kMmaDepth = 16;        // of one instruction
constexpr uint32_t kRowBytes = 128;  // of one pixel, and of one output channel's weights
constexpr uint32_t kSwizzleStride = 8 * kRowBytes;
constexpr int kMaxSlabPixels = (kTileWidth + 2 * kMaxMargin) * (kTileHeight + 2 * kMaxMargin);
constexpr int kSlabBytes = (kMaxSlabPixels * kRowBytes + 1023) / 1024 * 1024;

// From 128 output channels on, the two warpgroups share pixels and take 64 channels each; below
// they share weights and take one frame each.
template <bool kShareWeights_>
struct Config {
  static constexpr bool kShareWeights = kShareWeights_;
  static constexpr int kChannels = kShareWeights ? kGroupChannels : kGroups * kGroupChannels;
  static constexpr int kFrames = kShareWeights ? kGroups : 1;
  // As much as 227 KB of shared memory hold; two frames in work need two slabs at a time
  static constexpr int kSlabs = kShareWeights ? 3 : 2;
  static constexpr int kWeightStages = 4;
  static constexpr int kThreads = 128 * (1 + kGroups);
  // Within 65536: 128 x (56 + 2 x 224). With 40, the fetching threads spill.
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  using Schedule = ConvSchedule<kChannels, kFrames>;

  struct Shared {
    alignas(1024) uint8_t slab[kSlabs][kSlabBytes];
    alignas(1024) uint8_t weights[kWeightStages][kChannels * kRowBytes];
    // The residual of a tile, then the tile on its way out: rows of 64 channels
    alignas(1024) uint8_t staging[kGroups][kTilePixels * kRowBytes];
    uint64_t slab_full[kSlabs], slab_ready[kSlabs], slab_empty[kSlabs];
    uint64_t weights_full[kWeightStages], weights_empty[kWeightStages];
    uint64_t residual_full[kGroups], staging_empty[kGroups];
  };
};

enum Barrier { kGroupBarrier = 1 };  // one for each group

struct TensorMaps {
  TensorMap past, body, tail, weights;
  TensorMap out[kMaxPhases], residual[kMaxPhases];
};

// A ring: the stage of the n-th use, and the parity of its barriers then.
template <int kStages>
struct Stage {
  int index;
  uint32_t parity;
  HOPPER_DEVICE explicit Stage(uint32_t n) : index(n % kStages), parity(n / kStages % 2) {}
};

HOPPER_DEVICE int depth_blocks(const CausalConv3dParams& params) {
  return (params.in_channels + kDepth - 1) / kDepth;
}
HOPPER_DEVICE int slab_width(const CausalConv3dParams& params) {
  return kTileWidth + 2 * params.margin_x;
}
HOPPER_DEVICE int slab_height(const CausalConv3dParams& params) {
  return kTileHeight + 2 * params.margin_y;
}
// Input frames that a tile reads, for each block of channels
template <class C>
HOPPER_DEVICE int slabs_per_block(const CausalConv3dParams& params) {
  return params.taps_time + C::kFrames - 1;
}

// visit(tile, first input channel, input frame, n) for every slab of this CTA, in order.
template <class C, typename Visit>
HOPPER_DEVICE void for_slabs(const CausalConv3dParams& params, Visit visit) {
  const typename C::Schedule schedule(params);
  ConvTile tile;
  uint32_t n = 0;
  for (int index = blockIdx.x; schedule.locate(index, tile); index += gridDim.x) {
    for (int block = 0; block < depth_blocks(params); ++block) {
      for (int i = 0; i < slabs_per_block<C>(params); ++i, ++n) {
        visit(tile, block * kDepth, tile.frame + params.phase[tile.phase].tap_time + i, n);
      }
    }
  }
}

template <class C>
HOPPER_DEVICE void fetch_slabs(typename C::Shared& shared, const TensorMaps& maps,
                               const CausalConv3dParams& params) {
  const uint32_t bytes = slab_width(params) * slab_height(params) * kRowBytes;
  for_slabs<C>(params, [&](const ConvTile& tile, int channel, int frame, uint32_t n) {
    const Stage<C::kSlabs> stage(n);
    uint64_t* const full = &shared.slab_full[stage.index];
    mbar_wait(&shared.slab_empty[stage.index], stage.parity ^ 1);
    mbar_arrive_expect_tx(full, bytes);
    const auto load = [&](const TensorMap& map, int in_frame) {
      tma_load_5d(shared.slab[stage.index], &map, full, channel, tile.x - params.margin_x,
                  tile.y - params.margin_y, in_frame, tile.batch);
    };
    if (frame < 0 and params.past != nullptr) {
      load(maps.past, params.past_frames + frame);
      return;
    }
    if (frame < 0 and params.replicate) frame = 0;
    // A frame before the first, or after the last, lies outside: zeros
    if (frame < params.body_frames or params.tail_frames == 0) {
      load(params.body_frames > 0 ? maps.body : maps.tail, frame);
    } else {
      load(maps.tail, frame + params.tail_offset);
    }
  });
}

// The outermost pixels of a frame in place of what lies beyond, for one warp.
template <class C>
HOPPER_DEVICE void replicate_edges(typename C::Shared& shared, const CausalConv3dParams& params) {
  const int width = slab_width(params), pixels = width * slab_height(params);
  const auto clamp = [](int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; };
  for_slabs<C>(params, [&](const ConvTile& tile, int, int, uint32_t n) {
    const Stage<C::kSlabs> stage(n);
    uint8_t* const slab = shared.slab[stage.index];
    const int left = tile.x - params.margin_x, top = tile.y - params.margin_y;
    mbar_wait(&shared.slab_full[stage.index], stage.parity);
    for (int pixel = threadIdx.x % 32; pixel < pixels; pixel += 32) {
      const int x = left + pixel % width, y = top + pixel / width;
      const int inside_x = clamp(x, params.width), inside_y = clamp(y, params.height);
      // Further out no output reads
      const bool near = x <= params.width and y <= params.height;
      if ((x == inside_x and y == inside_y) or not near) continue;
      const int from = (inside_y - top) * width + inside_x - left;
      for (uint32_t byte = 0; byte < kRowBytes; byte += 16) {
        *reinterpret_cast<uint4*>(slab + sw128(pixel, byte)) =
            *reinterpret_cast<const uint4*>(slab + sw128(from, byte));
      }
    }
    fence_proxy_async();
    warp_sync();
    if (threadIdx.x % 32 == 0) mbar_arrive(&shared.slab_ready[stage.index]);
  });
}

template <class C>
HOPPER_DEVICE void fetch_weights(typename C::Shared& shared, const TensorMaps& maps,
                                 const CausalConv3dParams& params) {
  const typename C::Schedule schedule(params);
  const int taps = params.taps_time * params.taps_y * params.taps_x;
  ConvTile tile;
  uint32_t n = 0;
  for (int index = blockIdx.x; schedule.locate(index, tile); index += gridDim.x) {
    for (int block = 0; block < depth_blocks(params); ++block) {
      for (int tap = 0; tap < taps; ++tap, ++n) {
        const Stage<C::kWeightStages> stage(n);
        uint64_t* const full = &shared.weights_full[stage.index];
        mbar_wait(&shared.weights_empty[stage.index], stage.parity ^ 1);
        mbar_arrive_expect_tx(full, sizeof(shared.weights[0]));
        tma_load_3d(shared.weights[stage.index], &maps.weights, full, block * kDepth,
                    tile.out_channel, tile.phase * taps + tap);
      }
    }
  }
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

template <class C>
HOPPER_DEVICE void fetch_residuals(typename C::Shared& shared, const TensorMaps& maps,
                                   const CausalConv3dParams& params) {
  const typename C::Schedule schedule(params);
  ConvTile tile;
  uint32_t n = 0;
  for (int index = blockIdx.x; schedule.locate(index, tile); index += gridDim.x, ++n) {
    for (int group = 0; group < kGroups; ++group) {
      uint64_t* const full = &shared.residual_full[group];
      mbar_wait(&shared.staging_empty[group], n % 2 ^ 1);
      mbar_arrive_expect_tx(full, sizeof(shared.staging[0]));
      tma_load_5d(shared.staging[group], &maps.residual[tile.phase], full,
                  group_channel<C>(tile, group), tile.x, tile.y,
                  group_frame<C>(tile, group) - params.phase[tile.phase].first_frame, tile.batch);
    }
  }
}

// One of the two warpgroups that multiply. A thread of warp w holds, of every 8 pixels, pixels
// 2 (lane % 4) and the next, of output channels 16 w + lane / 4 and that plus 8: element i of the
// sums is channel half (i / 2) % 2, pixel 8 (i / 4) + 2 (lane % 4) + i % 2.
template <class C>
class Consumer {
 public:
  HOPPER_DEVICE Consumer(typename C::Shared& shared, const TensorMaps& maps,
                         const CausalConv3dParams& params, int group)
      : shared_(shared),
        maps_(maps),
        params_(params),
        group_(group),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32 % 4) {}

  HOPPER_DEVICE void run() {
    const typename C::Schedule schedule(params_);
    ConvTile tile;
    uint32_t n = 0;
    for (int index = blockIdx.x; schedule.locate(index, tile); index += gridDim.x, ++n) {
      multiply(tile);
      if (params_.pixels or params_.out_channels % 8 != 0) {
        store_elements(tile);
      } else {
        store_tile(tile, n);
      }
    }
  }

 private:
  HOPPER_DEVICE void multiply(const ConvTile& tile) {
    const ConvPhase& phase = params_.phase[tile.phase];
    const int slabs = slabs_per_block<C>(params_), blocks = depth_blocks(params_);
    const int taps = params_.taps_y * params_.taps_x, width = slab_width(params_);
    const int first_pixel =
        (phase.tap_y + params_.margin_y) * width + phase.tap_x + params_.margin_x;
    // With one frame each, the second group's frames are one later
    const int offset = C::kShareWeights ? group_ : 0;
    int accumulate = 0;
    uint64_t* slab_in_use = nullptr;
    uint64_t* weights_in_use = nullptr;
    reg_fence(sums_);
    for (int block = 0; block < blocks; ++block) {
      for (int i = 0; i < slabs; ++i, ++slabs_) {
        const Stage<C::kSlabs> slab(slabs_);
        uint64_t* const slab_empty = &shared_.slab_empty[slab.index];
        mbar_wait(
            params_.replicate ? &shared_.slab_ready[slab.index] : &shared_.slab_full[slab.index],
            slab.parity);
        if (i < offset or i >= offset + params_.taps_time) {  // only the other group's
          warp_sync();
          release(slab_empty);
          continue;
        }
        for (int tap = 0; tap < taps; ++tap, ++weights_) {
          const Stage<C::kWeightStages> weights(weights_);
          mbar_wait(&shared_.weights_full[weights.index], weights.parity);
          const int pixel = first_pixel + tap / params_.taps_x * width + tap % params_.taps_x;
          multiply_tap(smem_u32(shared_.weights[weights.index]) +
                           (C::kShareWeights ? 0 : group_ * kGroupChannels * kRowBytes),
                       smem_u32(shared_.slab[slab.index]) + pixel * kRowBytes, width, accumulate);
          accumulate = 1;
          wgmma_wait<1>();  // the tap before has been read
          if (weights_in_use != nullptr) release(weights_in_use);
          weights_in_use = &shared_.weights_empty[weights.index];
          if (tap == 0 and slab_in_use != nullptr) release(slab_in_use);
        }
        slab_in_use = slab_empty;
      }
    }
    wgmma_wait<0>();
    reg_fence(sums_);
    release(weights_in_use);
    release(slab_in_use);
  }

  // sums += weights (64 channels, depth) x slab (depth, 256 pixels), one tap.
  HOPPER_DEVICE void multiply_tap(uint32_t weights, uint32_t pixels, int width, int accumulate) {
    wgmma_fence();
    HOPPER_UNROLL
    for (int k = 0; k < kDepth / kMmaDepth; ++k) {
      // Rows of 8 pixels lie a slab's row apart
      const uint64_t a = make_desc(weights + k * kMmaDepth * 2, 16, kSwizzleStride, SW_128);
      const uint64_t b = make_desc(pixels + k * kMmaDepth * 2, 16, width * kRowBytes, SW_128);
      wgmma_ss<kTilePixels, 0, 0>(sums_, a, b, k == 0 ? accumulate : 1);
    }
    wgmma_commit();
  }

  // Bias of this thread's two channels; zeros past the last.
  HOPPER_DEVICE void load_bias(const ConvTile& tile, float (&bias)[2]) const {
    HOPPER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int channel = group_channel<C>(tile, group_) + warp_ * 16 + lane_ / 4 + 8 * half;
      bias[half] = 0.0f;
      if (params_.bias != nullptr and channel < params_.out_channels) {
        bias[half] =
            float_from_bits(static_cast<uint32_t>(load_readonly(params_.bias + channel)) << 16);
      }
    }
  }

  // Bias and residual, then out by way of shared memory, where channels come to lie together.
  HOPPER_DEVICE void store_tile(const ConvTile& tile, uint32_t n) {
    const bool has_residual = params_.residual != nullptr;
    uint8_t* const staging = shared_.staging[group_];
    float bias[2];
    load_bias(tile, bias);
    if (has_residual) mbar_wait(&shared_.residual_full[group_], n % 2);
    bar_sync(kGroupBarrier + group_, 128);  // the tile before has left
    HOPPER_UNROLL
    for (int i = 0; i < kTilePixels / 16; ++i) {  // 16 channels x 16 pixels
      const uint32_t pixel = 16 * i + lane_ / 16 * 8 + lane_ % 8;
      uint8_t* const at = staging + sw128(pixel, warp_ * 32 + lane_ / 8 % 2 * 16);
      float* const sums = sums_ + 8 * i;
      uint32_t residual[4] = {0, 0, 0, 0};
      if (has_residual) ldmatrix_x4_trans(residual, at);
      uint32_t pairs[4];
      HOPPER_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float2 more = unpack_bf16(residual[j]);
        pairs[j] =
            pack_bf16(sums[2 * j] + bias[j % 2] + more.x, sums[2 * j + 1] + bias[j % 2] + more.y);
      }
      stmatrix_x4_trans(at, pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    fence_proxy_async();
    bar_sync(kGroupBarrier + group_, 128);
    if (threadIdx.x % 128 == 0) {
      tma_store_5d(&maps_.out[tile.phase], staging, group_channel<C>(tile, group_), tile.x, tile.y,
                   group_frame<C>(tile, group_) - params_.phase[tile.phase].first_frame,
                   tile.batch);
      tma_store_commit();
      tma_store_wait_read<0>();
      if (has_residual) mbar_arrive(&shared_.staging_empty[group_]);
    }
  }

  // For a few channels, or bytes: every thread stores what it has.
  HOPPER_DEVICE void store_elements(const ConvTile& tile) {
    const ConvPhase& phase = params_.phase[tile.phase];
    const int frame = group_frame<C>(tile, group_) - phase.first_frame;
    if (frame >= phase.frames) return;
    const int out_frame = phase.out_frame + frame * params_.repeats;
    float bias[2];
    load_bias(tile, bias);
    HOPPER_UNROLL
    for (int i = 0; i < kTilePixels / 2; ++i) {
      const int half = i / 2 % 2, pixel = 8 * (i / 4) + 2 * (lane_ % 4) + i % 2;
      const int channel = group_channel<C>(tile, group_) + warp_ * 16 + lane_ / 4 + 8 * half;
      const int x = tile.x + pixel % kTileWidth, y = tile.y + pixel / kTileWidth;
      if (channel >= params_.out_channels or x >= params_.width or y >= params_.height) continue;
      const int64_t row = (static_cast<int64_t>(tile.batch) * params_.out_frames + out_frame) *
                              params_.height * params_.copies +
                          phase.out_y + y * params_.copies;
      const int64_t at = (row * params_.width * params_.copies + phase.out_x + x * params_.copies) *
                             params_.out_channels +
                         channel;
      const float value = sums_[i] + bias[half];
      if (params_.pixels) {
        const float level = rintf(127.5f * value + 127.5f);
        static_cast<uint8_t*>(params_.out)[at] =
            static_cast<uint8_t>(fminf(fmaxf(level, 0.0f), 255.0f));
      } else {
        static_cast<uint16_t*>(params_.out)[at] = static_cast<uint16_t>(pack_bf16(value, 0.0f));
      }
    }
  }

  // By one lane of each warp.
  HOPPER_DEVICE void release(uint64_t* empty) {
    if (lane_ == 0) mbar_arrive(empty);
  }

  typename C::Shared& shared_;
  const TensorMaps& maps_;
  const CausalConv3dParams& params_;
  const int group_, lane_, warp_;
  uint32_t slabs_ = 0, weights_ = 0;  // counted over all tiles
  float sums_[kTilePixels / 2];
};

template <class C>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(C::kThreads, 1)
    causal_conv3d_kernel(HOPPER_GRID_CONSTANT const TensorMaps maps,
                         HOPPER_GRID_CONSTANT const CausalConv3dParams params) {
  HOPPER_SHARED(memory);
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kSlabs; ++i) {
      mbar_init(&shared.slab_full[i], 1);
      mbar_init(&shared.slab_ready[i], 1);
      mbar_init(&shared.slab_empty[i], 4 * kGroups);
    }
    for (int i = 0; i < C::kWeightStages; ++i) {
      mbar_init(&shared.weights_full[i], 1);
      mbar_init(&shared.weights_empty[i], 4 * kGroups);
    }
    for (int i = 0; i < kGroups; ++i) {
      mbar_init(&shared.residual_full[i], 1);
      mbar_init(&shared.staging_empty[i], 1);
    }
    fence_barrier_init();
  }
  cta_sync();

  const int group = shfl_idx(static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 0) {
    setmaxnreg_dec<C::kProducerRegisters>();
    const int warp = shfl_idx(static_cast<int>(threadIdx.x) / 32, 0);
    if (warp == 0 and elect_one()) fetch_slabs<C>(shared, maps, params);
    if (warp == 1 and elect_one()) fetch_weights<C>(shared, maps, params);
    if (warp == 2 and params.residual != nullptr and elect_one()) {
      fetch_residuals<C>(shared, maps, params);
    }
    if (warp == 3 and params.replicate) replicate_edges<C>(shared, params);
  } else {
    setmaxnreg_inc<C::kConsumerRegisters>();
    Consumer<C>(shared, maps, params, group - 1).run();
  }
}

// A tile of 64 channels, `width` x `height` pixels of one frame.
const char* make_map(TensorMap* map, const void* data, const uint64_t (&dims)[5],
                     const uint64_t (&strides)[4], uint32_t width, uint32_t height) {
  const uint32_t box[] = {kDepth, width, height, 1, 1};
  return make_tensor_map(map, const_cast<void*>(data), 2, 5, dims, strides, box, SW_128);
}

const char* make_input_map(TensorMap* map, const void* data, int frames,
                           const CausalConv3dParams& params) {
  if (data == nullptr || frames == 0) return nullptr;
  const uint64_t channels = params.in_channels, width = params.width, height = params.height;
  const uint64_t dims[] = {channels, width, height, static_cast<uint64_t>(frames),
                           static_cast<uint64_t>(params.batch)};
  const uint64_t pixel = 2 * channels, row = pixel * width, frame = row * height;
  const uint64_t strides[] = {pixel, row, frame, frame * frames};
  return make_map(map, data, dims, strides, kTileWidth + 2 * params.margin_x,
                  kTileHeight + 2 * params.margin_y);
}

// The output elements of one phase, or the residual's.
const char* make_output_map(TensorMap* map, const void* data, const ConvPhase& phase,
                            const CausalConv3dParams& params) {
  if (data == nullptr || phase.frames == 0) return nullptr;
  const uint64_t copies = params.copies, repeats = params.repeats;
  const uint64_t width = params.width, height = params.height;
  const uint64_t pixel = 2 * static_cast<uint64_t>(params.out_channels);
  const uint64_t row = pixel * width * copies, frame = row * height * copies;
  const uint64_t dims[] = {static_cast<uint64_t>(params.out_channels), width, height,
                           static_cast<uint64_t>(phase.frames),
                           static_cast<uint64_t>(params.batch)};
  const uint64_t strides[] = {pixel * copies, row * copies, frame * repeats,
                              frame * params.out_frames};
  const auto* first = static_cast<const char*>(data) + phase.out_frame * frame + phase.out_y * row +
                      phase.out_x * pixel;
  return make_map(map, first, dims, strides, kTileWidth, kTileHeight);
}

template <class C>
const char* launch(const CausalConv3dParams& params, int multiprocessors, void* stream) {
  TensorMaps maps{};
  const char* error = make_input_map(&maps.past, params.past, params.past_frames, params);
  if (!error) error = make_input_map(&maps.body, params.body, params.body_frames, params);
  if (!error) error = make_input_map(&maps.tail, params.tail, params.tail_frames, params);
  const uint64_t taps = static_cast<uint64_t>(params.taps_time) * params.taps_y * params.taps_x;
  const uint64_t row = 2 * static_cast<uint64_t>(params.in_channels);
  const uint64_t dims[] = {static_cast<uint64_t>(params.in_channels),
                           static_cast<uint64_t>(params.out_channels), params.phases * taps};
  const uint64_t strides[] = {row, row * params.out_channels};
  const uint32_t box[] = {kDepth, C::kChannels, 1};
  if (!error) {
    error = make_tensor_map(&maps.weights, const_cast<void*>(params.weights), 2, 3, dims, strides,
                            box, SW_128);
  }
  const bool by_tiles = !params.pixels && params.out_channels % 8 == 0;
  for (int i = 0; i < params.phases && by_tiles && !error; ++i) {
    error = make_output_map(&maps.out[i], params.out, params.phase[i], params);
    if (error) break;
    error = make_output_map(&maps.residual[i], params.residual, params.phase[i], params);
  }
  if (error) return error;

  const int columns = (params.width + kTileWidth - 1) / kTileWidth;
  const int rows = (params.height + kTileHeight - 1) / kTileHeight;
  const int blocks = (params.out_channels + C::kChannels - 1) / C::kChannels;
  int64_t tiles = 0;
  for (int i = 0; i < params.phases; ++i) {
    const int groups = (params.phase[i].frames + C::kFrames - 1) / C::kFrames;
    tiles += static_cast<int64_t>(columns) * rows * blocks * groups * params.batch;
  }
  if (tiles == 0) return nullptr;
  const auto ctas = static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors));
  return HOPPER_LAUNCH(causal_conv3d_kernel<C>, dim3(ctas), dim3(C::kThreads),
                       sizeof(typename C::Shared), stream, maps, params);
}

}  // namespace

const char* launch_causal_conv3d_sm90(const CausalConv3dParams& params, int multiprocessors,
                                      void* stream) {
  return params.out_channels > kGroupChannels
             ? launch<Config<false>>(params, multiprocessors, stream)
             : launch<Config<true>>(params, multiprocessors, stream);
}

}  // namespace aapt
