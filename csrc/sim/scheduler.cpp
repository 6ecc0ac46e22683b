// Runs one block: its threads alternate until all have left or none can run.
#include "sim/scheduler.h"

#include <algorithm>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>

#include "sim/faults.h"
#include "sim/fibers.h"
#include "sim/state.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace aapt::sim {

std::vector<Thread> threads;
std::vector<Clock> clocks;
Thread* current;
int thread_count, warp_count, live_threads, agent_count;
std::mt19937 random_bits;
uint32_t plain_accesses;
uint64_t events;
size_t shared_bytes;
alignas(4096) uint8_t shared_window[kSharedWindow];
__thread bool in_kernel;

namespace {

constexpr int kIdleSpins = 64;

void* scheduler_stack_pointer;
const Call* kernel_call;
char report[8192];
int storers;

void return_to_scheduler() {
  void* scheduler = scheduler_stack_pointer;
  ++statistics().switches;
  aapt_sim_switch(&current->stack_pointer, scheduler);
}

void thread_main() {
  try {
    in_kernel = true;
    kernel_call->run(kernel_call->state);
    in_kernel = false;
    check_wgmma_exit(*current);
    check_store_exit(*current);
    lane_left(*current);
  } catch (...) {
    in_kernel = false;
    fail(current->site, "an exception left the kernel");
  }
  current->done = true;
  --live_threads;
  ++events;
  thread_left();
  return_to_scheduler();
  __builtin_trap();
}

void reset_threads() {
  while (static_cast<int>(threads.size()) < thread_count) {
    Thread thread{};
    thread.stack = allocate_stack();
    threads.push_back(thread);
  }
  if (clocks.size() < threads.size()) clocks.resize(threads.size());
  for (int i = 0; i < thread_count; ++i) {
    Thread& thread = threads[i];
    char* stack = thread.stack;
    thread = Thread{};
    thread.stack = stack;
    thread.index = i;
    thread.warp = i / kWarp;
    thread.lane = i % kWarp;
    thread.position =
        dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    thread.storer = -1;
    thread.stack_pointer = begin_fiber(stack, thread_main);
    std::fill_n(clocks[i].at, reader_agent(kMaxStorers), 0);
    clocks[i].at[i] = 1;
  }
  live_threads = thread_count;
  storers = 0;
  agent_count = (reader_agent(0) + 15) / 16 * 16;
}

void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.position;
  plain_accesses = 0;
  ++statistics().switches;
  aapt_sim_switch(&scheduler_stack_pointer, thread.stack_pointer);
  current = nullptr;
}

bool can_run(Thread& thread) {
  return !thread.done && (thread.ready == nullptr || thread.ready(thread));
}

// True if two lanes wait at one place for one thing: they share a line of the report.
bool waits_alike(const Thread& a, const Thread& b) {
  return a.done == b.done && (a.done || (a.site == b.site && a.waiting == b.waiting &&
                                         a.object == b.object && a.argument == b.argument));
}

void report_deadlock() {
  std::string text = "deadlock: no thread can run and no transfer is under way";
  for (int warp = 0; warp < warp_count; ++warp) {
    const Thread* lanes = &threads[warp * kWarp];
    for (int first = 0, lane = 1; lane <= kWarp; ++lane) {
      if (lane < kWarp && waits_alike(lanes[lane], lanes[first])) continue;
      const Thread& thread = lanes[first];
      if (!thread.done) {
        char line[160];
        snprintf(line, sizeof line, "\n  warp %d lanes %d-%d: ", warp, first, lane - 1);
        text += line + std::string(thread.waiting) + ", " + describe(thread.site);
        text += describe_barrier(thread.object, thread.argument);
      }
      first = lane;
    }
  }
  fail(0, "%s", text.c_str());
}

// Lets threads that poll an mbarrier poll again, but not for ever. Returns false if none does.
bool spin_again() {
  static uint64_t seen;
  static int idle;
  idle = events == seen ? idle + 1 : 0;
  seen = events;
  bool any = false;
  for (int i = 0; i < thread_count; ++i) {
    Thread& thread = threads[i];
    if (!thread.done && thread.polling) any = thread.spin_again = true;
  }
  return any && idle < kIdleSpins;
}

void run_threads() {
  std::vector<int> order(warp_count);
  for (int i = 0; i < warp_count; ++i) order[i] = i;
  const bool random = options().seed != 0;
  while (live_threads > 0) {
    bool progress = false;
    if (random) std::shuffle(order.begin(), order.end(), random_bits);
    for (const int warp : order) {
      const int first = random ? random_bits() % kWarp : 0;
      for (int i = 0; i < kWarp; ++i) {
        Thread& thread = threads[warp * kWarp + (first + i) % kWarp];
        if (!can_run(thread)) continue;
        progress = true;
        resume(thread);
        if (report[0] != 0) return;
        if (options().tma == RANDOM && random_bits() % 64 == 0) step_bulk();
        if (options().wgmma == RANDOM && random_bits() % 64 == 0) step_wgmma();
      }
    }
    if (!progress && !step_bulk() && !spin_again()) report_deadlock();
  }
  finish_bulk_block();
  finish_wgmma_block();
}

}  // namespace

const char* last_report() { return report; }
void set_report(const char* text) { snprintf(report, sizeof report, "%s", text); }

void fail(Site site, const char* format, ...) {
  in_kernel = false;
  if (current != nullptr) {
    const int length =
        snprintf(report, sizeof report, "block (%u,%u,%u) thread %d (warp %d lane %d), ",
                 blockIdx.x, blockIdx.y, blockIdx.z, current->index, current->warp, current->lane);
    snprintf(report + length, sizeof report - length, "%s: ", describe(site).c_str());
  } else {
    const int length =
        snprintf(report, sizeof report, "block (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z);
    const std::string place = site == 0 ? ": " : ", " + describe(site) + ": ";
    snprintf(report + length, sizeof report - length, "%s", place.c_str());
  }
  const size_t length = std::char_traits<char>::length(report);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(report + length, sizeof report - length, format, arguments);
  va_end(arguments);
  leave_launch();
}

void leave_launch() {
  if (current == nullptr) siglongjmp(launch_exit, 1);
  // The fiber is abandoned where it is; the next block builds a new one on its stack.
  void* abandoned;
  aapt_sim_switch(&abandoned, scheduler_stack_pointer);
  __builtin_trap();
}

void wait_until(bool (*ready)(Thread&), void* object, uint64_t argument, const char* what) {
  Thread& thread = *current;
  thread.object = object;
  thread.argument = argument;
  thread.waiting = what;
  thread.ready = ready;
  while (!ready(thread)) return_to_scheduler();
  thread.ready = nullptr;
  thread.object = nullptr;
}

int storer_of(Thread& thread) {
  if (thread.storer < 0) {
    if (storers == kMaxStorers) {
      fail(thread.site, "more than %d threads of a block issue bulk stores: not simulated",
           kMaxStorers);
    }
    thread.storer = storers++;
    agent_count = (writer_agent(thread.storer) + 16) / 16 * 16;
  }
  return thread.storer;
}

std::string agent_name(int agent) {
  if (agent < thread_count) return "thread " + std::to_string(agent);
  agent -= thread_count;
  if (agent < warp_count) return "wgmma of warp " + std::to_string(agent);
  agent -= warp_count;
  if (agent < kMaxBarriers) return "bulk load on mbarrier #" + std::to_string(agent);
  const int storer = (agent - kMaxBarriers) / 2;
  for (const Thread& thread : threads) {
    if (thread.storer == storer) return "bulk store of thread " + std::to_string(thread.index);
  }
  return "bulk store";
}

bool run_block(const Call& call) {
  kernel_call = &call;
  current = nullptr;
  ++statistics().blocks;
  reset_threads();
  for (size_t i = 0; i < shared_bytes; i += 4) memcpy(shared_window + i, &kPoison, 4);
  reset_barriers();
  reset_warps();
  reset_shared_races();
  reset_wgmma();
  begin_global_block();
  run_threads();
  return report[0] == 0;
}

}  // namespace aapt::sim
