// Warp-wide operations: exchange, matrices, register allocation.
#include "sim/collective.h"
#include "sim/races.h"

namespace aapt::sim {

std::vector<Warp> warps;

namespace {

int register_pool;

int max_registers_at_launch() {
  const int even_share = kRegisterFile / thread_count / 8 * 8;
  return even_share < 248 ? even_share : 248;
}

void sync_memory(Warp& warp, Slot*) {
  if (!options().races) return;
  static Clock all;
  const Thread* lanes = &threads[warp.index * kWarp];
  all = clock_of(lanes[0]);
  for (int lane = 1; lane < kWarp; ++lane) join(all, clock_of(lanes[lane]));
  for (int lane = 0; lane < kWarp; ++lane) {
    join(clock_of(lanes[lane]), all);
    tick(lanes[lane]);
  }
}

enum MatrixMove { LOAD = 0, STORE = 1 };

void move_elements(const Thread& thread, uint8_t* at, int bytes, uint64_t& value, int bit,
                   MatrixMove move) {
  uint64_t element = value >> bit;
  if (move == STORE) {
    write_shared(at, bytes, actor_of(thread), current->site);
    memcpy(at, &element, bytes);
    return;
  }
  read_shared(at, bytes, actor_of(thread), current->site);
  memcpy(&element, at, bytes);
  const uint64_t mask = ((uint64_t{1} << 8 * bytes) - 1) << bit;
  value = (value & ~mask) | (element << bit & mask);
}

// Lanes 8 m to 8 m + 7 hold the row addresses of matrix m. Lane l has elements 2 (l % 4) and 2 (l %
// 4) + 1 of row l / 4 of each matrix, or, if transposed, of column l / 4.
void move_matrices(Warp& warp, Slot* slots, MatrixMove move, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto row_address = [&](int row) {
      return reinterpret_cast<uint8_t*>(slots[matrix * 8 + row][0]);
    };
    const int bit = 32 * (matrix & 1);
    for (int lane = 0; lane < kWarp; ++lane) {
      const Thread& thread = threads[warp.index * kWarp + lane];
      uint64_t& value = slots[lane][1 + matrix / 2];
      const int pair = lane % 4 * 2;
      if (transposed) {
        for (int i = 0; i < 2; ++i) {
          move_elements(thread, row_address(pair + i) + lane / 4 * 2, 2, value, bit + 16 * i, move);
        }
      } else {
        move_elements(thread, row_address(lane / 4) + pair * 2, 4, value, bit, move);
      }
    }
  }
}

template <MatrixMove kMove, bool kTransposed>
void matrices(Warp& warp, Slot* slots) {
  move_matrices(warp, slots, kMove, kTransposed);
}

void check_row_address(const void* smem, const char* what) {
  if (!in_shared(smem, 16) || shared_offset(smem) % 16 != 0) {
    fail(current->site, "%s: expected 16-byte aligned rows in shared memory, got smem+%zd", what,
         static_cast<const uint8_t*>(smem) - shared_window);
  }
}

void store_matrices(void* smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                    void (*last)(Warp&, Slot*)) {
  check_row_address(smem, "stmatrix");
  const uint64_t values[] = {reinterpret_cast<uint64_t>(smem), a | static_cast<uint64_t>(b) << 32,
                             c | static_cast<uint64_t>(d) << 32};
  collective(MATRIX, values, 3, last, "stmatrix");
}

void load_matrices(uint32_t (&r)[4], const void* smem, void (*last)(Warp&, Slot*)) {
  check_row_address(smem, "ldmatrix");
  const uint64_t values[] = {reinterpret_cast<uint64_t>(smem), 0, 0};
  const Slot& own = collective(MATRIX, values, 3, last, "ldmatrix")[current->lane];
  for (int i = 0; i < 4; ++i) r[i] = static_cast<uint32_t>(own[1 + i / 2] >> (32 * (i & 1)));
}

}  // namespace

void reset_warps() {
  warps.assign(warp_count, Warp{});
  register_pool = kRegisterFile;
  for (int i = 0; i < warp_count; ++i) {
    warps[i].index = i;
    warps[i].registers = max_registers_at_launch();
    register_pool -= warps[i].registers * kWarp;
  }
}

void lane_left(const Thread& thread) {
  Warp& warp = warps[thread.warp];
  ++warp.left;
  if (warp.arrived > 0) {
    fail(thread.site,
         "warp divergence: the thread leaves, while other lanes of the warp wait at %s",
         describe(warp.site).c_str());
  }
}

Slot* collective(CollectiveKind kind, const uint64_t* values, int count, void (*last)(Warp&, Slot*),
                 const char* what) {
  Warp& warp = warps[current->warp];
  if (warp.left > 0) {
    fail(current->site, "warp divergence: %s here, but %d lanes of the warp have left", what,
         warp.left);
  }
  const uint64_t sequence = current->collectives++;
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.site = current->site;
  }
  if (kind != warp.kind || current->site != warp.site) {
    fail(current->site, "warp divergence: %s here, while other lanes of the warp wait at %s", what,
         describe(warp.site).c_str());
  }
  Slot* slots = warp.slots[sequence & 1];
  for (int i = 0; i < count; ++i) slots[current->lane][i] = values[i];
  if (++warp.arrived == kWarp) {
    if (last != nullptr) last(warp, slots);
    warp.arrived = 0;
    ++warp.collectives;
  } else {
    wait_until([](Thread& thread) { return warps[thread.warp].collectives > thread.argument; },
               nullptr, sequence, what);
  }
  return slots;
}

uint32_t shuffle(uint32_t value, int lane_or_mask, bool is_xor, Where where) {
  const Entry entry(where);
  const uint64_t values[] = {value};
  const Slot* slots = collective(SHUFFLE, values, 1, nullptr, "shuffle");
  const int source = is_xor ? current->lane ^ lane_or_mask : lane_or_mask;
  return static_cast<uint32_t>(slots[source & (kWarp - 1)][0]);
}

void set_registers(bool more, int count, Where where) {
  const Entry entry(where);
  const char* what = more ? "setmaxnreg_inc" : "setmaxnreg_dec";
  Warp& warp = warps[current->warp];
  if (count % 8 != 0 || count < 24 || count > 256) {
    fail(current->site, "%s: expected a multiple of 8 from 24 to 256, got %d", what, count);
  }
  if (more ? count < warp.registers : count > warp.registers) {
    fail(current->site, "%s: %d registers asked for, and there are %d", what, count,
         warp.registers);
  }
  if (more) {
    wait_until(
        [](Thread& thread) {
          const Warp& warp = warps[thread.warp];
          const int wanted = static_cast<int>(thread.argument) - warp.registers;
          return wanted == 0 || register_pool >= wanted * kWarp;
        },
        nullptr, count, "setmaxnreg_inc: the register file is exhausted");
  }
  const uint64_t values[] = {static_cast<uint64_t>(count)};
  collective(
      REGISTERS, values, 1,
      [](Warp& warp, Slot* slots) {
        register_pool += (warp.registers - static_cast<int>(slots[0][0])) * kWarp;
        warp.registers = static_cast<int>(slots[0][0]);
      },
      what);
}

}  // namespace aapt::sim

namespace aapt::hopper {

using namespace sim;

void warp_sync(Where where) {
  const Entry entry(where);
  collective(WARP_SYNC, nullptr, 0, sync_memory, "warp_sync");
}

bool elect_one(Where where) {
  const Entry entry(where);
  collective(ELECT, nullptr, 0, nullptr, "elect_one");
  const int seed = options().seed;
  return current->lane == (seed == 0 ? 0 : (seed * 7 + current->warp) % kWarp);
}

void stmatrix_x4(void* smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d, Where where) {
  const Entry entry(where);
  store_matrices(smem, a, b, c, d, matrices<STORE, false>);
}

void stmatrix_x4_trans(void* smem, uint32_t a, uint32_t b, uint32_t c, uint32_t d, Where where) {
  const Entry entry(where);
  store_matrices(smem, a, b, c, d, matrices<STORE, true>);
}

void ldmatrix_x4(uint32_t (&r)[4], const void* smem, Where where) {
  const Entry entry(where);
  load_matrices(r, smem, matrices<LOAD, false>);
}

void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem, Where where) {
  const Entry entry(where);
  load_matrices(r, smem, matrices<LOAD, true>);
}

}  // namespace aapt::hopper
