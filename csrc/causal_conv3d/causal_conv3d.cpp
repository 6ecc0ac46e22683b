// causal_conv3d on sm_90a: checks that keep the kernels inside their buffers, outputs, launches.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "causal_conv3d/params.h"
#include "host.h"

namespace aapt {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Rounds towards minus infinity.
int floor_div(int a, int b) { return (a >= 0 ? a : a - b + 1) / b; }

// Checks (batch, channels, frames, height, width) with channels last in memory. If `pitch` is
// given, batch entries may be further apart than their frames; `pitch` receives the distance in
// frames.
void check_frames(const char* name, const Tensor& tensor, const Tensor& x,
                  std::initializer_list<int64_t> shape, int* pitch = nullptr) {
  bool fits = tensor.dim() == 5;
  for (int64_t i = 0; i < 5 && fits; ++i) fits = tensor.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits && on_device_of(x, tensor) && tensor.scalar_type() == ScalarType::BFloat16,
                  name, ": expected a bfloat16 tensor of its contract's shape on the device of x");
  int64_t stride = 1;
  bool last = true;
  for (const int64_t dim : {1, 4, 3, 2}) {
    last = last && (tensor.size(dim) == 1 || tensor.stride(dim) == stride);
    stride *= tensor.size(dim);
  }
  const int64_t frame = std::max<int64_t>(stride / std::max<int64_t>(tensor.size(2), 1), 1);
  const int64_t frames = tensor.size(0) == 1 ? tensor.size(2) : tensor.stride(0) / frame;
  if (pitch != nullptr) *pitch = static_cast<int>(frames);
  last = last && (tensor.size(0) == 1 || tensor.stride(0) == frames * frame);
  STD_TORCH_CHECK(last && (pitch != nullptr || frames == tensor.size(2) || tensor.numel() == 0),
                  name, ": expected channels last in memory (torch.channels_last_3d)");
  STD_TORCH_CHECK(is_row_aligned(tensor), name, ": expected a 16-byte boundary");
}

const uint16_t* check_vector(const char* name, const OptionalTensor& tensor, const Tensor& x,
                             int64_t size) {
  if (!tensor) return nullptr;
  return static_cast<const uint16_t*>(check_dense(name, *tensor, x, ScalarType::BFloat16, {size}));
}

// A new tensor (batch, channels, frames, height, width) with channels last in memory.
Tensor new_frames(const Tensor& x, int64_t channels, int64_t frames, int64_t height, int64_t width,
                  ScalarType dtype = ScalarType::BFloat16) {
  const Tensor dense =
      torch::stable::new_empty(x, {x.size(0), frames, height, width, channels}, dtype);
  using torch::stable::transpose;
  return transpose(transpose(transpose(dense, 3, 4), 2, 3), 1, 2);
}

// Taps of a phase along one axis: the first input element that they read, and the number of input
// elements that they read at most. Output element `repeats` n + copy, tap i, reads input element n
// + (copy + i - lead) / repeats.
int first_tap(int lead, int repeats, int copy) { return floor_div(copy - lead, repeats); }
int count_taps(int kernel, int lead, int repeats) {
  int most = 0;
  for (int copy = 0; copy < repeats; ++copy) {
    const int last = floor_div(copy + kernel - 1 - lead, repeats);
    most = std::max(most, last - first_tap(lead, repeats, copy) + 1);
  }
  return most;
}

void set_phases(CausalConv3dParams& params, int kt, int kh, int kw, bool starts) {
  // Output frames at the start of a stream that are left out
  const int skipped = starts ? params.repeats - 1 : 0;
  params.taps_time = count_taps(kt, kt - 1, params.repeats);
  params.taps_y = count_taps(kh, kh / 2, params.copies);
  params.taps_x = count_taps(kw, kw / 2, params.copies);
  params.margin_y = kh / 2;
  params.margin_x = kw / 2;
  params.out_frames = params.frames * params.repeats - skipped;
  for (int time = 0; time < params.repeats; ++time) {
    for (int y = 0; y < params.copies; ++y) {
      for (int x = 0; x < params.copies; ++x) {
        ConvPhase& phase = params.phase[params.phases++];
        phase.first_frame = time < skipped ? 1 : 0;
        phase.frames = params.frames - phase.first_frame;
        phase.tap_time = first_tap(kt - 1, params.repeats, time);
        phase.tap_y = first_tap(kh / 2, params.copies, y);
        phase.tap_x = first_tap(kw / 2, params.copies, x);
        phase.out_frame = phase.first_frame * params.repeats + time - skipped;
        phase.out_y = y;
        phase.out_x = x;
      }
    }
  }
}

// The number of matrices of packed weights: one per tap and phase.
int64_t products(const CausalConv3dParams& params) {
  return int64_t{params.phases} * params.taps_time * params.taps_y * params.taps_x;
}

// Checks the options that decide how weights are folded and packed.
void check_geometry(int64_t kt, int64_t kh, int64_t kw, const std::vector<int64_t>& upsample) {
  STD_TORCH_CHECK(
      std::min(upsample[0], upsample[1]) >= 1 && std::max(upsample[0], upsample[1]) <= kMaxRepeats,
      "upsample: expected at most ", kMaxRepeats, " for the sm_90a kernel");
  STD_TORCH_CHECK((kh == 1 || kh == 3) && (kw == 1 || kw == 3) && kt >= 1 && kt <= 64,
                  "weight: expected kh and kw of 1 or 3 for the sm_90a kernel");
}

// Reads AAPT_CONV_SLABS: how the input reaches shared memory (config.cuh).
bool takes_shifted_slabs() {
  const char* const value = std::getenv("AAPT_CONV_SLABS");
  const std::string slabs = value == nullptr ? "whole" : value;
  STD_TORCH_CHECK(slabs == "whole" || slabs == "shifted",
                  "AAPT_CONV_SLABS: expected whole or shifted, got ", slabs);
  return slabs == "shifted";
}

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "causal_conv3d: ", error);
}

// (out_channels, in_channels, kt, kh, kw) -> (phases x taps, out_channels, in_channels)
Tensor pack_weights(Tensor weight, std::vector<int64_t> upsample) {
  STD_TORCH_CHECK(
      weight.dim() == 5 && on_device(weight) && weight.scalar_type() == ScalarType::BFloat16,
      "weight: expected five dimensions of bfloat16 on the device");
  const int64_t kt = weight.size(2), kh = weight.size(3), kw = weight.size(4);
  check_geometry(kt, kh, kw, upsample);
  const DeviceScope scope(weight);
  CausalConv3dParams params{};
  params.frames = 1;
  params.out_channels = weight.size(0);
  params.in_channels = weight.size(1);
  params.repeats = upsample[0];
  params.copies = upsample[1];
  set_phases(params, kt, kh, kw, false);
  const Tensor packed =
      torch::stable::new_empty(weight, {products(params), weight.size(0), weight.size(1)});
  if (packed.numel() == 0) return packed;
  PackParams pack{};
  pack.weight = static_cast<const uint16_t*>(device_pointer(weight));
  for (int i = 0; i < 5; ++i) pack.stride[i] = weight.stride(i);
  pack.kt = kt;
  pack.kh = kh;
  pack.kw = kw;
  pack.packed = static_cast<uint16_t*>(device_pointer(packed));
  const int32_t device = weight.get_device_index();
  check_launch(launch_pack_sm90(pack, params, multiprocessors(device), current_stream(device)));
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> causal_conv3d(Tensor x, Tensor packed, OptionalTensor bias,
                                                 OptionalTensor state, OptionalTensor norm_weight,
                                                 double eps, bool silu, OptionalTensor residual,
                                                 std::vector<int64_t> kernel,
                                                 std::vector<int64_t> upsample, bool replicate,
                                                 bool pixels, OptionalTensor next_norm_weight,
                                                 bool keep_out, bool keep_state) {
  STD_TORCH_CHECK(x.dim() == 5 && packed.dim() == 3, "x, packed: expected 5 and 3 dimensions");
  const int64_t batch = x.size(0), in_channels = x.size(1), frames = x.size(2);
  const int64_t height = x.size(3), width = x.size(4), out_channels = packed.size(1);
  const int64_t kt = kernel[0], kh = kernel[1], kw = kernel[2];
  check_geometry(kt, kh, kw, upsample);
  STD_TORCH_CHECK(in_channels % 8 == 0 && in_channels > 0,
                  "x: expected a multiple of 8 channels for the sm_90a kernel");
  STD_TORCH_CHECK(
      !(residual && (out_channels % 8 != 0 || pixels)),
      "residual: expected none for pixels, or for channels that are not a multiple of 8");
  STD_TORCH_CHECK(!(next_norm_weight && (out_channels % 8 != 0 || pixels)),
                  "next_norm_weight: expected none for pixels, or for channels that are not a "
                  "multiple of 8");
  const int64_t past = (kt - 1 + upsample[0] - 1) / upsample[0];
  const int64_t outputs = batch * upsample[0] * frames * upsample[1] * upsample[1] * height * width;
  // Pixels and tiles are counted with 32 bits
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(frames >= 1 && outputs * std::max(out_channels, in_channels) < 256 * kMost,
                  "x: expected one frame or more, and fewer than 2^39 outputs");
  STD_TORCH_CHECK(std::max(outputs, batch * (frames + past) * height * width) < kMost,
                  "x: expected fewer than 2^31 pixels");
  CausalConv3dParams params{};
  check_frames("x", x, x, {batch, in_channels, frames, height, width});
  if (state) {
    check_frames("state", *state, x, {batch, in_channels, past, height, width}, &params.past_pitch);
  }
  const DeviceScope scope(x);

  params.batch = batch;
  params.frames = frames;
  params.height = height;
  params.width = width;
  params.in_channels = in_channels;
  params.out_channels = out_channels;
  params.repeats = upsample[0];
  params.copies = upsample[1];
  params.replicate = replicate;
  params.shifted_slabs = takes_shifted_slabs();
  params.pixels = pixels;
  params.eps = static_cast<float>(eps);
  set_phases(params, kt, kh, kw, !state);
  params.weights = check_dense("packed", packed, x, ScalarType::BFloat16,
                               {products(params), out_channels, in_channels});
  params.bias = check_vector("bias", bias, x, out_channels);
  const int64_t out_height = height * upsample[1], out_width = width * upsample[1];
  if (residual) {
    check_frames("residual", *residual, x,
                 {batch, out_channels, params.out_frames, out_height, out_width});
    params.residual = device_pointer(*residual);
  }
  const auto output = [&](bool wanted, ScalarType dtype = ScalarType::BFloat16) {
    if (!wanted) return torch::stable::new_empty(x, {0});
    return new_frames(x, out_channels, params.out_frames, out_height, out_width, dtype);
  };
  // If there are more channels than a tile holds, a pass over the output norms them
  const bool norms = next_norm_weight.has_value();
  const bool in_epilogue = norms && out_channels <= kMaxNormedChannels;
  const bool writes_out = keep_out || (norms && !in_epilogue);
  const Tensor active = output(norms);
  const Tensor out = output(writes_out, pixels ? ScalarType::Byte : ScalarType::BFloat16);
  // Without norm and SiLU, x is read in place, and its last frames need not be kept
  const bool identity = !norm_weight && !silu;
  STD_TORCH_CHECK(keep_state || identity, "keep_state: expected True with a norm or SiLU");
  const Tensor new_state = keep_state ? new_frames(x, in_channels, past, height, width)
                                      : torch::stable::new_empty(x, {0});
  if (x.numel() == 0 || out_channels == 0) return {out, new_state, active};
  if (writes_out) params.out = device_pointer(out);
  if (in_epilogue) params.active = device_pointer(active);
  params.next_norm_weight = check_vector("next_norm_weight", next_norm_weight, x, out_channels);

  // Activated frames that are still needed after this call go straight to the new state, where
  // the convolution reads them.
  const int64_t kept = identity ? 0 : past;
  params.past_frames = past;
  params.past = state ? device_pointer(*state) : nullptr;
  params.body_frames = std::max<int64_t>(frames - kept, 0);
  params.tail_frames = kept;
  params.tail_offset = kept - frames;
  Tensor activated = x;
  if (!identity) activated = new_frames(x, in_channels, params.body_frames, height, width);
  params.body = device_pointer(activated);
  params.tail = device_pointer(new_state);

  const int32_t device = x.get_device_index();
  const int processors = multiprocessors(device);
  void* const stream = current_stream(device);

  ActivateParams activate{};
  activate.batch = params.batch;
  activate.frames = params.frames;
  activate.pixels = height * width;
  activate.channels = params.in_channels;
  activate.first = std::min<int64_t>(frames - past, 0);
  if (identity) activate.first = keep_state ? frames - past : frames;
  activate.past_frames = past;
  activate.past_pitch = params.past_pitch;
  activate.body_frames = frames - past;
  activate.tail_frames = past;
  activate.tail_offset = past - frames;
  activate.x = device_pointer(x);
  activate.past = params.past;
  activate.body = identity ? nullptr : const_cast<void*>(params.body);
  activate.tail = device_pointer(new_state);
  activate.norm_weight = check_vector("norm_weight", norm_weight, x, in_channels);
  activate.eps = params.eps;
  activate.silu = silu;
  activate.replicate = replicate;
  if (activate.first < params.frames) {
    check_launch(launch_activate_sm90(activate, processors, stream));
  }
  check_launch(launch_causal_conv3d_sm90(params, processors, stream));

  if (norms && !in_epilogue) {
    ActivateParams next{};
    next.batch = params.batch;
    next.frames = next.body_frames = params.out_frames;
    next.pixels = out_height * out_width;
    next.channels = params.out_channels;
    next.x = params.out;
    next.body = device_pointer(active);
    next.norm_weight = params.next_norm_weight;
    next.eps = params.eps;
    next.silu = true;
    check_launch(launch_activate_sm90(next, processors, stream));
  }
  return {keep_out ? out : output(false), new_state, active};
}

}  // namespace
}  // namespace aapt

AAPT_KERNELS(m) {
  m.impl("causal_conv3d", TORCH_BOX(&aapt::causal_conv3d));
  m.impl("causal_conv3d_pack", TORCH_BOX(&aapt::pack_weights));
}
