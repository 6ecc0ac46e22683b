// mbarriers and named barriers.
#include "sim/barriers.h"

#include <cstdio>
#include <memory>

#include "sim/collective.h"
#include "sim/races.h"

namespace aapt::sim {
namespace {

constexpr int kNamedBarriers = 16;
constexpr int64_t kMaxTransferBytes = (1 << 20) - 1;
constexpr uint32_t kMaxArrivals = (1 << 20) - 1;

Barrier* by_word[kSharedWindow / 8];
std::vector<std::unique_ptr<Barrier>> barriers;

struct NamedBarrier {
  int expected, arrived, generation;
  bool whole_block;
  Clock arriving;  // what threads that arrive know
  std::vector<int> waiting_warps;
};
NamedBarrier named[kNamedBarriers];

Barrier& find(uint64_t* bar, Site site) {
  if (!in_shared(bar, 8) || reinterpret_cast<uintptr_t>(bar) % 8 != 0) {
    fail(site, "mbarrier: expected an 8-byte aligned address in shared memory, got %p",
         static_cast<void*>(bar));
  }
  Barrier* barrier = by_word[shared_offset(bar) / 8];
  if (barrier == nullptr) {
    fail(site, "the mbarrier at smem+%zu is not initialised", shared_offset(bar));
  }
  return *barrier;
}

// A use must be ordered after the initialisation.
Barrier& use(uint64_t* bar) {
  Barrier& barrier = find(bar, current->site);
  read_shared(bar, 8, actor_of(*current), current->site);
  return barrier;
}

bool phase_passed(const Barrier& barrier, uint32_t parity) { return (barrier.phase & 1) != parity; }

bool wait_is_over(Thread& thread) {
  return phase_passed(*static_cast<Barrier*>(thread.object), thread.argument);
}

void complete_phase(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.transfer_bytes != 0) return;
  ++barrier.phase;
  ++events;
  barrier.pending = barrier.count;
  if (!options().races) return;
  join(barrier.completed, barrier.arriving);
  barrier.completed.at[barrier_agent(barrier.index)] = barrier.phase;
  // Threads that wait learn it now. When they run again, the barrier may know more, from a later
  // phase that is not ordered before them.
  for (int i = 0; i < thread_count; ++i) {
    Thread& thread = threads[i];
    if (thread.object == &barrier && wait_is_over(thread)) {
      join(clock_of(thread), barrier.completed);
    }
  }
}

void expect(Barrier& barrier, uint32_t bytes) {
  barrier.transfer_bytes += bytes;
  if (barrier.transfer_bytes > kMaxTransferBytes) {
    fail(current->site, "mbarrier #%d expects more than 2^20-1 bytes", barrier.index);
  }
}

void arrive(Barrier& barrier) {
  if (barrier.pending == 0) {
    fail(current->site, "mbarrier #%d gets more arrivals than its count %u", barrier.index,
         barrier.count);
  }
  if (options().races) {
    join(barrier.arriving, clock_of(*current));
    tick(*current);
  }
  --barrier.pending;
  complete_phase(barrier);
}

Barrier& check_wait(uint64_t* bar, uint32_t parity) {
  Barrier& barrier = use(bar);
  if (parity > 1) fail(current->site, "mbarrier wait: expected parity 0 or 1, got %u", parity);
  return barrier;
}

// Returns false if the thread gave up, which only polling threads do.
bool wait_for(Barrier& barrier, uint32_t parity, bool (*ready)(Thread&), const char* what) {
  if (phase_passed(barrier, parity)) {
    if (options().races) join(clock_of(*current), barrier.completed);
    return true;
  }
  wait_until(ready, &barrier, parity, what);
  return phase_passed(barrier, parity);
}

// Named barriers count the threads of whole warps. __syncthreads waits for the remaining threads.
void release_if_full(NamedBarrier& barrier) {
  const int needed = barrier.whole_block ? live_threads : barrier.expected;
  if (barrier.arrived == 0 || barrier.arrived < needed) return;
  barrier.arrived = 0;
  ++barrier.generation;
  ++events;
  if (options().races) {
    for (const int warp : barrier.waiting_warps) {
      for (int lane = 0; lane < kWarp; ++lane) join(clocks[warp * kWarp + lane], barrier.arriving);
    }
    barrier.arriving = Clock{};
  }
  barrier.waiting_warps.clear();
}

constexpr uint64_t kWholeBlock = 1, kWaits = 2;  // in a slot

// Called by the last lane, for its warp. Stores in the first slot the generation whose end the warp
// waits for.
void arrive_warp(Warp& warp, Slot* slots) {
  const int id = static_cast<int>(slots[0][0]), count = static_cast<int>(slots[0][1]);
  const bool whole_block = slots[0][2] & kWholeBlock;
  for (int lane = 1; lane < kWarp; ++lane) {
    if (slots[lane][0] != slots[0][0] || slots[lane][1] != slots[0][1]) {
      fail(current->site, "named barrier: the lanes of the warp disagree on its id or count");
    }
  }
  NamedBarrier& barrier = named[id];
  if (barrier.arrived != 0 && (barrier.expected != count || barrier.whole_block != whole_block)) {
    fail(current->site, "barrier %d is used with counts %d and %d at once", id, barrier.expected,
         count);
  }
  barrier.expected = count;
  barrier.whole_block = whole_block;
  slots[0][3] = barrier.generation;
  if (slots[0][2] & kWaits) barrier.waiting_warps.push_back(warp.index);
  if (options().races) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const Thread& thread = threads[warp.index * kWarp + lane];
      join(barrier.arriving, clock_of(thread));
      tick(thread);
    }
  }
  barrier.arrived += kWarp;
  if (!whole_block && barrier.arrived > count) {
    fail(current->site, "barrier %d gets more arrivals than its count %d", id, count);
  }
  release_if_full(barrier);
}

void named_barrier(int id, int count, bool whole_block, bool wait, const char* what) {
  if (id < 0 || id >= kNamedBarriers) {
    fail(current->site, "%s: expected a barrier id of 0 to 15, got %d", what, id);
  }
  if (count <= 0 || count % kWarp != 0 || (!whole_block && count > thread_count)) {
    fail(current->site, "%s: expected a multiple of 32, at most the block's %d threads, got %d",
         what, thread_count, count);
  }
  const uint64_t in[] = {static_cast<uint64_t>(id), static_cast<uint64_t>(count),
                         (whole_block ? kWholeBlock : 0) | (wait ? kWaits : 0)};
  const Slot* slots = collective(NAMED_BARRIER, in, 3, arrive_warp, what);
  if (!wait) return;
  NamedBarrier& barrier = named[id];
  wait_until(
      [](Thread& thread) {
        return static_cast<NamedBarrier*>(thread.object)->generation !=
               static_cast<int>(thread.argument);
      },
      &barrier, slots[0][3], what);
}

}  // namespace

void reset_barriers() {
  for (const auto& barrier : barriers) by_word[shared_offset(barrier->address) / 8] = nullptr;
  barriers.clear();
  for (NamedBarrier& barrier : named) barrier = NamedBarrier{};
}

void thread_left() {
  for (NamedBarrier& barrier : named) {
    if (barrier.whole_block) release_if_full(barrier);
  }
}

std::string describe_barrier(const void* object, uint64_t parity) {
  for (const auto& barrier : barriers) {
    if (barrier.get() != object) continue;
    char text[256];
    snprintf(text, sizeof text,
             " [mbarrier #%d at smem+%zu: waits for parity %d, phase %u, pending arrivals %u of "
             "%u, bytes to come %lld]",
             barrier->index, shared_offset(barrier->address), static_cast<int>(parity),
             barrier->phase, barrier->pending, barrier->count,
             static_cast<long long>(barrier->transfer_bytes));
    return text;
  }
  for (int id = 0; id < kNamedBarriers; ++id) {
    if (&named[id] != object) continue;
    return " [barrier " + std::to_string(id) + ": " + std::to_string(named[id].arrived) + " of " +
           std::to_string(named[id].whole_block ? live_threads : named[id].expected) +
           " threads have arrived]";
  }
  return "";
}

Barrier& barrier_for_load(uint64_t* bar, Site site) {
  Barrier& barrier = find(bar, site);
  if (!barrier.known_to_async && threads[barrier.init_thread].init_fences == barrier.init_fences) {
    fail(site,
         "a bulk load uses mbarrier #%d, whose initialisation was not followed by "
         "fence_barrier_init or fence_proxy_async",
         barrier.index);
  }
  barrier.known_to_async = true;
  return barrier;
}

void complete_bytes(Barrier& barrier, uint32_t bytes) {
  barrier.transfer_bytes -= bytes;
  if (barrier.transfer_bytes < -kMaxTransferBytes) {
    fail(0, "mbarrier #%d got more than 2^20-1 bytes that it does not expect", barrier.index);
  }
  complete_phase(barrier);
}

}  // namespace aapt::sim

namespace aapt::hopper {

using namespace sim;

uint32_t smem_u32(const void* pointer) {
  const Entry entry;
  if (shared_offset(pointer) > shared_bytes) {
    fail(current->site, "smem_u32 of %p, which is not in shared memory (near the call named here)",
         pointer);
  }
  return static_cast<uint32_t>(shared_offset(pointer)) + kSharedBase;
}

void mbar_init(uint64_t* bar, uint32_t arrivals, Where where) {
  const Entry entry(where);
  Site site = current->site;
  if (!in_shared(bar, 8) || reinterpret_cast<uintptr_t>(bar) % 8 != 0) {
    fail(site, "mbar_init: expected an 8-byte aligned address in shared memory");
  }
  if (arrivals == 0 || arrivals > kMaxArrivals) {
    fail(site, "mbar_init: expected 1 to 2^20-1 arrivals, got %u", arrivals);
  }
  Barrier*& slot = by_word[shared_offset(bar) / 8];
  if (slot == nullptr) {
    if (barriers.size() == kMaxBarriers) {
      fail(site, "more than %d mbarriers in a block: not simulated", kMaxBarriers);
    }
    barriers.push_back(std::make_unique<Barrier>());
    slot = barriers.back().get();
    slot->index = static_cast<int>(barriers.size()) - 1;
    write_shared(bar, 8, actor_of(*current), site);
  }
  const int index = slot->index;
  *slot = Barrier{};
  slot->address = bar;
  slot->index = index;
  slot->count = slot->pending = arrivals;
  slot->init_thread = current->index;
  slot->init_fences = current->init_fences;
  tag_barrier(bar);
}

void mbar_arrive(uint64_t* bar, Where where) {
  const Entry entry(where);
  arrive(use(bar));
}

void mbar_expect_tx(uint64_t* bar, uint32_t bytes, Where where) {
  const Entry entry(where);
  expect(use(bar), bytes);
}

void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes, Where where) {
  const Entry entry(where);
  Barrier& barrier = use(bar);
  expect(barrier, bytes);
  arrive(barrier);
}

bool mbar_try_wait(uint64_t* bar, uint32_t parity, Where where) {
  const Entry entry(where);
  Barrier& barrier = check_wait(bar, parity);
  current->spin_again = false;
  current->polling = true;
  const bool passed = wait_for(
      barrier, parity, [](Thread& thread) { return thread.spin_again || wait_is_over(thread); },
      "mbar_try_wait");
  current->polling = false;
  return passed;
}

void mbar_wait(uint64_t* bar, uint32_t parity, Where where) {
  const Entry entry(where);
  Barrier& barrier = check_wait(bar, parity);
  wait_for(barrier, parity, wait_is_over, "mbar_wait");
}

void fence_barrier_init() { ++current->init_fences; }

void fence_proxy_async() {
  const Entry entry;
  ++current->init_fences;
  current->proxy_fences.push_back(clock_of(*current).at[current->index]);
  tick(*current);
}

void cta_sync(Where where) {
  const Entry entry(where);
  named_barrier(0, thread_count, true, true, "cta_sync");
}

void bar_sync(int id, int count, Where where) {
  const Entry entry(where);
  named_barrier(id, count, false, true, "bar_sync");
}

void bar_arrive(int id, int count, Where where) {
  const Entry entry(where);
  named_barrier(id, count, false, false, "bar_arrive");
}

}  // namespace aapt::hopper
