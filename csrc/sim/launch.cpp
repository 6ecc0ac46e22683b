// Runs a launch: checks its limits, then runs its blocks one after another.
#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <mutex>
#include <numeric>

#include "sim/faults.h"
#include "sim/global.h"
#include "sim/scheduler.h"
#include "sim/state.h"

namespace aapt::sim {

Options& options() {
  static Options options;
  return options;
}

Statistics& statistics() {
  static Statistics statistics;
  return statistics;
}

namespace {

std::mutex launching;

const char* check_limits(dim3 grid, dim3 block, size_t shared) {
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  if (count == 0 || count > kMaxThreads) return "launch: expected 1 to 1024 threads in a block";
  if (count % kWarp != 0) return "launch: expected whole warps: others are not simulated";
  if (shared > kSharedCapacity) return "launch: expected at most 227 KiB of shared memory";
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (blocks == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    return "launch: expected a grid of 1 to 2^31-1 by 1 to 65535 by 1 to 65535 blocks";
  }
  return nullptr;
}

bool run_blocks(const Call& call) {
  static std::vector<uint32_t> order;  // static, for a failure leaves without destructors
  order.resize(uint64_t{gridDim.x} * gridDim.y * gridDim.z);
  std::iota(order.begin(), order.end(), 0);
  if (options().seed != 0 && options().shuffle_blocks) {
    std::shuffle(order.begin(), order.end(), random_bits);
  }
  for (const uint32_t i : order) {
    blockIdx = dim3(i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y);
    if (!run_block(call)) return false;
  }
  finish_bulk_launch();
  return true;
}

}  // namespace

uint8_t* shared_memory() { return shared_window; }

const char* launch(dim3 grid, dim3 block, size_t shared, const Call& call) {
  const std::lock_guard<std::mutex> only_one(launching);
  const char* refused = check_limits(grid, block, shared);
  set_report(refused == nullptr ? "" : refused);
  if (refused != nullptr) return refused;
  gridDim = grid;
  blockDim = block;
  thread_count = static_cast<int>(block.x * block.y * block.z);
  warp_count = thread_count / kWarp;
  shared_bytes = shared;
  statistics() = {};
  random_bits.seed(options().seed + 1);
  enter_library(reinterpret_cast<const void*>(call.run));
  begin_global_launch(call);

  const FaultHandlers handlers;
  // A failure in the scheduler, outside any fiber, comes back here.
  if (sigsetjmp(launch_exit, 0) == 0) {
    run_blocks(call);
  }
  in_kernel = false;
  current = nullptr;
  drop_bulk();
  end_global_launch();
  return last_report()[0] == 0 ? nullptr : last_report();
}

}  // namespace aapt::sim
