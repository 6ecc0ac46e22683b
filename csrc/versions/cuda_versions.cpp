// The versions of CUDA that decide whether the kernels of this library can run at all.
#include <tuple>

#include "host.h"

#ifndef AAPT_SIM
namespace aapt {
namespace {

std::tuple<int64_t, int64_t> cuda_versions() {
  int runtime = 0, driver = 0;
  cudaError_t status = cudaRuntimeGetVersion(&runtime);
  STD_TORCH_CHECK(status == cudaSuccess, "cuda_versions: ", cudaGetErrorString(status));
  status = cudaDriverGetVersion(&driver);
  STD_TORCH_CHECK(status == cudaSuccess, "cuda_versions: ", cudaGetErrorString(status));
  return {runtime, driver};
}

}  // namespace
}  // namespace aapt

AAPT_FACTS(m) { m.impl("cuda_versions", TORCH_BOX(&aapt::cuda_versions)); }
#endif
