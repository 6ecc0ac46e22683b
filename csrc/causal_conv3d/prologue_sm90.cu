// The kernels that run before the convolution: RMS norm and SiLU of every pixel and, once per
// version of the weights, packing for the tensor cores.
//
// Memory-bound: a pixel's channels are read once and written once, 16 bytes per access, by a group
// of neighbouring lanes; frames are written where the convolution reads them, the last ones
// straight into the state of the next step.

#include <algorithm>

#include "causal_conv3d/params.h"
#include "hopper/vector.cuh"

namespace aapt {
namespace {

using namespace hopper;

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;
constexpr int kVectors = 4;  // of a pixel per lane: at most 1024 channels

HOPPER_DEVICE float silu(float x) {
  constexpr float kLog2e = 1.4426950408889634f;
  return x / (1.0f + exp2_approx(-kLog2e * x));
}

// Source and destination of a pixel of a frame, as 16-byte vectors; `from` is null for zeros.
struct Pixel {
  const uint4* from;
  uint4* to;
  bool activates;
};

HOPPER_DEVICE Pixel locate(const ActivateParams& params, int index) {
  const int count = params.frames - params.first;  // frames that are written
  const int pixel = index % params.pixels;
  const int frame = params.first + index / params.pixels % count;
  const int batch = index / params.pixels / count;
  const int vectors = params.channels / kVector;
  const auto at = [&](int frames, int t) {
    return ((static_cast<int64_t>(batch) * frames + t) * params.pixels + pixel) * vectors;
  };
  Pixel place;
  const bool from_past = frame < 0 && params.past != nullptr;
  place.activates = !from_past;
  if (from_past) {
    place.from =
        static_cast<const uint4*>(params.past) + at(params.past_pitch, params.past_frames + frame);
  } else if (frame < 0 && !params.replicate) {
    place.from = nullptr;
  } else {
    place.from = static_cast<const uint4*>(params.x) + at(params.frames, frame < 0 ? 0 : frame);
  }
  place.to =
      frame < params.body_frames
          ? static_cast<uint4*>(params.body) + at(params.body_frames, frame)
          : static_cast<uint4*>(params.tail) + at(params.tail_frames, frame + params.tail_offset);
  return place;
}

HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(kThreads, kBlocksPerSm)
    activate_kernel(const HOPPER_GRID_CONSTANT ActivateParams params, int lanes) {
  const int vectors = params.channels / kVector;
  const int total = params.batch * (params.frames - params.first) * params.pixels;
  const int per_block = kThreads / lanes, per_warp = 32 / lanes;
  const int lane = threadIdx.x % lanes;
  int index = blockIdx.x * per_block + threadIdx.x / lanes;
  // The whole warp enters or leaves the loop together, as the shuffles need: lanes past the last
  // pixel redo that pixel and store nothing.
  for (int first = index / per_warp * per_warp; first < total;
       first += gridDim.x * per_block, index += gridDim.x * per_block) {
    const Pixel place = locate(params, index < total ? index : total - 1);
    uint4 raw[kVectors];
    float sum = 0.0f;
    HOPPER_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * lanes;
      raw[i] = {0, 0, 0, 0};
      if (vector < vectors && place.from != nullptr) raw[i] = place.from[vector];
      float x[kVector];
      widen_bf16(raw[i], x);
      HOPPER_UNROLL
      for (int j = 0; j < kVector; ++j) sum += x[j] * x[j];
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += shfl_xor(sum, distance);
    if (index >= total) continue;
    const float scale = 1.0f / sqrtf(sum / params.channels + params.eps);
    HOPPER_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * lanes;
      if (vector >= vectors) continue;
      if (place.activates) {
        float x[kVector];
        widen_bf16(raw[i], x);
        if (params.norm_weight != nullptr) {
          float weight[kVector];
          widen_bf16(load_readonly(reinterpret_cast<const uint4*>(params.norm_weight) + vector),
                     weight);
          HOPPER_UNROLL
          for (int j = 0; j < kVector; ++j) x[j] *= scale * weight[j];
        }
        if (params.silu) {
          HOPPER_UNROLL
          for (int j = 0; j < kVector; ++j) x[j] = silu(x[j]);
        }
        raw[i] = narrow_bf16(x);
      }
      place.to[vector] = raw[i];
    }
  }
}

// Taps of a kernel, [first, last).
struct Taps {
  int first, last;
};

// The taps that read input element `element`, for one copy of an output element.
HOPPER_DEVICE Taps taps_on(int element, int kernel, int lead, int repeats, int copy) {
  const int first = element * repeats - copy + lead, last = first + repeats;
  return {first < 0 ? 0 : first, last < kernel ? last : kernel};
}

// One element of the folded kernels: the sum of the taps that read an input element, rounded once.
HOPPER_DEVICE uint16_t folded_weight(const PackParams& pack, const CausalConv3dParams& params,
                                     int64_t index) {
  const int in = index % params.in_channels;
  index /= params.in_channels;
  const int out = index % params.out_channels;
  int tap = static_cast<int>(index / params.out_channels);
  const int tap_x = tap % params.taps_x, tap_y = tap / params.taps_x % params.taps_y;
  tap /= params.taps_x * params.taps_y;
  const int tap_time = tap % params.taps_time, which = tap / params.taps_time;
  const ConvPhase& phase = params.phase[which];
  const int copy_time = which / (params.copies * params.copies);
  const Taps ts =
      taps_on(phase.tap_time + tap_time, pack.kt, pack.kt - 1, params.repeats, copy_time);
  const Taps ys = taps_on(phase.tap_y + tap_y, pack.kh, pack.kh / 2, params.copies, phase.out_y);
  const Taps xs = taps_on(phase.tap_x + tap_x, pack.kw, pack.kw / 2, params.copies, phase.out_x);
  float sum = 0.0f;
  for (int t = ts.first; t < ts.last; ++t) {
    for (int y = ys.first; y < ys.last; ++y) {
      for (int x = xs.first; x < xs.last; ++x) {
        const int64_t at = out * pack.stride[0] + in * pack.stride[1] + t * pack.stride[2] +
                           y * pack.stride[3] + x * pack.stride[4];
        sum += float_from_bits(static_cast<uint32_t>(load_readonly(pack.weight + at)) << 16);
      }
    }
  }
  return static_cast<uint16_t>(pack_bf16(sum, 0.0f));
}

HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(kThreads, kBlocksPerSm)
    pack_weights_kernel(const HOPPER_GRID_CONSTANT PackParams pack,
                        const HOPPER_GRID_CONSTANT CausalConv3dParams params, int64_t total) {
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    pack.packed[i] = folded_weight(pack, params, i);
  }
}

unsigned blocks_for(int64_t items, int64_t per_block, int multiprocessors) {
  const int64_t resident = static_cast<int64_t>(kBlocksPerSm) * multiprocessors;
  return static_cast<unsigned>(std::min((items + per_block - 1) / per_block, resident));
}

}  // namespace

const char* launch_activate_sm90(const ActivateParams& params, int multiprocessors, void* stream) {
  if (params.channels > 32 * kVectors * kVector) return "expected at most 1024 input channels";
  int lanes = 1;
  while (lanes < 32 && lanes * kVector < params.channels) lanes *= 2;
  const int64_t pixels =
      static_cast<int64_t>(params.batch) * (params.frames - params.first) * params.pixels;
  return HOPPER_LAUNCH(activate_kernel, dim3(blocks_for(pixels, kThreads / lanes, multiprocessors)),
                       dim3(kThreads), 0, stream, params, lanes);
}

const char* launch_pack_sm90(const PackParams& pack, const CausalConv3dParams& params,
                             int multiprocessors, void* stream) {
  const int64_t total = static_cast<int64_t>(params.phases) * params.taps_time * params.taps_y *
                        params.taps_x * params.out_channels * params.in_channels;
  return HOPPER_LAUNCH(pack_weights_kernel, dim3(blocks_for(total, kThreads, multiprocessors)),
                       dim3(kThreads), 0, stream, pack, params, total);
}

}  // namespace aapt
