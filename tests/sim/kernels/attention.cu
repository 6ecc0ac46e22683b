#include "attention.cuh"

EXPORT const char* run_attention(int head_dim, void* q, void* k, void* v, void* o, float* lse,
                                 int heads, int queries, int keys, float scale, int bug,
                                 void* stream) {
  using attention::Config;
  const auto launch =
      head_dim == 64 ? attention::launch<Config<64>> : attention::launch<Config<128>>;
  return launch(q, k, v, o, lse, heads, queries, keys, scale, bug, stream);
}
