// Causal 3D convolution as an implicit matrix product on sm_90a (docs/method.md#9).
//
// Compute-bound, unlike public decoders, because all taps of a tile read one halo tile in shared
// memory. Output channels are wgmma's M, pixels its N: a tile is 8 x 32 pixels, 256 columns of the
// product, and each tap a descriptor that starts some rows further into the halo tile (a *slab*:
// one input frame, 64 channels, the tile and its margin). Slabs and the weights of each tap stream
// through two rings. Input frames are read where they are stored: in the state, the input or the
// next state.
//
// Such a descriptor starts inside a swizzle pattern: legal by the text of the PTX manual, without a
// public precedent. AAPT_CONV_SLABS=shifted takes slabs whose taps all start on a boundary of it.
//
// A last convolution of three channels would leave most of M empty. So its M holds a row for every
// tap in space and channel, and a tile includes its margin: one product per slab instead of nine.
// The rows, each shifted by its tap, are added up afterwards.
//
// Sums run over channel blocks, then taps in time, then in space (with shifted slabs in x before
// time), whatever the chunk: decoding in any chunks gives the same bits.

#include <algorithm>

#include "causal_conv3d/consumer.cuh"
#include "causal_conv3d/producers.cuh"

namespace aapt {
namespace {

// Fetches the maps of the first slabs and weights while the barriers are made.
HOPPER_DEVICE void prefetch_maps(const TensorMaps& maps, const CausalConv3dParams& params) {
  tma_prefetch(&maps.weights);
  if (params.past != nullptr) tma_prefetch(&maps.past);
  if (params.body_frames > 0) tma_prefetch(&maps.body);
  if (params.tail_frames > 0) tma_prefetch(&maps.tail);
}

template <class C>
HOPPER_DEVICE void convolve(const TensorMaps& maps, const CausalConv3dParams& params) {
  HOPPER_SHARED(memory);
  auto& shared = *reinterpret_cast<typename C::Shared*>(memory);
  if (threadIdx.x == 32) prefetch_maps(maps, params);
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kSlabs; ++i) {
      mbar_init(&shared.slab_full[i], 1);
      mbar_init(&shared.slab_ready[i], 1);
      mbar_init(&shared.slab_empty[i], 4 * kConsumers);
    }
    for (int i = 0; i < C::kWeightStages; ++i) {
      mbar_init(&shared.weights_full[i], 1);
      mbar_init(&shared.weights_empty[i], 4 * kConsumers);
    }
    for (int i = 0; i < kConsumers; ++i) {
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
    if (warp == 0 && elect_one()) fetch_slabs<C>(shared, maps, params);
    if (warp == 1 && elect_one()) fetch_weights<C>(shared, maps, params);
    if (warp == 2 && params.residual != nullptr && elect_one()) {
      fetch_residuals<C>(shared, maps, params);
    }
    if (warp == 3 && params.replicate) replicate_edges<C>(shared, params);
  } else {
    setmaxnreg_inc<C::kConsumerRegisters>();
    Consumer<C>(shared, maps, params, group - 1).run();
  }
}

template <class C>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(C::kThreads, 1)
    causal_conv3d_kernel(HOPPER_GRID_CONSTANT const TensorMaps maps,
                         HOPPER_GRID_CONSTANT const CausalConv3dParams params) {
  convolve<C>(maps, params);
}

using RowsConfig = Config</*kShareWeights=*/true, /*kTapsInRows=*/true>;

// Has a name of its own because it stores no tiles, which tools/sm90_gate.py requires of the kernel
// above.
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(RowsConfig::kThreads, 1)
    causal_conv3d_rows_kernel(HOPPER_GRID_CONSTANT const TensorMaps maps,
                              HOPPER_GRID_CONSTANT const CausalConv3dParams params) {
  convolve<RowsConfig>(maps, params);
}

// A tile of 64 channels, `width` x `height` pixels of one frame.
const char* make_map(TensorMap* map, const void* data, const uint64_t (&dims)[5],
                     const uint64_t (&strides)[4], uint32_t width, uint32_t height) {
  const uint32_t box[] = {kDepth, width, height, 1, 1};
  return make_tensor_map(map, const_cast<void*>(data), 2, 5, dims, strides, box, SW_128);
}

// `pitch`: frames from one batch entry to the next.
template <class C>
const char* make_input_map(TensorMap* map, const void* data, int frames, int pitch,
                           const CausalConv3dParams& params) {
  if (data == nullptr || frames == 0) return nullptr;
  const uint64_t channels = params.in_channels, width = params.width, height = params.height;
  const uint64_t dims[] = {channels, width, height, static_cast<uint64_t>(frames),
                           static_cast<uint64_t>(params.batch)};
  const uint64_t pixel = 2 * channels, row = pixel * width, frame = row * height;
  const uint64_t strides[] = {pixel, row, frame, frame * pitch};
  const int margin_x = C::kTapsInRows || C::kShiftedSlabs ? 0 : params.margin_x;
  const int margin_y = C::kTapsInRows ? 0 : params.margin_y;
  return make_map(map, data, dims, strides, kTileWidth + 2 * margin_x, kTileHeight + 2 * margin_y);
}

// Maps the output elements of one phase, in the output, the residual or `active`.
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

// With taps in the rows, weights are read as (taps_time, taps in space x out_channels,
// in_channels).
template <class C>
const char* make_weight_map(TensorMap* map, const CausalConv3dParams& params) {
  const uint64_t taps = static_cast<uint64_t>(params.taps_y) * params.taps_x;
  const uint64_t row = 2 * static_cast<uint64_t>(params.in_channels);
  const uint64_t rows = params.out_channels * (C::kTapsInRows ? taps : 1);
  const uint64_t products =
      static_cast<uint64_t>(params.phases) * params.taps_time * (C::kTapsInRows ? 1 : taps);
  const uint64_t dims[] = {static_cast<uint64_t>(params.in_channels), rows, products};
  const uint64_t strides[] = {row, row * rows};
  const uint32_t box[] = {kDepth, C::kChannels, 1};
  return make_tensor_map(map, const_cast<void*>(params.weights), 2, 3, dims, strides, box, SW_128);
}

template <class C>
const char* launch(const CausalConv3dParams& params, int multiprocessors, void* stream) {
  TensorMaps maps{};
  const auto input = [&](TensorMap* map, const void* data, int frames, int pitch) {
    return make_input_map<C>(map, data, frames, pitch, params);
  };
  const char* error = input(&maps.past, params.past, params.past_frames, params.past_pitch);
  if (!error) error = input(&maps.body, params.body, params.body_frames, params.body_frames);
  if (!error) error = input(&maps.tail, params.tail, params.tail_frames, params.tail_frames);
  if (!error) error = make_weight_map<C>(&maps.weights, params);
  const bool by_tiles = !C::kTapsInRows && !params.pixels && params.out_channels % 8 == 0;
  for (int i = 0; i < params.phases && by_tiles && !error; ++i) {
    const auto output = [&](TensorMap* map, const void* data) {
      return make_output_map(map, data, params.phase[i], params);
    };
    error = output(&maps.out[i], params.out);
    if (!error) error = output(&maps.active[i], params.active);
    if (!error) error = output(&maps.residual[i], params.residual);
  }
  if (error) return error;

  const int width = kTileWidth - (C::kTapsInRows ? 2 * params.margin_x : 0);
  const int height = kTileHeight - (C::kTapsInRows ? 2 * params.margin_y : 0);
  const int columns = (params.width + width - 1) / width;
  const int rows = (params.height + height - 1) / height;
  const int blocks = (params.out_channels + C::kChannels - 1) / C::kChannels;
  int64_t tiles = 0;
  for (int i = 0; i < params.phases; ++i) {
    const int groups = (params.phase[i].frames + C::kFrames - 1) / C::kFrames;
    tiles += static_cast<int64_t>(columns) * rows * blocks * groups * params.batch;
  }
  if (tiles == 0) return nullptr;
  const auto ctas = static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors));
  const auto kernel = [] {
    if constexpr (C::kTapsInRows)
      return causal_conv3d_rows_kernel;
    else
      return causal_conv3d_kernel<C>;
  }();
  return HOPPER_LAUNCH(kernel, dim3(ctas), dim3(C::kThreads), sizeof(typename C::Shared), stream,
                       maps, params);
}

template <bool kShiftedSlabs>
const char* launch_tiles(const CausalConv3dParams& params, int multiprocessors, void* stream) {
  return params.out_channels > kGroupChannels
             ? launch<Config<false, false, kShiftedSlabs>>(params, multiprocessors, stream)
             : launch<Config<true, false, kShiftedSlabs>>(params, multiprocessors, stream);
}

}  // namespace

const char* launch_causal_conv3d_sm90(const CausalConv3dParams& params, int multiprocessors,
                                      void* stream) {
  const int taps = params.taps_y * params.taps_x;
  const bool plain = params.residual == nullptr && params.active == nullptr && params.phases == 1;
  if (plain && taps > 1 && taps * params.out_channels <= kMaxTapRows) {
    return launch<RowsConfig>(params, multiprocessors, stream);
  }
  if (params.shifted_slabs) return launch_tiles<true>(params, multiprocessors, stream);
  return launch_tiles<false>(params, multiprocessors, stream);
}

}  // namespace aapt
