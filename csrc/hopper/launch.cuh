// Macros, kernel launch and tensor maps, for nvcc.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#define HOPPER_DEVICE __device__ __forceinline__
#define HOPPER_KERNEL __global__ void
#define HOPPER_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define HOPPER_GRID_CONSTANT __grid_constant__
#define HOPPER_PRAGMA(text) _Pragma(#text)
#define HOPPER_UNROLL HOPPER_PRAGMA(unroll)
#define HOPPER_UNROLL_BY(count) HOPPER_PRAGMA(unroll count)
// A uint8_t* to the dynamic shared memory, 1024-byte aligned.
#define HOPPER_SHARED(name)                                          \
  extern __shared__ __align__(1024) uint8_t hopper_dynamic_shared[]; \
  uint8_t* const name = hopper_dynamic_shared

// const char* HOPPER_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...): null or an
// error message.
#define HOPPER_LAUNCH(kernel, grid, block, shared_bytes, ...) \
  ::aapt::hopper::launch(false, kernel, grid, block, shared_bytes, __VA_ARGS__)
// As HOPPER_LAUNCH, but the kernel may start before the previous kernel of the stream has ended. It
// must call grid_dependency_wait() before it touches memory that the previous kernel writes.
#define HOPPER_LAUNCH_DEPENDENT(kernel, grid, block, shared_bytes, ...) \
  ::aapt::hopper::launch(true, kernel, grid, block, shared_bytes, __VA_ARGS__)

namespace aapt::hopper {

struct TensorMap {
  CUtensorMap map;
};

template <typename... Parameters, typename... Arguments>
const char* launch(bool dependent, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, void* stream, const Arguments&... arguments) {
  cudaError_t status = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  status = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (status == cudaSuccess) status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Maps a tensor of `dims` elements in tiles of `box` elements. Dimensions begin with the innermost,
// which has no stride. Returns null or an error message.
inline const char* make_tensor_map(TensorMap* map, void* base, int element_bytes, int rank,
                                   const uint64_t* dims, const uint64_t* strides_bytes,
                                   const uint32_t* box, Swizzle swizzle) {
  // Looked up at run time: the library does not link the driver.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                                12000, cudaEnableDefault, &found);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<Encode>(status == cudaSuccess ? entry : nullptr);
  }();
  if (encode == nullptr) return "tensor map: expected a driver of CUDA 12 or later; update it";
  const CUtensorMapDataType type = element_bytes == 4   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(&map->map, type, rank, base, dims, strides_bytes, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "tensor map: the CUDA driver rejected it";
}

}  // namespace aapt::hopper
