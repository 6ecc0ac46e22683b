// The warps of causal_conv3d that bring slabs, weights and residuals into shared memory.
#pragma once

#include "causal_conv3d/config.cuh"

namespace aapt {

// Calls visit(tile, pass, input frame, n) for every slab of this CTA, in order.
template <class C, typename Visit>
HOPPER_DEVICE void for_slabs(const CausalConv3dParams& params, Visit visit) {
  const typename C::Schedule schedule(params);
  ConvTile tile;
  uint32_t n = 0;
  for (int index = blockIdx.x; schedule.locate(index, tile); index += gridDim.x) {
    for (int pass = 0; pass < passes_of<C>(params); ++pass) {
      for (int i = 0; i < slabs_per_pass<C>(params); ++i, ++n) {
        visit(tile, pass, tile.frame + params.phase[tile.phase].tap_time + i, n);
      }
    }
  }
}

template <class C>
HOPPER_DEVICE void fetch_slabs(typename C::Shared& shared, const TensorMaps& maps,
                               const CausalConv3dParams& params) {
  const uint32_t bytes = slab_width<C>(params) * slab_height<C>(params) * kRowBytes;
  const int shifts = slab_shifts<C>(params);
  for_slabs<C>(params, [&](const ConvTile& tile, int pass, int frame, uint32_t n) {
    const int channel = pass / shifts * kDepth;
    const int left = slab_left<C>(params, tile, pass % shifts);
    const Stage<C::kSlabs> stage(n);
    uint64_t* const full = &shared.slab_full[stage.index];
    mbar_wait(&shared.slab_empty[stage.index], stage.parity ^ 1);
    mbar_arrive_expect_tx(full, bytes);
    const auto load = [&](const TensorMap& map, int in_frame) {
      tma_load_5d(shared.slab[stage.index], &map, full, channel, left, tile.y - params.margin_y,
                  in_frame, tile.batch);
    };
    if (frame < 0 && params.past != nullptr) {
      load(maps.past, params.past_frames + frame);
      return;
    }
    if (frame < 0 && params.replicate) frame = 0;
    // A frame before the first or after the last is outside the map: zeros
    if (frame < params.body_frames || params.tail_frames == 0) {
      load(params.body_frames > 0 ? maps.body : maps.tail, frame);
    } else {
      load(maps.tail, frame + params.tail_offset);
    }
  });
}

// Repeats the outermost pixels of a frame in the margin around it. For one warp.
template <class C>
HOPPER_DEVICE void replicate_edges(typename C::Shared& shared, const CausalConv3dParams& params) {
  const int width = slab_width<C>(params), pixels = width * slab_height<C>(params);
  const auto clamp = [](int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; };
  for_slabs<C>(params, [&](const ConvTile& tile, int pass, int, uint32_t n) {
    const Stage<C::kSlabs> stage(n);
    uint8_t* const slab = shared.slab[stage.index];
    const int left = slab_left<C>(params, tile, pass % slab_shifts<C>(params));
    const int top = tile.y - params.margin_y;
    mbar_wait(&shared.slab_full[stage.index], stage.parity);
    for (int pixel = threadIdx.x % 32; pixel < pixels; pixel += 32) {
      const int x = left + pixel % width, y = top + pixel / width;
      const int inside_x = clamp(x, params.width), inside_y = clamp(y, params.height);
      // Pixels further out are never read
      const bool near = x <= params.width && y <= params.height;
      if ((x == inside_x && y == inside_y) || !near) continue;
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
  const int shifts = slab_shifts<C>(params);
  const int products = params.taps_time * slab_taps_y<C>(params) * slab_taps_x<C>(params);
  ConvTile tile;
  uint32_t n = 0;
  for (int index = blockIdx.x; schedule.locate(index, tile); index += gridDim.x) {
    for (int pass = 0; pass < passes_of<C>(params); ++pass) {
      const int channel = pass / shifts * kDepth, shift = pass % shifts;
      for (int tap = 0; tap < products; ++tap, ++n) {
        const Stage<C::kWeightStages> stage(n);
        uint64_t* const full = &shared.weights_full[stage.index];
        mbar_wait(&shared.weights_empty[stage.index], stage.parity ^ 1);
        mbar_arrive_expect_tx(full, sizeof(shared.weights[0]));
        // The innermost taps are those in x: a shift takes one column of them
        tma_load_3d(shared.weights[stage.index], &maps.weights, full, channel, tile.out_channel,
                    (tile.phase * products + tap) * shifts + shift);
      }
    }
  }
}

template <class C>
HOPPER_DEVICE void fetch_residuals(typename C::Shared& shared, const TensorMaps& maps,
                                   const CausalConv3dParams& params) {
  const typename C::Schedule schedule(params);
  ConvTile tile;
  uint32_t n = 0;
  for (int index = blockIdx.x; schedule.locate(index, tile); index += gridDim.x, ++n) {
    for (int group = 0; group < kConsumers; ++group) {
      uint64_t* const full = &shared.residual_full[group];
      mbar_wait(&shared.staging_empty[group], n % 2 ^ 1);
      mbar_arrive_expect_tx(full, sizeof(shared.staging[0]));
      tma_load_5d(shared.staging[group], &maps.residual[tile.phase], full,
                  group_channel<C>(tile, group), tile.x, tile.y,
                  group_frame<C>(tile, group) - params.phase[tile.phase].first_frame, tile.batch);
    }
  }
}

}  // namespace aapt
