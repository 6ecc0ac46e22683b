// causal_conv3d on sm_90a: checks that keep the kernels inside their buffers, outputs, launches.
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "causal_conv3d/params.h"
#include "host.h"

namespace aapt {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Rounds towards minus infinity.
int floor_div(int a, int b) { return (a >= 0 ? a : a - b + 1) / b; }

// Checks (batch, channels, frames, height, width) with channels last in memory.
void check_frames(const char* name, const Tensor& tensor, const Tensor& x,
                  std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == 5;
  for (int64_t i = 0; i < 5 && fits; ++i) fits = tensor.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits && on_device_of(x, tensor) && tensor.scalar_type() == ScalarType::BFloat16,
                  name, ": expected a bfloat16 tensor of its contract's shape on the device of x");
  int64_t stride = 1;
  for (const int64_t dim : {1, 4, 3, 2, 0}) {
    STD_TORCH_CHECK(tensor.size(dim) == 1 || tensor.stride(dim) == stride, name,
                    ": expected channels last in memory (torch.channels_last_3d)");
    stride *= tensor.size(dim);
  }
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

// Taps of a phase along one axis: where they begin, and how many input elements they fall on.
// Output element `repeats` n + copy, tap i, reads input element n + (copy + i - lead) / repeats.
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
  const int skipped = starts ? params.repeats - 1 : 0;  // output frames at the front of a stream
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

std::tuple<Tensor, Tensor> causal_conv3d(Tensor x, Tensor weight, OptionalTensor bias,
                                         OptionalTensor state, OptionalTensor norm_weight,
                                         double eps, bool silu, OptionalTensor residual,
                                         std::vector<int64_t> stride, std::vector<int64_t> upsample,
                                         bool replicate, bool pixels) {
  STD_TORCH_CHECK(x.dim() == 5 && weight.dim() == 5, "x, weight: expected five dimensions");
  const int64_t batch = x.size(0), in_channels = x.size(1), frames = x.size(2);
  const int64_t height = x.size(3), width = x.size(4), out_channels = weight.size(0);
  const int64_t kt = weight.size(2), kh = weight.size(3), kw = weight.size(4);
  STD_TORCH_CHECK(std::max({stride[0], stride[1], stride[2]}) == 1,
                  "stride: expected (1, 1, 1) for the sm_90a kernel");
  STD_TORCH_CHECK(
      std::min(upsample[0], upsample[1]) >= 1 && std::max(upsample[0], upsample[1]) <= kMaxRepeats,
      "upsample: expected at most ", kMaxRepeats, " for the sm_90a kernel");
  STD_TORCH_CHECK((kh == 1 || kh == 3) && (kw == 1 || kw == 3) && kt >= 1 && kt <= 64,
                  "weight: expected kh and kw of 1 or 3 for the sm_90a kernel");
  STD_TORCH_CHECK(weight.size(1) == in_channels && in_channels % 8 == 0 && in_channels > 0,
                  "x: expected a multiple of 8 channels for the sm_90a kernel");
  STD_TORCH_CHECK(!(residual && (out_channels % 8 != 0 || pixels)),
                  "residual: expected none with pixels or other than a multiple of 8 channels");
  STD_TORCH_CHECK(on_device_of(x, weight) && weight.scalar_type() == ScalarType::BFloat16,
                  "weight: expected bfloat16 on the device of x");
  const int64_t past = (kt - 1 + upsample[0] - 1) / upsample[0];
  const int64_t outputs = batch * upsample[0] * frames * upsample[1] * upsample[1] * height * width;
  // Pixels and tiles are counted with 32 bits
  STD_TORCH_CHECK(frames >= 1 && outputs * std::max(out_channels, in_channels) <
                                     int64_t{256} * std::numeric_limits<int32_t>::max(),
                  "x: expected one frame or more, and fewer than 2^39 outputs");
  check_frames("x", x, x, {batch, in_channels, frames, height, width});
  if (state) check_frames("state", *state, x, {batch, in_channels, past, height, width});
  const DeviceScope scope(x);

  CausalConv3dParams params{};
  params.batch = batch;
  params.frames = frames;
  params.height = height;
  params.width = width;
  params.in_channels = in_channels;
  params.out_channels = out_channels;
  params.repeats = upsample[0];
  params.copies = upsample[1];
  params.replicate = replicate;
  params.pixels = pixels;
  set_phases(params, kt, kh, kw, !state);
  params.bias = check_vector("bias", bias, x, out_channels);
  const int64_t out_height = height * upsample[1], out_width = width * upsample[1];
  if (residual) {
    check_frames("residual", *residual, x,
                 {batch, out_channels, params.out_frames, out_height, out_width});
    params.residual = device_pointer(*residual);
  }
  const Tensor out = new_frames(x, out_channels, params.out_frames, out_height, out_width,
                                pixels ? ScalarType::Byte : ScalarType::BFloat16);
  const Tensor new_state = new_frames(x, in_channels, past, height, width);
  if (x.numel() == 0 || out_channels == 0) return {out, new_state};
  params.out = device_pointer(out);

  // Activated frames that are still needed after this call go straight to the new state, where
  // the convolution reads them. Without norm and SiLU x is read in place.
  const bool identity = !norm_weight && !silu;
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
  const auto check = [](const char* error) {
    STD_TORCH_CHECK(error == nullptr, "causal_conv3d: ", error);
  };

  ActivateParams activate{};
  activate.batch = params.batch;
  activate.frames = params.frames;
  activate.pixels = height * width;
  activate.channels = params.in_channels;
  activate.first = std::min<int64_t>(frames - past, 0);
  if (identity) activate.first = frames - past;
  activate.past_frames = past;
  activate.body_frames = frames - past;
  activate.tail_frames = past;
  activate.tail_offset = past - frames;
  activate.x = device_pointer(x);
  activate.past = params.past;
  activate.body = identity ? nullptr : const_cast<void*>(params.body);
  activate.tail = device_pointer(new_state);
  activate.norm_weight = check_vector("norm_weight", norm_weight, x, in_channels);
  activate.eps = static_cast<float>(eps);
  activate.silu = silu;
  activate.replicate = replicate;
  if (activate.first < params.frames) check(launch_activate_sm90(activate, processors, stream));

  const Tensor packed =
      torch::stable::new_empty(x, {params.phases * params.taps_time * params.taps_y * params.taps_x,
                                   out_channels, in_channels});
  PackParams pack{};
  pack.weight = static_cast<const uint16_t*>(device_pointer(weight));
  for (int i = 0; i < 5; ++i) pack.stride[i] = weight.stride(i);
  pack.kt = kt;
  pack.kh = kh;
  pack.kw = kw;
  pack.packed = static_cast<uint16_t*>(device_pointer(packed));
  params.weights = pack.packed;
  check(launch_pack_sm90(pack, params, processors, stream));
  check(launch_causal_conv3d_sm90(params, processors, stream));
  return {out, new_state};
}

}  // namespace
}  // namespace aapt

AAPT_KERNELS(m) { m.impl("causal_conv3d", TORCH_BOX(&aapt::causal_conv3d)); }
