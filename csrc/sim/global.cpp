#include "sim/global.h"

#include <algorithm>
#include <memory>
#include <unordered_map>

#include "sim/fibers.h"

namespace aapt::sim {
namespace {

struct Range {
  const char *begin, *end;
};
std::vector<Range> allowed;

const char *arguments_begin, *arguments_end;

// --- Order between blocks
//
// Only atomics order an earlier block before an access: a thread released what it knew at an
// address, and a later block acquired it. Because blocks run one after another, an acquisition
// takes all earlier releases at its address.

struct Release {
  int block;
  std::vector<uint32_t> knows;  // the releasing thread's clock
  std::vector<int> releases;    // what it had acquired itself
};
std::vector<Release> releases;

struct Location {
  std::vector<int> releases;
  int block;    // of the clock below
  Clock clock;  // released here by threads of that block
};
std::unordered_map<uintptr_t, std::unique_ptr<Location>> locations;

struct Acquisition {
  int thread;
  uint32_t time;
  std::vector<int> releases;
  // By block: the joint knowledge of its releases. Computed on demand.
  mutable std::unordered_map<int, std::vector<uint32_t>> by_block;
};
std::vector<Acquisition> acquisitions;  // of the running block
int running_block;

const std::vector<uint32_t>& known_of(const Acquisition& acquisition, int block) {
  const auto found = acquisition.by_block.find(block);
  if (found != acquisition.by_block.end()) return found->second;
  std::vector<uint32_t>& knows = acquisition.by_block[block];
  for (const int index : acquisition.releases) {
    const Release& release = releases[index];
    if (release.block != block) continue;
    if (knows.size() < release.knows.size()) knows.resize(release.knows.size());
    for (size_t i = 0; i < release.knows.size(); ++i) {
      knows[i] = std::max(knows[i], release.knows[i]);
    }
  }
  return knows;
}

bool is_ordered(int block, int agent, uint32_t time, const Actor& actor) {
  if (block == running_block) return agent == actor.agent || actor.knows->at[agent] >= time;
  for (const Acquisition& acquisition : acquisitions) {
    if (actor.knows->at[acquisition.thread] < acquisition.time) continue;
    const auto& knows = known_of(acquisition, block);
    if (static_cast<size_t>(agent) < knows.size() && knows[agent] >= time) return true;
  }
  return false;
}

// --- The last accesses of each word of global memory in this launch

struct Word {
  int write_block, read_block;
  uint16_t writer, reader;
  uint32_t write_time, read_time;
  Site write_site, read_site;
  GlobalAccess write;
  uint8_t written_bytes, read_bytes;  // masks

  void remember_write(uint8_t mask, GlobalAccess access, const Actor& actor, Site site) {
    const bool again = write_block == running_block && writer == actor.agent;
    written_bytes = again ? written_bytes | mask : mask;
    read_bytes &= ~mask;
    write_block = running_block;
    writer = actor.agent;
    write_time = actor.time;
    write_site = site;
    write = access;
  }
  void remember_read(uint8_t mask, const Actor& actor, Site site) {
    const bool again = read_block == running_block && reader == actor.agent;
    read_bytes = again ? read_bytes | mask : mask;
    read_block = running_block;
    reader = actor.agent;
    read_time = actor.time;
    read_site = site;
  }
};

constexpr uintptr_t kPageBytes = 4096;
struct Page {
  Word words[kPageBytes / 4];
};
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
bool written;  // anything in this launch

struct {
  uintptr_t number;
  Page* page;
} recent[64];

// Returns null if the page does not exist, unless `create`.
Page* page_of(uintptr_t address, bool create) {
  const uintptr_t number = address / kPageBytes;
  auto& slot = recent[number % 64];
  if (slot.page != nullptr && slot.number == number) return slot.page;
  const auto found = pages.find(number);
  if (found == pages.end() && !create) return nullptr;
  Page* page =
      found != pages.end() ? found->second.get() : (pages[number] = std::make_unique<Page>()).get();
  slot = {number, page};
  return page;
}

bool is_write(GlobalAccess access) { return access >= GlobalAccess::WRITE; }
bool is_atomic(GlobalAccess access) { return access >= GlobalAccess::ADD; }
bool is_async(GlobalAccess access) {
  return access == GlobalAccess::READ_ASYNC || access == GlobalAccess::WRITE_ASYNC ||
         access == GlobalAccess::ADD_ASYNC;
}

std::string agent_of_block(int block, int agent) {
  if (block == running_block) return agent_name(agent);
  // Only threads have the same agent numbers in every block.
  return (agent < thread_count ? agent_name(agent) : "a bulk store") + " of another block";
}

void check_word(const Word& word, uintptr_t address, uint8_t mask, GlobalAccess access,
                const Actor& actor, Site site) {
  const auto at = reinterpret_cast<void*>(address);
  const bool writes = is_write(access);
  if ((word.written_bytes & mask) != 0) {
    const std::string writer = agent_of_block(word.write_block, word.writer);
    const bool both_add = is_atomic(access) && access == word.write;
    if (!both_add && !is_ordered(word.write_block, word.writer, word.write_time, actor)) {
      fail(site, "race in global memory at %p: %s by %s is not ordered after the %s by %s (%s)", at,
           writes ? "write" : "read", agent_name(actor.agent).c_str(),
           is_atomic(word.write) ? "add" : "write", writer.c_str(),
           describe(word.write_site).c_str());
    }
    if (access == GlobalAccess::READ_ONLY) {
      fail(site, "load_readonly at %p of what %s wrote in this launch (%s)", at, writer.c_str(),
           describe(word.write_site).c_str());
    }
    if (access == GlobalAccess::READ_ASYNC && !is_async(word.write)) {
      fail(site,
           "a bulk load reads global memory at %p that %s stored in this launch (%s): the proxies "
           "are not ordered",
           at, writer.c_str(), describe(word.write_site).c_str());
    }
  }
  if (writes && (word.read_bytes & mask) != 0 &&
      !is_ordered(word.read_block, word.reader, word.read_time, actor)) {
    fail(site, "race in global memory at %p: write by %s is not ordered after the read by %s (%s)",
         at, agent_name(actor.agent).c_str(), agent_of_block(word.read_block, word.reader).c_str(),
         describe(word.read_site).c_str());
  }
}

}  // namespace

void allow(const void* begin, size_t bytes) {
  if (bytes == 0) return;
  const auto first = static_cast<const char*>(begin);
  for (const Range& range : allowed) {
    if (range.begin == first && range.end == first + bytes) return;
  }
  allowed.push_back({first, first + bytes});
}

void forget() { allowed.clear(); }

bool is_allowed(const void* pointer, size_t bytes) {
  const auto begin = static_cast<const char*>(pointer), end = begin + bytes;
  static size_t last = 0;  // most accesses are to the range of the one before
  if (last < allowed.size() && allowed[last].begin <= begin && end <= allowed[last].end) {
    return true;
  }
  for (size_t i = 0; i < allowed.size(); ++i) {
    if (allowed[i].begin <= begin && end <= allowed[i].end) {
      last = i;
      return true;
    }
  }
  return false;
}

void check_allowed(const void* pointer, size_t bytes, Site site, const char* what) {
  if (is_allowed(pointer, bytes)) return;
  const auto begin = static_cast<const char*>(pointer);
  const Range* nearest = nullptr;
  const auto distance = [&](const Range& range) {
    return begin < range.begin ? range.begin - begin : std::max<ptrdiff_t>(0, begin - range.end);
  };
  for (const Range& range : allowed) {
    if (nearest == nullptr || distance(range) < distance(*nearest)) nearest = &range;
  }
  if (nearest == nullptr) {
    fail(site, "%s of %zu bytes at %p: out of bounds, no global memory is allowed", what, bytes,
         pointer);
  }
  fail(site, "%s of %zu bytes at %p: out of bounds, byte %td of the nearest range of %td bytes",
       what, bytes, pointer, begin - nearest->begin, nearest->end - nearest->begin);
}

void begin_global_launch(const Call& call) {
  arguments_begin = static_cast<const char*>(call.state);
  arguments_end = arguments_begin + call.state_bytes;
  running_block = 0;
  end_global_launch();
}

void end_global_launch() {
  for (auto& slot : recent) slot = {};
  pages.clear();
  releases.clear();
  locations.clear();
  acquisitions.clear();
  written = false;
}

void begin_global_block() {
  ++running_block;
  acquisitions.clear();
}

void access_global(const void* pointer, size_t bytes, GlobalAccess access, const Actor& actor,
                   Site site) {
  if (!options().races) return;
  // Bulk loads are not recorded: only what they read is checked.
  const bool remembers = access != GlobalAccess::READ_ASYNC;
  if (!remembers && !written) return;
  ++statistics().accesses;
  const auto begin = reinterpret_cast<uintptr_t>(pointer), end = begin + bytes;
  for (uintptr_t address = begin / 4 * 4; address < end; address += 4) {
    Page* page = page_of(address, remembers);
    if (page == nullptr) {
      address = address / kPageBytes * kPageBytes + kPageBytes - 4;
      continue;
    }
    Word& word = page->words[address % kPageBytes / 4];
    const uintptr_t first = std::max(begin, address) - address;
    const uintptr_t last = std::min(end, address + 4) - address;
    const auto mask = static_cast<uint8_t>((1 << last) - (1 << first));
    check_word(word, address, mask, access, actor, site);
    if (is_write(access)) {
      written = true;
      word.remember_write(mask, access, actor, site);
    } else if (remembers) {
      word.remember_read(mask, actor, site);
    }
  }
}

void access_elsewhere(const void* pointer, size_t bytes, bool write, Site site) {
  const auto begin = static_cast<const char*>(pointer);
  if (is_allowed(pointer, bytes)) {
    access_global(pointer, bytes, write ? GlobalAccess::WRITE : GlobalAccess::READ,
                  actor_of(*current), site);
    return;
  }
  if (arguments_begin <= begin && begin + bytes <= arguments_end && !write) return;
  if (in_library(pointer, bytes)) {
    if (write) fail(site, "plain write of %zu bytes to a variable of the library", bytes);
    return;
  }
  for (const Thread& thread : threads) {
    if (thread.stack <= begin && begin < thread.stack + kStackBytes) {
      fail(site, "plain %s of a local variable of thread %d", write ? "write" : "read",
           thread.index);
    }
  }
  check_allowed(pointer, bytes, site, write ? "plain write" : "plain read");
}

void load_readonly(void* value, const void* global, size_t bytes, Where where) {
  const Entry entry(where);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fail(current->site, "load_readonly: misaligned address %p", global);
  }
  check_allowed(global, bytes, current->site, "load_readonly");
  access_global(global, bytes, GlobalAccess::READ_ONLY, actor_of(*current), current->site);
  memcpy(value, global, bytes);
}

}  // namespace aapt::sim

namespace aapt::hopper {

using namespace sim;

float4 load_l2(const float4* global, Where where) {
  const Entry entry(where);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail(current->site, "load_l2: misaligned address %p", static_cast<const void*>(global));
  }
  check_allowed(global, 16, current->site, "load_l2");
  access_global(global, 16, GlobalAccess::READ, actor_of(*current), current->site);
  float4 value;
  memcpy(&value, global, 16);
  return value;
}

uint32_t atomic_add_acq_rel(uint32_t* global, uint32_t value, Where where) {
  const Entry entry(where);
  if (reinterpret_cast<uintptr_t>(global) % 4 != 0) {
    fail(current->site, "atomic_add: misaligned address %p", static_cast<void*>(global));
  }
  check_allowed(global, 4, current->site, "atomic_add");
  access_global(global, 4, GlobalAccess::ADD, actor_of(*current), current->site);
  const uint32_t before = *global;
  *global += value;
  if (!options().races) return before;

  auto& slot = locations[reinterpret_cast<uintptr_t>(global)];
  if (slot == nullptr) slot = std::make_unique<Location>();
  Location& location = *slot;
  Clock& clock = clock_of(*current);
  // Acquire. The tick lets only agents that hear of this thread later share the acquisition.
  if (location.block == running_block) join(clock, location.clock);
  tick(*current);
  if (!location.releases.empty()) {
    acquisitions.push_back({current->index, clock.at[current->index], {}, {}});
    std::vector<int>& taken = acquisitions.back().releases;
    taken = location.releases;
    for (const int index : location.releases) {
      const auto& further = releases[index].releases;
      taken.insert(taken.end(), further.begin(), further.end());
    }
    std::sort(taken.begin(), taken.end());
    taken.erase(std::unique(taken.begin(), taken.end()), taken.end());
  }
  // Release
  if (location.block != running_block) location.clock = Clock{};
  location.block = running_block;
  join(location.clock, clock);
  Release release{running_block, {clock.at, clock.at + agent_count}, {}};
  for (const Acquisition& acquisition : acquisitions) {
    if (clock.at[acquisition.thread] < acquisition.time) continue;
    release.releases.insert(release.releases.end(), acquisition.releases.begin(),
                            acquisition.releases.end());
  }
  location.releases.push_back(static_cast<int>(releases.size()));
  releases.push_back(std::move(release));
  tick(*current);
  return before;
}

}  // namespace aapt::hopper
