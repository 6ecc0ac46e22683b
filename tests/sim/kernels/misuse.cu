#include "misuse.cuh"

EXPORT const char* run_transpose(const float* in, float* out, int n, int bug, void* stream) {
  return HOPPER_LAUNCH(misuse::transpose, dim3(n / 32, n / 32), dim3(256), 40 * 1024, stream, in,
                       out, n, BuildBugs{bug});
}
