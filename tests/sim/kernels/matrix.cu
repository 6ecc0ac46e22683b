#include "matrix.cuh"

namespace {

using namespace aapt::hopper;

const char* make_map(TensorMap* map, void* base, int element_bytes, uint64_t rows, uint64_t columns,
                     uint32_t box_rows, uint32_t box_columns, Swizzle swizzle) {
  const uint64_t dims[] = {columns, rows}, strides[] = {columns * element_bytes};
  const uint32_t box[] = {box_columns, box_rows};
  return make_tensor_map(map, base, element_bytes, 2, dims, strides, box, swizzle);
}

template <int N, Swizzle kSwizzle, int TA, int TB>
const char* multiply(void* a, void* b, float* c, void* stream) {
  const uint32_t width = (kSwizzle == SW_NONE ? 16 : 16 << kSwizzle) / 2;
  TensorMap ta, tb;
  const char* error = make_map(&ta, a, 2, 64, 64, 64, width, kSwizzle);
  if (error == nullptr) {
    const uint32_t rows = TB ? 64 : N;
    error = make_map(&tb, b, 2, rows, TB ? N : 64, rows, width, kSwizzle);
  }
  if (error != nullptr) return error;
  return HOPPER_LAUNCH((matrix::multiply<N, kSwizzle, TA, TB>), dim3(1), dim3(128), 48 * 1024,
                       stream, ta, tb, c);
}

template <int N, Swizzle kSwizzle>
const char* multiply_majors(int ta, int tb, void* a, void* b, float* c, void* stream) {
  if (ta == 0 && tb == 0) return multiply<N, kSwizzle, 0, 0>(a, b, c, stream);
  if (ta == 0) return multiply<N, kSwizzle, 0, 1>(a, b, c, stream);
  if (tb == 0) return multiply<N, kSwizzle, 1, 0>(a, b, c, stream);
  return multiply<N, kSwizzle, 1, 1>(a, b, c, stream);
}

template <int N>
const char* multiply_halo(int rows, int width, int first, void* a, void* b, float* c,
                          void* stream) {
  constexpr uint32_t kChannels = 128, kSlab = 64;
  TensorMap ta, tb;
  const char* error = make_map(&ta, a, 2, 64, kChannels, 64, kSlab, SW_128);
  if (error != nullptr) return error;
  const uint64_t dims[] = {kChannels, static_cast<uint64_t>(width), static_cast<uint64_t>(rows)};
  const uint64_t strides[] = {2 * kChannels, 2 * kChannels * dims[1]};
  const uint32_t box[] = {kSlab, static_cast<uint32_t>(width), static_cast<uint32_t>(rows)};
  error = make_tensor_map(&tb, b, 2, 3, dims, strides, box, SW_128);
  if (error != nullptr) return error;
  return HOPPER_LAUNCH(matrix::multiply_halo<N>, dim3(1), dim3(128), 104 * 1024, stream, ta, tb, c,
                       rows, width, first);
}

template <int N, bool kE4m3>
const char* multiply_registers(void* a, void* b, float* c, void* stream) {
  TensorMap tb;
  const int bytes = kE4m3 ? 1 : 2;
  const char* error = make_map(&tb, b, bytes, N, 32 / bytes, N, 32 / bytes, SW_32);
  if (error != nullptr) return error;
  return HOPPER_LAUNCH((matrix::multiply_registers<N, kE4m3>), dim3(1), dim3(128), 16 * 1024,
                       stream, static_cast<const uint8_t*>(a), tb, c);
}

template <int... kN>
const char* multiply_registers_any(int n, int e4m3, void* a, void* b, float* c, void* stream) {
  const char* error = "run_multiply_registers: no such case";
  ((n == kN ? void(error = e4m3 ? multiply_registers<kN, true>(a, b, c, stream)
                                : multiply_registers<kN, false>(a, b, c, stream))
            : void()),
   ...);
  return error;
}

}  // namespace

EXPORT const char* run_multiply(int n, int swizzle, int ta, int tb, void* a, void* b, float* c,
                                void* stream) {
  if (n == 64 && swizzle == SW_NONE) return multiply_majors<64, SW_NONE>(ta, tb, a, b, c, stream);
  if (n == 64 && swizzle == SW_32) return multiply_majors<64, SW_32>(ta, tb, a, b, c, stream);
  if (n == 64 && swizzle == SW_64) return multiply_majors<64, SW_64>(ta, tb, a, b, c, stream);
  if (n == 64 && swizzle == SW_128) return multiply_majors<64, SW_128>(ta, tb, a, b, c, stream);
  if (n == 80 && swizzle == SW_32) return multiply_majors<80, SW_32>(ta, tb, a, b, c, stream);
  if (n == 192 && swizzle == SW_128) return multiply_majors<192, SW_128>(ta, tb, a, b, c, stream);
  return "run_multiply: no such case";
}

EXPORT const char* run_multiply_halo(int n, int rows, int width, int first, void* a, void* b,
                                     float* c, void* stream) {
  if (n == 64) return multiply_halo<64>(rows, width, first, a, b, c, stream);
  if (n == 256) return multiply_halo<256>(rows, width, first, a, b, c, stream);
  return "run_multiply_halo: no such case";
}

EXPORT const char* run_multiply_registers(int n, int e4m3, void* a, void* b, float* c,
                                          void* stream) {
  return multiply_registers_any<8, 16, 32, 64, 80, 96, 128, 160, 176, 192, 224, 256>(n, e4m3, a, b,
                                                                                     c, stream);
}

EXPORT const char* run_gemm_e4m3(void* a, void* b, const float* a_scale, const float* b_scale,
                                 float* c, int m, int n, int k, int interval, void* stream) {
  TensorMap ta, tb;
  const char* error = make_map(&ta, a, 1, m, k, 64, 128, SW_128);
  if (error == nullptr) error = make_map(&tb, b, 1, n, k, 128, 128, SW_128);
  if (error != nullptr) return error;
  return HOPPER_LAUNCH(matrix::gemm_e4m3, dim3((m + 63) / 64, (n + 127) / 128), dim3(256),
                       100 * 1024, stream, ta, tb, a_scale, b_scale, c, m, n, k, interval);
}

EXPORT const char* run_chain_e4m3(void* q, void* k, void* v, float* c, int keys, int first,
                                  void* stream) {
  TensorMap tq, tk, tv;
  const char* error = make_map(&tq, q, 1, 64, 128, 64, 128, SW_128);
  if (error == nullptr) error = make_map(&tv, v, 1, 128, keys, 128, 128, SW_128);
  if (error != nullptr) return error;
  // Key 4 t + 2 h + i of a group, in the order (h, t, i)
  const uint64_t dims[] = {128, 2, 4, 2, static_cast<uint64_t>(keys / 16)};
  const uint64_t strides[] = {128, 4 * 128, 2 * 128, 16 * 128};
  const uint32_t box[] = {128, 2, 4, 2, 8};
  error = make_tensor_map(&tk, k, 1, 5, dims, strides, box, SW_128);
  if (error != nullptr) return error;
  return HOPPER_LAUNCH(matrix::chain_e4m3, dim3(1), dim3(128), 44 * 1024, stream, tq, tk, tv, c,
                       first);
}
