// The kernels of the backward, and the order in which `launch_backward_sm90` enqueues them:
//
//   rows      log-sum-exp and rowsum(dout out) - dlse of every query row
//   keys      dk and dv of every tile of keys, and the tile's part of dq
//   convert   the sums of dq, rounded to BF16
//
// In a deterministic backward, a kernel for dq replaces `convert`. It goes through the keys of a
// query tile in order and computes the scores a second time: seven products instead of five, but no
// sums in memory.
#pragma once

#include "block_causal_attention/params.h"

namespace aapt::block_causal {

const char* launch_rows(const Params& params, const Backward& backward,
                        const BackwardBuffers& buffers, void* stream);
const char* launch_convert(const Params& params, const Backward& backward, void* stream);
const char* launch_dq(const Params& params, const Backward& backward,
                      const BackwardBuffers& buffers, int ctas, void* stream);

}  // namespace aapt::block_causal
