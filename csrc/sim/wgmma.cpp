// wgmma: a queue of instructions per warp. An instruction reads shared memory at some time between
// its issue and the wait for its group, and holds its accumulator registers until then.
#include <algorithm>
#include <array>
#include <cmath>
#include <deque>

#include "sim/collective.h"
#include "sim/races.h"
#include "sim/swizzle.h"
#include "sim/tensor_core.h"
#include "sim/wgmma_registers.h"

namespace aapt::sim {
namespace {

struct Instruction {
  WgmmaShape shape;
  bool a_in_registers, accumulate, computed;
  int group, arrived;
  Site site;
  uint64_t a, b;
  float* d[kWarp];
  const uint32_t* a_registers[kWarp];
  uint32_t a_values[kWarp][4];
};

struct Engine {
  std::deque<Instruction> queue;
  int retired, groups_done, issued;
};
std::vector<Engine> engines;  // by warp

// An instruction as the first warp of a warpgroup issued it; the other three must agree.
struct Issue {
  Site site;
  int n;
  bool accumulate;
  uint64_t a, b;
  bool operator==(const Issue& other) const {
    return site == other.site && n == other.n && accumulate == other.accumulate && a == other.a &&
           b == other.b;
  }
};
std::vector<std::vector<Issue>> issues;  // by warpgroup

int depth(const WgmmaShape& shape) { return shape.e4m3 ? 32 : 16; }
int element_bytes(const WgmmaShape& shape) { return shape.e4m3 ? 1 : 2; }

Swizzle descriptor_swizzle(uint64_t descriptor) {
  return static_cast<Swizzle>((4 - (descriptor >> 62)) % 4);
}

// An operand in shared memory, as its descriptor says: `i` along M or N, `k` along K.
struct Operand {
  uint64_t descriptor;
  int extent, k;
  bool mn_major;
  int element_bytes;

  int piece() const { return 16 / element_bytes; }  // elements in 16 bytes, which stay together

  // True if rows of the operand's groups are the rows of a swizzle pattern: 8 spans, from a
  // multiple of their size on.
  bool follows_patterns() const {
    const uint32_t start = (descriptor & 0x3FFF) << 4, sbo = (descriptor >> 32 & 0x3FFF) << 4;
    const Swizzle swizzle = descriptor_swizzle(descriptor);
    const uint32_t span = span_of(swizzle), pattern = 8 * span;
    return swizzle == hopper::SW_NONE || (start % pattern < span && sbo % pattern == 0);
  }

  uint32_t address(int i, int k) const {
    const uint32_t start = (descriptor & 0x3FFF) << 4;
    const uint32_t lbo = (descriptor >> 16 & 0x3FFF) << 4, sbo = (descriptor >> 32 & 0x3FFF) << 4;
    const Swizzle swizzle = descriptor_swizzle(descriptor);
    const uint32_t span = span_of(swizzle);
    uint32_t at = start;
    if (!mn_major) {
      const uint32_t byte = k * element_bytes;
      at += i / 8 * sbo + i % 8 * span;
      at += swizzle == hopper::SW_NONE ? byte / 16 * lbo + byte % 16 : byte;
    } else {
      const int width = span / element_bytes;
      at += i % width * element_bytes + k % 8 * span;
      at += swizzle == hopper::SW_NONE ? i / width * sbo + k / 8 * lbo
                                       : i / width * lbo + k / 8 * sbo;
    }
    return swizzle_address(at, swizzle);
  }

  // Calls visit(i, k, address) for each 16 bytes: `piece` elements along K, or along M or N.
  template <typename Visit>
  void for_pieces(int first, int last, Visit visit) const {
    for (int i = first; i < last; i += mn_major ? piece() : 1) {
      for (int j = 0; j < k; j += mn_major ? 1 : piece()) visit(i, j, address(i, j));
    }
  }
};

Operand operand_a(const Instruction& it) {
  return {it.a, 64, depth(it.shape), it.shape.a_mn_major, element_bytes(it.shape)};
}
Operand operand_b(const Instruction& it) {
  return {it.b, it.shape.n, depth(it.shape), it.shape.b_mn_major, element_bytes(it.shape)};
}

void check_operand(const Operand& operand, const Actor& actor, Site site) {
  const Swizzle swizzle = descriptor_swizzle(operand.descriptor);
  const bool races = options().races;
  if (!options().inside_patterns && !operand.follows_patterns()) {
    fail(site, "a wgmma descriptor starts inside a swizzle pattern");
  }
  operand.for_pieces(0, operand.extent, [&](int, int, uint32_t address) {
    if (address < kSharedBase || address + 16 > kSharedBase + shared_bytes) {
      fail(site, "a wgmma descriptor reads outside shared memory: smem+%d",
           static_cast<int>(address) - static_cast<int>(kSharedBase));
    }
    const uint8_t* at = shared_at(address);
    const int layout = races ? layout_of(at) : -1;
    if (layout >= 0 && layout != swizzle) {
      fail(site, "a wgmma descriptor has swizzle mode %d, but TMA filled smem+%zu with mode %d",
           swizzle, shared_offset(at), layout);
    }
    read_shared(at, 16, actor, site);
  });
}

float from_e4m3(int bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 127) == 127) return NAN;
  const float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                    : std::ldexp(8.0f + mantissa, exponent - 10);
  return bits & 128 ? -value : value;
}

const std::array<float, 256>& e4m3_values() {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> values;
    for (int i = 0; i < 256; ++i) values[i] = from_e4m3(i);
    return values;
  }();
  return values;
}

float from_bf16(uint32_t bits) { return hopper::float_from_bits(bits << 16); }

float element(const uint8_t* at, bool e4m3) {
  if (e4m3) return e4m3_values()[*at];
  uint16_t bits;
  memcpy(&bits, at, 2);
  return from_bf16(bits);
}

Product product;

// Four registers of lane l: rows l / 4 and l / 4 + 8, then both again 16 bytes further along K.
void unpack_a_registers(const Instruction& it) {
  const int per_register = 4 / element_bytes(it.shape);
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int j = 0; j < 4; ++j) {
      const int row = lane / 4 + (j & 1) * 8;
      const int k = (lane % 4 + j / 2 * 4) * per_register;
      const auto bytes = reinterpret_cast<const uint8_t*>(&it.a_values[lane][j]);
      for (int e = 0; e < per_register; ++e) {
        product.a[row][k + e] = element(bytes + e * element_bytes(it.shape), it.shape.e4m3);
      }
    }
  }
}

template <typename Store>
void unpack_shared(const Operand& operand, int first, int last, bool e4m3, Store store) {
  operand.for_pieces(first, last, [&](int i, int k, uint32_t address) {
    const uint8_t* at = shared_at(address);
    for (int e = 0; e < operand.piece(); ++e, at += operand.element_bytes) {
      store(operand.mn_major ? i + e : i, operand.mn_major ? k : k + e, element(at, e4m3));
    }
  });
}

// The lane and the register of an element of the accumulator fragment.
int fragment_lane(int row, int column) { return row % 8 * 4 + column % 8 / 2; }
int fragment_register(int row, int column) { return column / 8 * 4 + row / 8 * 2 + (column & 1); }

void compute(int warp, Instruction& it) {
  if (it.computed) return;
  it.computed = true;
  ++statistics().wgmmas;
  const int n = it.shape.n;
  unpack_shared(operand_b(it), 0, n, it.shape.e4m3,
                [](int i, int k, float value) { product.b[k][i] = value; });
  if (it.a_in_registers) {
    unpack_a_registers(it);
  } else {
    // A piece of an MN-major operand may begin before a warp's rows, but never straddles them.
    const int first = warp % 4 * kRows;
    unpack_shared(operand_a(it), first, first + kRows, it.shape.e4m3,
                  [&](int i, int k, float value) { product.a[i - first][k] = value; });
  }
  float* values[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    for (Accumulator& tile : threads[warp * kWarp + lane].in_flight) {
      if (tile.registers == it.d[lane]) values[lane] = tile.values.data();
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < n; ++column) {
      product.d[row][column] =
          it.accumulate ? values[fragment_lane(row, column)][fragment_register(row, column)] : 0.0f;
    }
  }
  it.shape.e4m3 ? multiply_e4m3(product, n) : multiply_bf16(product, n, depth(it.shape));
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < n; ++column) {
      values[fragment_lane(row, column)][fragment_register(row, column)] = product.d[row][column];
    }
  }
}

void give_back(Thread& thread, const Accumulator& tile) {
  for (int i = 0; i < tile.count; ++i) {
    if (hopper::bits_from_float(tile.registers[i]) != kPoison) {
      fail(thread.site,
           "accumulator register %d of lane %d was touched while a wgmma on it was in "
           "flight",
           i, thread.lane);
    }
  }
  memcpy(tile.registers, tile.values.data(), tile.count * sizeof(float));
}

// Completes the groups before `end`.
void complete(int warp, int end) {
  Engine& engine = engines[warp];
  while (!engine.queue.empty() && engine.queue.front().group < end) {
    Instruction& it = engine.queue.front();
    if (it.arrived != kWarp) fail(it.site, "this wgmma was not executed by all lanes");
    compute(warp, it);
    for (int lane = 0; lane < kWarp && it.a_in_registers; ++lane) {
      if (memcmp(it.a_registers[lane], it.a_values[lane], sizeof(it.a_values[lane])) != 0) {
        fail(it.site, "A-fragment registers of this wgmma were modified before its wait");
      }
    }
    engine.queue.pop_front();
    ++engine.retired;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    Thread& thread = threads[warp * kWarp + lane];
    auto& tiles = thread.in_flight;
    for (const Accumulator& tile : tiles) {
      if (tile.last_group < end) give_back(thread, tile);
    }
    tiles.erase(std::remove_if(tiles.begin(), tiles.end(),
                               [&](const Accumulator& tile) { return tile.last_group < end; }),
                tiles.end());
  }
  engine.groups_done = std::max(engine.groups_done, end);
}

// The accumulator in this thread, poisoned from its first wgmma until the wait.
void hold_registers(Thread& thread, float* d, int count) {
  auto& tiles = thread.in_flight;
  auto tile = std::find_if(tiles.begin(), tiles.end(),
                           [&](const Accumulator& tile) { return tile.registers == d; });
  if (tile == tiles.end()) {
    if (!thread.wgmma_fenced) {
      fail(thread.site, "wgmma without wgmma_fence after its registers were last accessed");
    }
    tiles.push_back({d, count, 0, std::vector<float>(d, d + count)});
    tile = tiles.end() - 1;
    for (int i = 0; i < count; ++i) memcpy(d + i, &kPoison, 4);
  }
  tile->last_group = thread.wgmma_groups;
}

uint64_t known_turn;

// The joint knowledge of the lanes of the current thread's warp.
const Clock& clock_of_warp(int warp) {
  static Clock knows;
  if (!options().races) return knows;
  // Since this thread was resumed, no other clock has changed.
  if (known_turn != statistics().switches) {
    known_turn = statistics().switches;
    knows = clock_of(threads[warp * kWarp]);
    for (int lane = 1; lane < kWarp; ++lane) join(knows, clock_of(threads[warp * kWarp + lane]));
  }
  join(knows, clock_of(*current));
  return knows;
}

// Called by the last lane: the warp has issued the instruction.
void issue(int warp, Instruction& it) {
  Engine& engine = engines[warp];
  auto& group = issues[warp / 4];
  const Issue here{it.site, it.shape.n, it.accumulate, it.a, it.b};
  if (static_cast<int>(group.size()) == engine.issued) group.push_back(here);
  if (!(group[engine.issued] == here)) {
    fail(it.site, "the warps of this warpgroup issue different wgmma sequences");
  }
  ++engine.issued;
  const Actor actor{wgmma_agent(warp), static_cast<uint32_t>(it.group) + 1, &clock_of_warp(warp),
                    ASYNC};
  check_operand(operand_b(it), actor, it.site);
  if (!it.a_in_registers) check_operand(operand_a(it), actor, it.site);
  if (options().wgmma == EAGER) compute(warp, it);
}

}  // namespace

void reset_wgmma() {
  engines.assign(warp_count, Engine{});
  issues.assign(warp_count / 4 + 1, {});
  known_turn = 0;
}

void step_wgmma() {
  const int warp = random_bits() % warp_count;
  for (Instruction& it : engines[warp].queue) {
    if (it.computed) continue;
    if (it.arrived == kWarp) compute(warp, it);
    return;
  }
}

void check_wgmma_exit(const Thread& thread) {
  if (!thread.in_flight.empty()) {
    fail(thread.site, "the thread leaves with a wgmma in flight: expected wgmma_wait");
  }
}

void finish_wgmma_block() {
  for (int warp = 0; warp < warp_count; ++warp) {
    const int group = warp / 4;
    if (engines[warp].issued != static_cast<int>(issues[group].size()) ||
        (!issues[group].empty() && group * 4 + 4 > warp_count)) {
      fail(issues[group].back().site, "wgmma was not executed by all four warps of the warpgroup");
    }
  }
}

void check_accumulator_access(const Thread& thread, const void* pointer, bool write, Site site) {
  for (const Accumulator& tile : thread.in_flight) {
    const auto at = static_cast<const float*>(pointer);
    if (tile.registers <= at && at < tile.registers + tile.count) {
      fail(site, "accumulator register %td is %s while a wgmma on it is in flight",
           at - tile.registers, write ? "written" : "read");
    }
  }
}

void wgmma(float* d, const WgmmaShape& shape, const uint32_t* a_registers, uint64_t a, uint64_t b,
           bool accumulate, Where where) {
  const Entry entry(where);
  Thread& thread = *current;
  Engine& engine = engines[thread.warp];
  const size_t place = thread.wgmmas++ - engine.retired;
  if (place == engine.queue.size()) {
    Instruction it{};
    it.shape = shape;
    it.a_in_registers = a_registers != nullptr;
    it.accumulate = accumulate;
    it.group = thread.wgmma_groups;
    it.site = thread.site;
    it.a = a;
    it.b = b;
    engine.queue.push_back(it);
  }
  Instruction& it = engine.queue[place];
  if (it.site != thread.site || it.a != a || it.b != b || it.accumulate != accumulate ||
      it.shape.n != shape.n || it.group != thread.wgmma_groups) {
    fail(thread.site, "the operands of a wgmma differ between lanes of the warp");
  }
  if (!thread.wgmma_fenced && thread.in_flight.empty()) {
    fail(thread.site, "wgmma without wgmma_fence after its registers were last accessed");
  }
  it.d[thread.lane] = d;
  it.a_registers[thread.lane] = a_registers;
  if (a_registers != nullptr) memcpy(it.a_values[thread.lane], a_registers, 16);
  hold_registers(thread, d, shape.n / 2);
  if (++it.arrived == kWarp) issue(thread.warp, it);
}

void wgmma_wait(int groups, Where where) {
  const Entry entry(where);
  Thread& thread = *current;
  const uint64_t values[] = {static_cast<uint64_t>(groups),
                             static_cast<uint64_t>(thread.wgmma_groups)};
  collective(
      WGMMA_WAIT, values, 2,
      [](Warp& warp, Slot* slots) {
        for (int lane = 1; lane < kWarp; ++lane) {
          if (slots[lane][1] != slots[0][1]) {
            fail(current->site,
                 "the lanes of the warp committed different numbers of wgmma groups");
          }
        }
        complete(warp.index, static_cast<int>(slots[0][1]) - static_cast<int>(slots[0][0]));
      },
      "wgmma_wait");
  thread.wgmma_fenced = false;
  uint32_t& known = clock_of(thread).at[wgmma_agent(thread.warp)];
  known = std::max(known, static_cast<uint32_t>(engines[thread.warp].groups_done));
}

}  // namespace aapt::sim

namespace aapt::hopper {

using namespace sim;

void wgmma_fence(Where where) {
  const Entry entry(where);
  collective(WGMMA_FENCE, nullptr, 0, nullptr, "wgmma_fence");
  current->wgmma_fenced = true;
}

void wgmma_commit() {
  ++current->wgmma_groups;
  current->wgmma_fenced = false;
}

}  // namespace aapt::hopper
