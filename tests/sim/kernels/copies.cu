#include "copies.cuh"

using namespace aapt::hopper;
using copies::kRow;
using copies::kThreads;

EXPORT const char* run_double_rows(const float* in, float* out, int rows, int blocks, int bug,
                                   void* stream) {
  return HOPPER_LAUNCH(copies::double_rows, dim3(blocks), dim3(kThreads), 2048, stream, in, out,
                       rows, BuildBugs{bug});
}

EXPORT const char* run_sum_rows(const float* in, float* out, int rows, int bug, void* stream) {
  return HOPPER_LAUNCH(copies::sum_rows, dim3(rows), dim3(kThreads), 2048, stream, in, out,
                       BuildBugs{bug});
}

EXPORT const char* run_sum_tiles(float* in, float* out, int tiles, int rows, int bug,
                                 void* stream) {
  TensorMap from, to;
  const uint64_t dims[] = {32, static_cast<uint64_t>(rows), static_cast<uint64_t>(tiles)};
  const uint64_t strides[] = {bug == copies::FAR_ROWS ? 1024u : 128u, 128ull * rows};
  const uint32_t box[] = {32, 8, 1};
  float* base = bug == copies::FAR_BASE ? in + 32 * rows * tiles : in;
  const char* error = make_tensor_map(&from, base, 4, 3, dims, strides, box, SW_128);
  if (error == nullptr && bug == copies::BYTE_MAP_ADD) {
    const uint64_t bytes[] = {128, static_cast<uint64_t>(rows)};
    const uint32_t byte_box[] = {128, 8};
    error = make_tensor_map(&to, out, 1, 2, bytes, strides, byte_box, SW_128);
  } else if (error == nullptr) {
    error = make_tensor_map(&to, out, 4, 2, dims, strides, box, SW_128);
  }
  if (error != nullptr) return error;
  return HOPPER_LAUNCH(copies::sum_tiles, dim3(tiles), dim3(kThreads), 4096, stream, from, to,
                       BuildBugs{bug});
}

EXPORT const char* run_meet(const float* in, float* partials, uint32_t* counter, float* out,
                            int blocks, int bug, void* stream) {
  return HOPPER_LAUNCH(copies::meet, dim3(blocks), dim3(kThreads), 2048, stream, in, partials,
                       counter, out, BuildBugs{bug});
}

EXPORT const char* run_transpose_matrices(const uint16_t* in, uint16_t* out, int transpose_store,
                                          void* stream) {
  return HOPPER_LAUNCH(copies::transpose_matrices, dim3(1), dim3(32), 1024, stream, in, out,
                       transpose_store);
}

EXPORT const char* run_stride(float* out, int stride, void* stream) {
  return HOPPER_LAUNCH(copies::stride_words, dim3(1), dim3(32), 32 * 4 * 33, stream, out, stride);
}
