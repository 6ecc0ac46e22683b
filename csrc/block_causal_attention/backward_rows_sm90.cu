// The kernels before and after backward_keys_sm90.cu: statistics of every query row, and the sums
// of dq rounded to BF16. Both are bound by memory.

#include "block_causal_attention/backward.h"
#include "block_causal_attention/sums.h"
#include "hopper/hopper.cuh"

namespace aapt::block_causal {
namespace {

using namespace hopper;

constexpr int kThreads = 256;
constexpr int kVector = 8;  // BF16 elements in 16 bytes

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

// Grid: query tiles, heads, batch entries of dq and then of dq_sink.
template <int kHeadDim>
HOPPER_KERNEL HOPPER_LAUNCH_BOUNDS(kThreads, 1)
    block_causal_convert_kernel(HOPPER_GRID_CONSTANT const Params params,
                                HOPPER_GRID_CONSTANT const Backward backward) {
  using Sums = QuerySums<kHeadDim>;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int tile = blockIdx.x, head = blockIdx.y;
  const bool of_sink = blockIdx.z >= static_cast<unsigned>(params.batch);
  const int batch = of_sink ? blockIdx.z - params.batch : blockIdx.z;
  const int hidden = of_sink ? params.mask.text_tokens : 0;  // q_sink has frames only
  const int rows = params.mask.query_rows - hidden;
  const int first = tile * Sums::kRows + Sums::row(group) + warp * 16 + lane / 4 - hidden;
  const int column = Sums::column(group) + lane % 4 * 2;
  const auto* sums = reinterpret_cast<const float4*>(
      Sums::half(params, backward.dq_sums, of_sink, batch, head, tile, group));
  uint16_t* out = of_sink ? backward.dq_sink : backward.dq;
  const auto write = [&](int row, int i, float low, float high) {
    if (row < 0 || row >= rows) return;
    const int64_t at =
        ((static_cast<int64_t>(batch) * rows + row) * params.heads + head) * kHeadDim + column;
    *reinterpret_cast<uint32_t*>(out + at + 8 * i) =
        pack_bf16(low * params.scale, high * params.scale);
  };
  HOPPER_UNROLL
  for (int i = 0; i < kPanel / 8; ++i) {
    const float4 sum = sums[i * 128 + threadIdx.x % 128];
    write(first, i, sum.x, sum.y);
    write(first + 8, i, sum.z, sum.w);
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
