// Bulk copies: tiles by tensor map, and plain runs of bytes.
//
// A load poisons its destination when issued, and lands later. A store reads shared memory and
// writes global memory at two separate moments, because kernels can wait for either.
#include <algorithm>

#include "sim/barriers.h"
#include "sim/global.h"
#include "sim/races.h"
#include "sim/swizzle.h"

namespace aapt::sim {
namespace {

struct Copy {
  TensorMap map;  // of a plain run: one dimension
  int at[5];
  uint8_t* shared;
  uint32_t bytes;
  Site site;
  Barrier* barrier;          // of a load
  int block, thread, group;  // of a store
  bool add, captured;
  std::vector<uint8_t> data;  // captured, row after row
};

std::vector<Copy> loads, stores;

uint32_t row_bytes(const TensorMap& map) { return map.box[0] * map.element_bytes; }

// Calls visit(row, global address of the row's first byte, first and last byte inside the tensor).
template <typename Visit>
void for_rows(const Copy& copy, Visit visit) {
  const TensorMap& map = copy.map;
  const int64_t row = row_bytes(map);
  uint32_t rows = 1;
  for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
  const int64_t start = static_cast<int64_t>(copy.at[0]) * map.element_bytes;
  const int64_t width = static_cast<int64_t>(map.dims[0]) * map.element_bytes;
  const int64_t first = std::clamp<int64_t>(-start, 0, row);
  const int64_t last = std::clamp<int64_t>(width - start, first, row);
  for (uint32_t r = 0; r < rows; ++r) {
    bool inside = true;
    int64_t offset = start;
    uint32_t rest = r;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t x = copy.at[i] + static_cast<int64_t>(rest % map.box[i]);
      rest /= map.box[i];
      inside &= 0 <= x && x < static_cast<int64_t>(map.dims[i]);
      offset += x * static_cast<int64_t>(map.strides[i]);
    }
    visit(r, map.base + offset, first, inside ? last : first);
  }
}

uint8_t* shared_piece(const Copy& copy, uint32_t row, uint32_t byte) {
  const uint32_t address = static_cast<uint32_t>(shared_offset(copy.shared)) + kSharedBase;
  return shared_at(swizzle_address(address + row * row_bytes(copy.map) + byte, copy.map.swizzle));
}

void land(const Copy& copy) {
  const uint32_t width = row_bytes(copy.map);
  for_rows(copy, [&](uint32_t row, const char* global, int64_t first, int64_t last) {
    for (int64_t byte = 0; byte < width; byte += 16) {
      uint8_t piece[16] = {};  // zeros outside the tensor
      const int64_t from = std::max(first, byte), to = std::min(last, byte + 16);
      if (from < to) memcpy(piece + (from - byte), global + from, to - from);
      memcpy(shared_piece(copy, row, byte), piece, 16);
    }
  });
}

void capture(Copy& copy) {
  if (copy.captured) return;
  copy.captured = true;
  copy.data.resize(copy.bytes);
  const uint32_t width = row_bytes(copy.map);
  for (uint32_t i = 0; i < copy.bytes; i += 16) {
    memcpy(&copy.data[i], shared_piece(copy, i / width, i % width), 16);
  }
}

void write_out(Copy& copy) {
  capture(copy);
  const uint32_t width = row_bytes(copy.map);
  for_rows(copy, [&](uint32_t row, char* global, int64_t first, int64_t last) {
    const uint8_t* data = &copy.data[row * width];
    if (!copy.add) {
      memcpy(global + first, data + first, last - first);
      return;
    }
    for (int64_t byte = first; byte < last; byte += 4) {
      float sum, addend;
      memcpy(&sum, global + byte, 4);
      memcpy(&addend, data + byte, 4);
      sum += addend;
      memcpy(global + byte, &sum, 4);
    }
  });
}

void finish_load(size_t index) {
  const Copy copy = loads[index];
  loads.erase(loads.begin() + index);
  land(copy);
  ++events;
  complete_bytes(*copy.barrier, copy.bytes);
}

template <typename Select>
void finish_stores(Select select) {
  for (Copy& copy : stores) {
    if (select(copy)) write_out(copy);
  }
  stores.erase(std::remove_if(stores.begin(), stores.end(), select), stores.end());
}

// Checks the bytes of the copy row by row, but only if the tensor as a whole is not allowed.
void check_global(const Copy& copy, const char* what) {
  const TensorMap& map = copy.map;
  uint64_t extent = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) extent += (map.dims[i] - 1) * map.strides[i];
  if (is_allowed(map.base, extent)) return;
  for_rows(copy, [&](uint32_t, const char* global, int64_t first, int64_t last) {
    if (first < last) check_allowed(global + first, last - first, copy.site, what);
  });
}

void check_shared(const Copy& copy, const char* what) {
  if (!in_shared(copy.shared, copy.bytes)) {
    fail(copy.site, "%s: smem+%zd and %u bytes are outside shared memory (%zu bytes)", what,
         copy.shared - shared_window, copy.bytes, shared_bytes);
  }
}

Copy tile(const TensorMap* map, const void* smem, int rank, const int* at, const char* what) {
  Copy copy{};
  copy.map = *map;
  copy.site = current->site;
  if (map->rank != rank) {
    fail(copy.site, "%s: %d coordinates for a tensor map of rank %d", what, rank, map->rank);
  }
  for (int i = 0; i < rank; ++i) copy.at[i] = at[i];
  copy.shared = static_cast<uint8_t*>(const_cast<void*>(smem));
  copy.bytes = map->element_bytes;
  for (int i = 0; i < rank; ++i) copy.bytes *= map->box[i];
  check_shared(copy, what);
  // A swizzle pattern repeats every 8 spans, a TMA address is a multiple of 128.
  const uint32_t alignment = map->swizzle == hopper::SW_NONE ? 128 : 8 * span_of(map->swizzle);
  if (shared_offset(smem) % alignment != 0) {
    fail(copy.site, "%s: smem+%zu is misaligned: expected a multiple of %u for its swizzle", what,
         shared_offset(smem), alignment);
  }
  check_global(copy, what);
  return copy;
}

Copy run(const void* global, const void* smem, uint32_t bytes, int element_bytes,
         const char* what) {
  Copy copy{};
  copy.site = current->site;
  copy.shared = static_cast<uint8_t*>(const_cast<void*>(smem));
  copy.bytes = bytes;
  if (bytes == 0 || bytes % 16 != 0 || shared_offset(smem) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail(copy.site, "%s: misaligned: expected multiples of 16, got global %p, smem+%zd, %u bytes",
         what, global, copy.shared - shared_window, bytes);
  }
  copy.map.base = static_cast<char*>(const_cast<void*>(global));
  copy.map.element_bytes = element_bytes;
  copy.map.rank = 1;
  copy.map.dims[0] = copy.map.box[0] = bytes / element_bytes;
  copy.map.strides[0] = element_bytes;
  check_shared(copy, what);
  check_global(copy, what);
  return copy;
}

void access_rows(const Copy& copy, GlobalAccess access, const Actor& actor) {
  for_rows(copy, [&](uint32_t, const char* global, int64_t first, int64_t last) {
    if (first < last) access_global(global + first, last - first, access, actor, copy.site);
  });
}

void issue_load(Copy copy, uint64_t* bar) {
  Barrier& barrier = barrier_for_load(bar, copy.site);
  ++statistics().bulk_loads;
  const Actor actor{barrier_agent(barrier.index), barrier.phase + 1, &clock_of(*current), ASYNC};
  access_rows(copy, GlobalAccess::READ_ASYNC, actor);
  write_shared(copy.shared, copy.bytes, actor, copy.site);
  for (uint32_t i = 0; i < copy.bytes; i += 4) memcpy(copy.shared + i, &kPoison, 4);
  copy.barrier = &barrier;
  loads.push_back(std::move(copy));
  if (options().tma == EAGER) finish_load(loads.size() - 1);
}

void issue_store(Copy copy, bool add) {
  ++statistics().bulk_stores;
  const int storer = storer_of(*current);
  const auto group = static_cast<uint32_t>(current->store_groups);
  const Clock* knows = &clock_of(*current);
  read_shared(copy.shared, copy.bytes, {reader_agent(storer), group + 1, knows, ASYNC}, copy.site);
  access_rows(copy, add ? GlobalAccess::ADD_ASYNC : GlobalAccess::WRITE_ASYNC,
              {writer_agent(storer), group + 1, knows, ASYNC});
  copy.block = static_cast<int>(statistics().blocks);
  copy.thread = current->index;
  copy.group = current->store_groups;
  copy.add = add;
  ++current->open_stores;
  if (options().tma == EAGER) {
    write_out(copy);
  } else {
    stores.push_back(std::move(copy));
  }
}

}  // namespace

bool step_bulk() {
  // If no thread can run, only a load can help: stores may stay late.
  const size_t choices = loads.size() + (options().tma == RANDOM ? stores.size() : 0);
  if (choices == 0) return false;
  const size_t choice = random_bits() % choices;
  if (choice < loads.size()) {
    finish_load(choice);
    return true;
  }
  Copy& copy = stores[choice - loads.size()];
  if (!copy.captured) {
    capture(copy);
  } else {
    write_out(copy);
    stores.erase(stores.begin() + (choice - loads.size()));
  }
  return true;
}

void finish_bulk_block() {
  for (Copy& copy : stores) capture(copy);
  if (!loads.empty()) {
    fail(loads[0].site, "the block ends while this bulk load is still under way");
  }
}

void finish_bulk_launch() {
  if (options().seed != 0) std::shuffle(stores.begin(), stores.end(), random_bits);
  finish_stores([](const Copy&) { return true; });
}

void drop_bulk() {
  loads.clear();
  stores.clear();
}

void check_store_exit(const Thread& thread) {
  if (thread.open_stores > 0 || thread.groups_read < thread.store_groups) {
    fail(thread.site,
         "the thread leaves while its bulk store may still read shared memory: expected "
         "tma_store_commit and tma_store_wait or tma_store_wait_read");
  }
}

void store_wait(int groups, bool only_read, Where where) {
  const Entry entry(where);
  Thread& thread = *current;
  const int done = thread.store_groups - groups;
  const int block = static_cast<int>(statistics().blocks);
  const auto selected = [&](const Copy& copy) {
    return copy.block == block && copy.thread == thread.index && copy.group < done;
  };
  if (only_read) {
    for (Copy& copy : stores) {
      if (selected(copy)) capture(copy);
    }
  } else {
    finish_stores(selected);
  }
  thread.groups_read = std::max(thread.groups_read, done);
  if (!only_read) thread.groups_written = std::max(thread.groups_written, done);
  if (thread.storer < 0) return;
  clock_of(thread).at[reader_agent(thread.storer)] = thread.groups_read;
  clock_of(thread).at[writer_agent(thread.storer)] = thread.groups_written;
}

}  // namespace aapt::sim

namespace aapt::hopper {

using namespace sim;

void tma_load(void* smem, const TensorMap* map, uint64_t* bar, int rank, const int* at,
              Where where) {
  const Entry entry(where);
  const Copy copy = tile(map, smem, rank, at, "TMA load");
  issue_load(copy, bar);
  tag_layout(smem, copy.bytes, map->swizzle);
}

void tma_store(const TensorMap* map, const void* smem, int rank, const int* at, bool add,
               Where where) {
  const Entry entry(where);
  if (add && map->element_bytes != 4) {
    fail(current->site, "TMA reduce-add: expected a float32 tensor map");
  }
  issue_store(tile(map, smem, rank, at, add ? "TMA reduce-add" : "TMA store"), add);
}

void bulk_load(void* smem, const void* global, uint32_t bytes, uint64_t* bar, Where where) {
  const Entry entry(where);
  issue_load(run(global, smem, bytes, 1, "bulk load"), bar);
}

void bulk_store(void* global, const void* smem, uint32_t bytes, Where where) {
  const Entry entry(where);
  issue_store(run(global, smem, bytes, 1, "bulk store"), false);
}

void bulk_reduce_add_f32(float* global, const float* smem, uint32_t bytes, Where where) {
  const Entry entry(where);
  issue_store(run(global, smem, bytes, 4, "bulk reduce-add"), true);
}

void tma_store_commit() {
  ++current->store_groups;
  current->open_stores = 0;
}

const char* make_tensor_map(TensorMap* map, void* base, int element_bytes, int rank,
                            const uint64_t* dims, const uint64_t* strides_bytes,
                            const uint32_t* box, Swizzle swizzle) {
  if (element_bytes != 1 && element_bytes != 2 && element_bytes != 4) {
    return "tensor map: expected elements of 1, 2 or 4 bytes";
  }
  if (rank < 1 || rank > 5) return "tensor map: expected a rank of 1 to 5";
  if (base == nullptr || reinterpret_cast<uintptr_t>(base) % 16 != 0) {
    return "tensor map: expected a base on a 16-byte boundary";
  }
  *map = TensorMap{};
  map->base = static_cast<char*>(base);
  map->element_bytes = element_bytes;
  map->rank = rank;
  map->swizzle = swizzle;
  for (int i = 0; i < rank; ++i) {
    map->dims[i] = dims[i];
    map->box[i] = box[i];
    map->strides[i] = i == 0 ? element_bytes : strides_bytes[i - 1];
    if (dims[i] == 0 || dims[i] > uint64_t{1} << 32) {
      return "tensor map: expected dimensions of 1 to 2^32";
    }
    if (box[i] == 0 || box[i] > 256) return "tensor map: expected a box of 1 to 256 elements";
    if (i > 0 && (map->strides[i] % 16 != 0 || map->strides[i] >= uint64_t{1} << 40)) {
      return "tensor map: expected strides that are multiples of 16 bytes, below 2^40";
    }
  }
  const uint32_t row = box[0] * element_bytes;
  if (row % 16 != 0) return "tensor map: expected an inner box of a multiple of 16 bytes";
  if (swizzle != SW_NONE && row > span_of(swizzle)) {
    return "tensor map: expected an inner box within the swizzle span";
  }
  if (swizzle != SW_NONE && row < span_of(swizzle)) {
    return "tensor map: not simulated: an inner box shorter than the swizzle span";
  }
  return nullptr;
}

}  // namespace aapt::hopper
