// The kernels of the backward, and the order in which `launch_backward_sm90` enqueues them:
//
//   rows      log-sum-exp and rowsum(dout out) - dlse, as the others read them
//   backward  per tile of keys: dk and dv, and what the tile adds to dq
//   convert   the sums of dq, to BF16
//
// Deterministic, dq has a kernel of its own, which goes through the keys of a query tile in order
// and computes the scores a second time: seven products instead of five, but no sums in memory.
#pragma once

#include "block_causal_attention/params.h"

namespace aapt::block_causal {

const char* launch_rows(const Params& params, const Backward& backward,
                        const BackwardBuffers& buffers, void* stream);
const char* launch_convert(const Params& params, const Backward& backward, void* stream);
const char* launch_dq(const Params& params, const Backward& backward,
                      const BackwardBuffers& buffers, int ctas, void* stream);

}  // namespace aapt::block_causal
