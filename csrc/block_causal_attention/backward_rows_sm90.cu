// The kernels before and after backward_keys_sm90.cu: statistics of every query row, and the sums
// of dq rounded to BF16. Both are bound by memory.

#include "block_causal_attention/backward.h"
#include "block_causal_attention/sums.h"
#include "hopper/vector.cuh"

namespace aapt::block_causal {
namespace {

using namespace hopper;

constexpr int kThreads = 256;

HOPPER_DEVICE uint4 load_row_part(const RowBuffer& rows, int batch, int row, int head, int part) {
  const char* at = static_cast<const char*>(rows.data) + batch * rows.batch_stride +
                   row * rows.token_stride + head * rows.head_stride;
  return reinterpret_cast<const uint4*>(at)[part];
}

HOPPER_DEVICE float multiply_pair(uint32_t a, uint32_t b) {
  const float2 x = unpack_bf16(a), y = unpack_bf16(b);
  return x.x * y.x + x.y * y.y;
}

// Grid: rows, heads, batch.
template <int kHeadDim>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(kThreads, 1)
    block_causal_rows_kernel(HOPPER_GRID_CONSTANT const Params params,
                             HOPPER_GRID_CONSTANT const Backward backward,
                             HOPPER_GRID_CONSTANT const RowBuffer out,
                             HOPPER_GRID_CONSTANT const RowBuffer dout) {
  constexpr int kLanes = kHeadDim / kVector;  // per row
  const int row = (blockIdx.x * kThreads + threadIdx.x) / kLanes, part = threadIdx.x % kLanes;
  const int batch = blockIdx.z, head = blockIdx.y, rows = params.mask.query_rows;
  const int64_t pair = static_cast<int64_t>(batch) * params.heads + head;
  float sum = 0.0f;
  if (row < rows) {
    const uint4 a = load_row_part(out, batch, row, head, part);
    const uint4 b = load_row_part(dout, batch, row, head, part);
    sum = multiply_pair(a.x, b.x) + multiply_pair(a.y, b.y) + multiply_pair(a.z, b.z) +
          multiply_pair(a.w, b.w);
  }
  HOPPER_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
  if (part != 0) return;

  // A row that sees nothing, or is padding, has weights exp2(... - inf) = 0
  float lse = INFINITY;
  if (row < rows) {
    constexpr float kLog2E = 1.4426950408889634f;
    const float given = params.lse[pair * rows + row];
    if (given != -INFINITY) {
      lse = given * kLog2E;
      if (backward.dlse != nullptr) sum -= backward.dlse[pair * rows + row];
    }
  }
  backward.row_lse[pair * backward.padded_rows + row] = lse;
  backward.row_delta[pair * backward.padded_rows + row] = sum;
}

// One component of all parts, times a factor and rounded to BF16.
HOPPER_DEVICE uint4 round_vector(const float4 (&parts)[kVector], float float4::* component,
                                 float factor) {
  const auto pair = [&](int i) {
    return pack_bf16(parts[i].*component * factor, parts[i + 1].*component * factor);
  };
  return {pair(0), pair(2), pair(4), pair(6)};
}

// Grid: query tiles, heads, batch entries of dq and then of dq_sink.
template <int kHeadDim>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(kThreads, 1)
    block_causal_convert_kernel(HOPPER_GRID_CONSTANT const Params params,
                                HOPPER_GRID_CONSTANT const Backward backward) {
  using Sums = QuerySums<kHeadDim>;
  const int group = threadIdx.x / 128, tile = blockIdx.x, head = blockIdx.y;
  const bool of_sink = blockIdx.z >= static_cast<unsigned>(params.batch);
  const int batch = of_sink ? blockIdx.z - params.batch : blockIdx.z;
  const int hidden = of_sink ? params.mask.text_tokens : 0;  // q_sink has frames only
  const int rows = params.mask.query_rows - hidden;
  const int first = tile * Sums::kRows + Sums::row(group) - hidden;
  const auto* sums = reinterpret_cast<const float4*>(
      Sums::half(params, backward.dq_sums, of_sink, batch, head, tile, group));
  uint16_t* out = of_sink ? backward.dq_sink : backward.dq;
  // Eight lanes of a fragment, four apart, hold eight neighbouring columns of two rows, and eight
  // more of these rows: four vectors of the result
  constexpr int kQuads = Sums::kHalfRows / 8 * 16;
  for (int quad = threadIdx.x % 128; quad < kQuads; quad += 128) {
    const int block = quad / 16, warp = quad / 4 % 4, pair = quad % 4;
    float4 parts[kVector];
    HOPPER_UNROLL
    for (int i = 0; i < kVector; ++i) parts[i] = sums[block * 128 + warp * 32 + i * 4 + pair];
    const int row = first + block * 8 + pair * 2, column = Sums::column(group) + warp * 16;
    const int64_t at =
        ((static_cast<int64_t>(batch) * rows + row) * params.heads + head) * kHeadDim + column;
    const int64_t next = static_cast<int64_t>(params.heads) * kHeadDim;
    if (row >= 0 && row < rows) {
      *reinterpret_cast<uint4*>(out + at) = round_vector(parts, &float4::x, params.scale);
      *reinterpret_cast<uint4*>(out + at + kVector) = round_vector(parts, &float4::z, params.scale);
    }
    if (row + 1 >= 0 && row + 1 < rows) {
      *reinterpret_cast<uint4*>(out + at + next) = round_vector(parts, &float4::y, params.scale);
      *reinterpret_cast<uint4*>(out + at + next + kVector) =
          round_vector(parts, &float4::w, params.scale);
    }
  }
}

template <int kHeadDim>
const char* rows_of(const Params& params, const Backward& backward, const BackwardBuffers& buffers,
                    void* stream) {
  const dim3 grid(backward.padded_rows * (kHeadDim / kVector) / kThreads, params.heads,
                  params.batch);
  return HOPPER_LAUNCH(block_causal_rows_kernel<kHeadDim>, grid, dim3(kThreads), 0, stream, params,
                       backward, buffers.forward.out, buffers.dout);
}

template <int kHeadDim>
const char* convert(const Params& params, const Backward& backward, void* stream) {
  constexpr int kRows = QuerySums<kHeadDim>::kRows;
  const dim3 grid((params.mask.query_rows + kRows - 1) / kRows, params.heads,
                  params.pinned_rotation ? 2 * params.batch : params.batch);
  return HOPPER_LAUNCH(block_causal_convert_kernel<kHeadDim>, grid, dim3(kThreads), 0, stream,
                       params, backward);
}

}  // namespace

const char* launch_rows(const Params& params, const Backward& backward,
                        const BackwardBuffers& buffers, void* stream) {
  return params.head_dim == 64 ? rows_of<64>(params, backward, buffers, stream)
                               : rows_of<128>(params, backward, buffers, stream);
}

const char* launch_convert(const Params& params, const Backward& backward, void* stream) {
  return params.head_dim == 64 ? convert<64>(params, backward, stream)
                               : convert<128>(params, backward, stream);
}

}  // namespace aapt::block_causal
