// Arguments of the kernels of causal_conv3d. Tensors are BF16, dense in memory as (batch, frames,
// height, width, channels).
#pragma once

#include <cstdint>

namespace aapt {

// The output elements of a convolution after nearest upsampling that read the input with equal
// taps. There are `repeats` phases in time times `copies` in each direction of space.
struct ConvPhase {
  int first_frame, frames;      // input frames that make an output frame in this phase
  int tap_time, tap_y, tap_x;   // input element of the first tap, relative to the output's own
  int out_frame, out_y, out_x;  // output element of input frame first_frame, row 0, column 0
};

constexpr int kMaxRepeats = 2, kMaxMargin = 1;
constexpr int kMaxPhases = kMaxRepeats * kMaxRepeats * kMaxRepeats;

struct CausalConv3dParams {
  int batch, frames, height, width;  // of the input; past frames not counted
  int in_channels, out_channels;
  int taps_time, taps_y, taps_x;  // of one phase
  int margin_y, margin_x;         // rows and columns around a tile that its taps reach
  int repeats, copies;            // of nearest upsampling
  int out_frames;

  // Input frame t is stored in one of three tensors: t < 0 in `past`, at past_frames + t; from
  // body_frames on in `tail`, at t + tail_offset; else in `body`. Batch entries of `past` are
  // past_pitch frames apart in memory.
  int past_frames, past_pitch, body_frames, tail_frames, tail_offset;
  const void *past, *body, *tail;  // null `past`: zeros, or frame 0 with `replicate`
  bool replicate;                  // edge pixels outside the frame; else zeros
  bool shifted_slabs;              // plan B of the descriptors (config.cuh)

  int phases;
  ConvPhase phase[kMaxPhases];
  const void* weights;   // (phases, taps_time, taps_y, taps_x, out_channels, in_channels)
  const uint16_t* bias;  // null without one
  const void* residual;  // like out, or null
  void* out;             // null if only `active` is wanted
  bool pixels;           // out is uint8

  void* active;                      // out, normed and activated for the next convolution; or null
  const uint16_t* next_norm_weight;  // of that norm
  float eps;
};

// A tile norms its own pixels if there are at most this many output channels.
constexpr int kMaxNormedChannels = 128;

// Norm, SiLU and copy of the input frames from `first` on; negative frames are past ones. Frames
// before `body_frames` are written to `body`, later frames to `tail`.
struct ActivateParams {
  int batch, frames, pixels, channels;  // of x; pixels in a frame
  int first, past_frames, past_pitch, body_frames, tail_frames, tail_offset;
  const void *x, *past;  // `past` may be null, as above
  void *body, *tail;
  const uint16_t* norm_weight;  // null without a norm
  float eps;
  bool silu, replicate;
};

// (out_channels, in_channels, kt, kh, kw) in any layout -> CausalConv3dParams::weights.
struct PackParams {
  const uint16_t* weight;
  int64_t stride[5];
  int kt, kh, kw;
  uint16_t* packed;
};

// Each enqueues a kernel, and returns null or an error message.
const char* launch_causal_conv3d_sm90(const CausalConv3dParams& params, int multiprocessors,
                                      void* stream);
const char* launch_activate_sm90(const ActivateParams& params, int multiprocessors, void* stream);
const char* launch_pack_sm90(const PackParams& pack, const CausalConv3dParams& params,
                             int multiprocessors, void* stream);

}  // namespace aapt
