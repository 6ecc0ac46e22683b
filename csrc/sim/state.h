// State that the parts of the simulator share: the running block, its threads and warps, and the
// ways to wait and to fail.
//
// Blocks run one after another; every CUDA thread of a block is a fiber on one host thread, which
// runs until it waits. Asynchronous engines (bulk copies, wgmma) are queues that the scheduler or a
// wait drains. This state belongs to one launch at a time.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "hopper/hopper.cuh"
#include "sim/control.h"
#include "sim/sites.h"

namespace aapt::sim {

using hopper::Swizzle;
using hopper::TensorMap;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxBarriers = 64;
constexpr int kMaxStorers = 128;                // threads of a block that issue bulk stores
constexpr uint32_t kSharedBase = 1024;          // address of dynamic shared memory on sm_90
constexpr size_t kSharedCapacity = 227 * 1024;  // of one block
constexpr uint32_t kPoison = 0x7FA0BAD1;        // a signalling NaN: arithmetic changes its bits
constexpr int kRegisterFile = 65536;

// Vector clocks. An agent acts on its own: a thread, the wgmma engine of a warp, the loads of an
// mbarrier, and for each thread that issues bulk stores their reads of shared memory and their
// writes of global memory.
constexpr int kMaxAgents = kMaxThreads + kMaxThreads / kWarp + kMaxBarriers + 2 * kMaxStorers;
static_assert(kMaxAgents % 16 == 0, "clocks are joined 16 agents at a time");
struct Clock {
  uint32_t at[kMaxAgents];
};

// An accumulator tile's registers in one thread, while a wgmma may write them.
struct Accumulator {
  float* registers;
  int count, last_group;
  std::vector<float> values;  // the registers get after the wgmma; until then they are poisoned
};

struct Thread {
  int index, warp, lane;
  dim3 position;
  void* stack_pointer;
  char* stack;  // kept from block to block
  bool done;

  // The condition it waits for; null if it can run
  bool (*ready)(Thread&);
  void* object;
  uint64_t argument;
  const char* waiting;
  Site site;                 // the current call, or the last one
  bool polling, spin_again;  // in mbar_try_wait; it may give up

  uint64_t collectives;
  int init_fences;                     // of mbarrier initialisations
  std::vector<uint32_t> proxy_fences;  // times of fence_proxy_async, on its clock

  int wgmmas, wgmma_groups;
  bool wgmma_fenced;
  std::vector<Accumulator> in_flight;

  // Bulk stores: open ones, committed groups, groups that have read and have written
  int storer, open_stores, store_groups, groups_read, groups_written;
};

extern std::vector<Thread> threads;
extern std::vector<Clock> clocks;  // by thread
extern Thread* current;            // null in the scheduler
extern int thread_count, warp_count, live_threads;
extern int agent_count;  // rounded up to 16
extern std::mt19937 random_bits;
extern uint32_t plain_accesses;  // of the thread since it was resumed
extern uint64_t events;          // counts events that may end a wait for an mbarrier
extern size_t shared_bytes;      // of this launch
alignas(4096) extern uint8_t shared_window[];
constexpr size_t kSharedWindow = kSharedCapacity + 1024;

inline uint8_t* shared_at(uint32_t address) { return shared_window + (address - kSharedBase); }
inline size_t shared_offset(const void* pointer) {
  return static_cast<const uint8_t*>(pointer) - shared_window;
}
inline bool in_shared(const void* pointer, size_t bytes = 1) {
  const size_t offset = shared_offset(pointer);
  return offset < shared_bytes && bytes <= shared_bytes - offset;
}

inline int wgmma_agent(int warp) { return thread_count + warp; }
inline int barrier_agent(int index) { return thread_count + warp_count + index; }
inline int reader_agent(int storer) {
  return thread_count + warp_count + kMaxBarriers + 2 * storer;
}
inline int writer_agent(int storer) { return reader_agent(storer) + 1; }
std::string agent_name(int agent);
// The storer number of a thread. Its first use raises agent_count.
int storer_of(Thread& thread);

inline void join(Clock& into, const Clock& from) {
  for (int i = 0; i < agent_count; i += 16) {
    for (int j = i; j < i + 16; ++j) into.at[j] = into.at[j] > from.at[j] ? into.at[j] : from.at[j];
  }
}
inline Clock& clock_of(const Thread& thread) { return clocks[thread.index]; }
inline void tick(const Thread& thread) { ++clock_of(thread).at[thread.index]; }

// True while code of a kernel runs on this host thread. Only then do the hooks check accesses.
extern __thread bool in_kernel __attribute__((tls_model("initial-exec")));

// Every function that a kernel calls begins with an Entry.
struct Entry {
  explicit Entry(Where where) {
    in_kernel = false;
    current->site = site_of(where);
  }
  Entry() { in_kernel = false; }
  ~Entry() { in_kernel = true; }
};

// Ends the launch with a report that begins with the thread and the place.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

void set_report(const char* text);

// Lets other threads run until ready(current).
void wait_until(bool (*ready)(Thread&), void* object, uint64_t argument, const char* what);

// Called at the start of a block, ...
void reset_barriers();
void reset_warps();
void reset_shared_races();
void reset_wgmma();
void begin_global_block();
// ... as a thread leaves, ...
void check_wgmma_exit(const Thread& thread);
void check_store_exit(const Thread& thread);
void lane_left(const Thread& thread);
void thread_left();  // named barriers count the remaining threads
// ... when asynchronous work takes a step (false: none is left), ...
bool step_bulk();
void step_wgmma();
// ... and at the end of a block and of a launch.
void finish_bulk_block();
void finish_wgmma_block();
void finish_bulk_launch();
void drop_bulk();
std::string describe_barrier(const void* barrier, uint64_t parity);

}  // namespace aapt::sim
