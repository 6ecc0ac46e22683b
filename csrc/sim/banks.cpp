#include "sim/banks.h"

#include <algorithm>
#include <deque>
#include <map>
#include <string>
#include <utility>

namespace aapt::sim {
namespace {

constexpr int kBanks = 32;  // of 4 bytes
constexpr uint32_t kLine = 4 * kBanks;

struct Access {
  int lanes = 0;  // that have arrived
  size_t bytes = 0;
  uint32_t addresses[kWarp];
};

struct Pending {
  uint64_t done[kWarp] = {};  // accesses of each lane
  uint64_t first = 0;         // the number of the first in `accesses`
  std::deque<Access> accesses;
};

std::map<std::pair<Site, int>, Pending> pending;  // by place and warp
std::map<Site, BankCount> counts;

// The cycles in which banks serve `lanes` of `bytes` each: of every bank, as many as words differ.
int wavefronts(const uint32_t* addresses, int lanes, size_t bytes) {
  std::vector<uint32_t> words[kBanks];
  for (int lane = 0; lane < lanes; ++lane) {
    for (uint32_t word = addresses[lane] / 4; word * 4 < addresses[lane] + bytes; ++word) {
      auto& bank = words[word % kBanks];
      if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
    }
  }
  size_t most = 0;
  for (const auto& bank : words) most = std::max(most, bank.size());
  return static_cast<int>(most);
}

void add(Site site, const uint32_t* addresses, size_t bytes) {
  const int together = std::min<int>(kWarp, kLine / static_cast<uint32_t>(bytes));
  BankCount& count = counts[site];
  ++count.instructions;
  for (int lane = 0; lane < kWarp; lane += together) {
    ++count.least;
    count.wavefronts += wavefronts(addresses + lane, together, bytes);
  }
}

}  // namespace

void reset_banks() { pending.clear(); }

void count_banks(const Thread& thread, Site site, uint32_t address, size_t bytes) {
  if (!options().banks) return;
  bytes = std::max<size_t>(bytes, 4);
  Pending& here = pending[{site, thread.warp}];
  const uint64_t number = here.done[thread.lane]++;
  if (number < here.first) return;  // dropped: the lane is too far behind
  while (here.accesses.size() <= number - here.first) here.accesses.emplace_back();
  Access& access = here.accesses[number - here.first];
  access.addresses[thread.lane] = address;
  access.bytes = std::max(access.bytes, bytes);
  if (++access.lanes == kWarp) add(site, access.addresses, access.bytes);
  constexpr size_t kMost = 4096;  // of lanes that wait for others
  while (!here.accesses.empty() &&
         (here.accesses.front().lanes == kWarp || here.accesses.size() > kMost)) {
    here.accesses.pop_front();
    ++here.first;
  }
}

void count_matrix_banks(Site site, const uint32_t (&addresses)[kWarp]) {
  if (options().banks) add(site, addresses, 16);
}

std::vector<std::pair<std::string, BankCount>> bank_counts() {
  std::map<std::string, BankCount> places;  // a place may be several instructions
  for (const auto& [site, count] : counts) {
    BankCount& place = places[describe(site)];
    place.instructions += count.instructions;
    place.least += count.least;
    place.wavefronts += count.wavefronts;
  }
  counts.clear();
  return {places.begin(), places.end()};
}

}  // namespace aapt::sim
