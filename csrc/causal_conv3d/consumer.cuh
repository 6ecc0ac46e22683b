// The consumers of causal_conv3d, the warpgroups that multiply. They also add bias and residual
// and, if a tile holds all output channels, apply the norm and the SiLU of the next convolution.
#pragma once

#include "causal_conv3d/config.cuh"

namespace aapt {

// Named barriers: one per consumer, and one for both.
enum Barrier { kGroupBarrier = 1, kBothGroups = kGroupBarrier + kConsumers };

// A thread of warp w holds two output channels: 16 w + lane / 4, and 8 channels after it. Of every
// 8 pixels it holds two: 2 (lane % 4), and the next. Element i of its sums is channel half (i / 2)
// % 2, pixel 8 (i / 4) + 2 (lane % 4) + i % 2.
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
      multiply(tile, n);
      if constexpr (C::kTapsInRows) {
        add_rows(tile, schedule);
      } else if (params_.pixels || params_.out_channels % 8 != 0) {
        store_elements(tile);
      } else if (params_.active != nullptr) {
        store_normed(tile, n);
      } else {
        add_and_stage<false>(tile, n, true);
        store_staging(maps_.out[tile.phase], tile);
      }
    }
    wait_for_store();
  }

 private:
  // The n-th tile of this CTA.
  HOPPER_DEVICE void multiply(const ConvTile& tile, uint32_t n) {
    const ConvPhase& phase = params_.phase[tile.phase];
    const int slabs = slabs_per_pass<C>(params_), passes = passes_of<C>(params_);
    const int taps_y = slab_taps_y<C>(params_), taps_x = slab_taps_x<C>(params_);
    const uint32_t row = slab_width<C>(params_) * kRowBytes;
    uint32_t first = 0;
    if (!C::kTapsInRows) first = (phase.tap_y + params_.margin_y) * row;
    if (!C::kTapsInRows && !C::kShiftedSlabs) first += (phase.tap_x + params_.margin_x) * kRowBytes;
    const uint64_t weights_desc = make_desc(
        smem_u32(shared_.weights[0]) + (C::kShareWeights ? 0 : group_ * kGroupChannels * kRowBytes),
        16, kSwizzleStride, SW_128);
    // Groups of 8 pixels are one row of the slab apart
    const uint64_t slab_desc = make_desc(smem_u32(shared_.slab[0]) + first, 16, row, SW_128);
    // With one frame each, the second group's frames are one later
    const int offset = C::kShareWeights ? group_ : 0;
    int accumulate = 0;
    uint64_t* slab_in_use = nullptr;
    uint64_t* weights_in_use = nullptr;
    reg_fence(sums_);
    for (int pass = 0; pass < passes; ++pass) {
      for (int i = 0; i < slabs; ++i, ++slabs_) {
        const Stage<C::kSlabs> slab(slabs_);
        uint64_t* const slab_empty = &shared_.slab_empty[slab.index];
        mbar_wait(
            params_.replicate ? &shared_.slab_ready[slab.index] : &shared_.slab_full[slab.index],
            slab.parity);
        if (i < offset || i >= offset + params_.taps_time) {  // a frame of the other group only
          warp_sync();
          release(slab_empty);
          continue;
        }
        const uint64_t slab_at = advance(slab_desc, slab.index * C::kSlabBytes);
        for (int y = 0; y < taps_y; ++y) {
          for (int x = 0; x < taps_x; ++x, ++weights_) {
            const Stage<C::kWeightStages> weights(weights_);
            mbar_wait(&shared_.weights_full[weights.index], weights.parity);
            multiply_tap(advance(weights_desc, weights.index * sizeof(shared_.weights[0])),
                         advance(slab_at, y * row + x * kRowBytes), accumulate);
            wgmma_wait<1>();  // the tap before has been read
            if (accumulate) {
              release(weights_in_use);
            } else {
              take_back_staging(n);  // while the first product runs
            }
            weights_in_use = &shared_.weights_empty[weights.index];
            accumulate = 1;
            if (slab_in_use != nullptr) release(slab_in_use);
            slab_in_use = nullptr;
          }
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
  HOPPER_DEVICE void multiply_tap(uint64_t weights, uint64_t pixels, int accumulate) {
    wgmma_fence();
    HOPPER_UNROLL
    for (int k = 0; k < kDepth / kMmaDepth; ++k) {
      const uint32_t offset = k * kMmaDepth * 2;
      wgmma_ss<kTilePixels, 0, 0>(sums_, advance(weights, offset), advance(pixels, offset),
                                  k == 0 ? accumulate : 1);
    }
    wgmma_commit();
  }

  HOPPER_DEVICE float load_value(const uint16_t* values, int channel) const {
    if (values == nullptr || channel >= params_.out_channels) return 0.0f;
    return float_from_bits(static_cast<uint32_t>(load_readonly(values + channel)) << 16);
  }

  // Loads the values of this thread's two channels; zeros after the last channel.
  HOPPER_DEVICE void load_values(const uint16_t* values, const ConvTile& tile,
                                 float (&two)[2]) const {
    const int channel = group_channel<C>(tile, group_) + warp_ * 16 + lane_ / 4;
    two[0] = load_value(values, channel);
    two[1] = load_value(values, channel + 8);
  }

  // The address of this lane's row, for ldmatrix and stmatrix of 16 channels x 16 pixels.
  HOPPER_DEVICE uint8_t* staged(int i) const {
    const uint32_t pixel = 16 * i + lane_ / 16 * 8 + lane_ % 8;
    return shared_.staging[group_] + sw128(pixel, warp_ * 32 + lane_ / 8 % 2 * 16);
  }

  // Adds bias and residual. If `stage`, stores the result in the staging, where the channels of a
  // pixel are contiguous. If `keep`, keeps it in the sums too.
  template <bool keep>
  HOPPER_DEVICE void add_and_stage(const ConvTile& tile, uint32_t n, bool stage) {
    const bool has_residual = params_.residual != nullptr;
    float bias[2];
    load_values(params_.bias, tile, bias);
    if (has_residual) mbar_wait(&shared_.residual_full[group_], n % 2);
    group_sync();  // the staging has been taken back
    HOPPER_UNROLL
    for (int i = 0; i < kTilePixels / 16; ++i) {  // 16 channels x 16 pixels
      uint8_t* const at = staged(i);
      float* const sums = sums_ + 8 * i;
      uint32_t residual[4] = {0, 0, 0, 0};
      if (has_residual) ldmatrix_x4_trans(residual, at);
      uint32_t pairs[4];
      HOPPER_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float2 more = unpack_bf16(residual[j]);
        const float low = sums[2 * j] + bias[j % 2] + more.x;
        const float high = sums[2 * j + 1] + bias[j % 2] + more.y;
        if (keep) sums[2 * j] = low;
        if (keep) sums[2 * j + 1] = high;
        pairs[j] = pack_bf16(low, high);
      }
      if (stage) stmatrix_x4_trans(at, pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }

  // Stores the staging by TMA. One thread starts this; nobody waits before wait_for_store.
  HOPPER_DEVICE void store_staging(const TensorMap& map, const ConvTile& tile) {
    fence_proxy_async();
    group_sync();
    if (threadIdx.x % 128 == 0) {
      tma_store_5d(&map, shared_.staging[group_], group_channel<C>(tile, group_), tile.x, tile.y,
                   group_frame<C>(tile, group_) - params_.phase[tile.phase].first_frame,
                   tile.batch);
      tma_store_commit();
    }
  }

  // Waits until the staging has been read, in the thread that stores it.
  HOPPER_DEVICE void wait_for_store() {
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
  }

  // Waits for the store of the tile before, and lets the residual of the n-th tile in.
  HOPPER_DEVICE void take_back_staging(uint32_t n) {
    wait_for_store();
    if (n > 0 && params_.residual != nullptr && threadIdx.x % 128 == 0) {
      mbar_arrive(&shared_.staging_empty[group_]);
    }
  }

  // Stores the SiLU of the RMS norm over the channels of every pixel, from sums before rounding. If
  // the tile itself is wanted, it is stored first.
  HOPPER_DEVICE void store_normed(const ConvTile& tile, uint32_t n) {
    const bool has_out = params_.out != nullptr;
    add_and_stage<true>(tile, n, has_out);
    if (has_out) store_staging(maps_.out[tile.phase], tile);
    scale_pixels();
    float weight[2];
    load_values(params_.next_norm_weight, tile, weight);
    weight[0] *= 0.5f;
    weight[1] *= 0.5f;
    if (has_out) {
      wait_for_store();
      group_sync();
    }
    HOPPER_UNROLL
    for (int i = 0; i < kTilePixels / 16; ++i) {
      float* const sums = sums_ + 8 * i;
      uint32_t pairs[4];
      HOPPER_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float low = sums[2 * j] * weight[j % 2], high = sums[2 * j + 1] * weight[j % 2];
        pairs[j] = pack_bf16(silu_of_twice(low), silu_of_twice(high));
      }
      stmatrix_x4_trans(staged(i), pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    store_staging(maps_.active[tile.phase], tile);
  }

  // Divides the sums of every pixel by their root mean square over the channels.
  HOPPER_DEVICE void scale_pixels() {
    auto& squares = shared_.squares;
    HOPPER_UNROLL
    for (int i = 0; i < kTilePixels / 32; ++i) {
      squares[group_][warp_][32 * i + my_pixel_of_32()] = sum_of_squares(sums_ + 16 * i);
    }
    channels_sync();
    float two[2] = {0.0f, 0.0f};  // of pixels 128 apart
    HOPPER_UNROLL
    for (int i = 0; i < 2; ++i) {
      HOPPER_UNROLL
      for (int part = 0; part < C::kChannels / 16; ++part) {
        two[i] +=
            squares[C::kShareWeights ? group_ : part / 4][part % 4][threadIdx.x % 128 + 128 * i];
      }
    }
    channels_sync();  // all squares have been read
    float* const scales = squares[group_][0];
    HOPPER_UNROLL
    for (int i = 0; i < 2; ++i) {
      scales[threadIdx.x % 128 + 128 * i] =
          1.0f / sqrtf(two[i] / params_.out_channels + params_.eps);
    }
    group_sync();
    HOPPER_UNROLL
    for (int i = 0; i < kTilePixels / 8; ++i) {
      const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * i + 2 * (lane_ % 4));
      sums_[4 * i] *= scale.x;
      sums_[4 * i + 1] *= scale.y;
      sums_[4 * i + 2] *= scale.x;
      sums_[4 * i + 3] *= scale.y;
    }
  }

  // Sums the squares of a warp's 16 channels, for 32 pixels. Lanes that hold other channels of
  // equal pixels exchange halves, so that each lane ends with one pixel.
  HOPPER_DEVICE float sum_of_squares(const float* sums) const {
    float part[8];
    HOPPER_UNROLL
    for (int i = 0; i < 8; ++i) {
      const float low = sums[4 * (i / 2) + i % 2], high = sums[4 * (i / 2) + 2 + i % 2];
      part[i] = low * low + high * high;
    }
    HOPPER_UNROLL
    for (int half = 4; half > 0; half /= 2) {
      const bool upper = lane_ & (4 * half);
      HOPPER_UNROLL
      for (int i = 0; i < half; ++i) {
        const float sent = upper ? part[i] : part[i + half];
        part[i] = (upper ? part[i + half] : part[i]) + shfl_xor(sent, 4 * half);
      }
    }
    return part[0];
  }
  HOPPER_DEVICE int my_pixel_of_32() const {
    const int part = lane_ / 4;
    return part / 2 * 8 + 2 * (lane_ % 4) + part % 2;
  }

  // 2 x sigmoid(2 x) with one approximation, because approximations bound the epilogue.
  static HOPPER_DEVICE float silu_of_twice(float x) { return x + x * tanh_approx(x); }

  HOPPER_DEVICE void group_sync() const { bar_sync(kGroupBarrier + group_, 128); }
  // A barrier for all threads that hold channels of a pixel.
  HOPPER_DEVICE void channels_sync() const {
    if constexpr (C::kShareWeights) {
      group_sync();
    } else {
      bar_sync(kBothGroups, 128 * kConsumers);
    }
  }

  // Stores element by element, for bytes or for channels that are not a multiple of 8.
  HOPPER_DEVICE void store_elements(const ConvTile& tile) {
    float bias[2];
    load_values(params_.bias, tile, bias);
    HOPPER_UNROLL
    for (int i = 0; i < kTilePixels / 2; ++i) {
      const int half = i / 2 % 2, pixel = 8 * (i / 4) + 2 * (lane_ % 4) + i % 2;
      const int channel = group_channel<C>(tile, group_) + warp_ * 16 + lane_ / 4 + 8 * half;
      store_element(tile, tile.x + pixel % kTileWidth, tile.y + pixel / kTileWidth, channel,
                    sums_[i] + bias[half]);
    }
  }

  // Stores the output of a product that has a row for every tap in space and channel: an output
  // element is the sum of one row per tap, shifted by the tap.
  HOPPER_DEVICE void add_rows(const ConvTile& tile, const typename C::Schedule& schedule) {
    const int taps = params_.taps_y * params_.taps_x, channels = params_.out_channels;
    auto* const rows = reinterpret_cast<float*>(shared_.staging[group_]);
    // Rows of the product are 256 floats apart; the exclusive or puts them into different banks
    const auto at = [](int row, int pixel) { return row * kTilePixels + (pixel ^ row % 4 * 8); };
    group_sync();  // the tile before has been added up
    HOPPER_UNROLL
    for (int i = 0; i < kTilePixels / 2; i += 2) {
      const int row = warp_ * 16 + lane_ / 4 + i / 2 % 2 * 8;
      const int pixel = 8 * (i / 4) + 2 * (lane_ % 4);
      if (row < taps * channels) {
        *reinterpret_cast<float2*>(rows + at(row, pixel)) = {sums_[i], sums_[i + 1]};
      }
    }
    group_sync();
    const int width = schedule.tile_width();
    const int elements = width * schedule.tile_height() * channels;
    for (int i = threadIdx.x % 128; i < elements; i += 128) {
      const int channel = i % channels, x = i / channels % width, y = i / channels / width;
      float sum = load_value(params_.bias, channel);
      for (int tap = 0; tap < taps; ++tap) {
        const int pixel = (y + tap / params_.taps_x) * kTileWidth + x + tap % params_.taps_x;
        sum += rows[at(tap * channels + channel, pixel)];
      }
      store_element(tile, tile.x + x, tile.y + y, channel, sum);
    }
  }

  HOPPER_DEVICE void store_element(const ConvTile& tile, int x, int y, int channel, float value) {
    const ConvPhase& phase = params_.phase[tile.phase];
    const int frame = group_frame<C>(tile, group_) - phase.first_frame;
    if (frame >= phase.frames || channel >= params_.out_channels || x >= params_.width ||
        y >= params_.height) {
      return;
    }
    const int64_t out_frame = static_cast<int64_t>(tile.batch) * params_.out_frames +
                              phase.out_frame + frame * params_.repeats;
    const int64_t row =
        out_frame * params_.height * params_.copies + phase.out_y + y * params_.copies;
    const int64_t at = (row * params_.width * params_.copies + phase.out_x + x * params_.copies) *
                           params_.out_channels +
                       channel;
    if (params_.pixels) {
      const float level = rintf(127.5f * value + 127.5f);
      static_cast<uint8_t*>(params_.out)[at] =
          static_cast<uint8_t>(fminf(fmaxf(level, 0.0f), 255.0f));
    } else {
      static_cast<uint16_t*>(params_.out)[at] = static_cast<uint16_t>(pack_bf16(value, 0.0f));
    }
  }

  // Gives a buffer back, by one lane of each warp.
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

}  // namespace aapt
