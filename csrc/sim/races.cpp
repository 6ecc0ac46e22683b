#include "sim/races.h"

#include <algorithm>

namespace aapt::sim {
namespace {

constexpr int kReaders = 8;
constexpr uint8_t kBarrier = 0xFF;

// One 4-byte word.
struct Word {
  uint16_t writer, readers[kReaders];
  uint8_t written_bytes, read_bytes[kReaders];  // masks
  uint8_t proxy, reader_count, layout;          // layout: swizzle + 1, or kBarrier
  uint32_t write_time, read_times[kReaders];
  Site write_site, read_sites[kReaders];
};

Word words[kSharedWindow / 4];

// The writer has fenced since, and the actor knows of that.
bool is_fenced(const Word& word, const Actor& actor) {
  const auto& fences = threads[word.writer].proxy_fences;
  const auto next = std::lower_bound(fences.begin(), fences.end(), word.write_time);
  return next != fences.end() && *next < actor.knows->at[word.writer];
}

inline void check_after_write(const Word& word, size_t offset, bool write, const Actor& actor,
                              Site site) {
  if (word.writer != actor.agent && actor.knows->at[word.writer] < word.write_time) {
    fail(site, "race at smem+%zu: %s by %s is not ordered after the write by %s (%s)", offset,
         write ? "write" : "read", agent_name(actor.agent).c_str(), agent_name(word.writer).c_str(),
         describe(word.write_site).c_str());
  }
  if (actor.proxy == ASYNC && word.proxy == GENERIC && !is_fenced(word, actor)) {
    fail(site,
         "smem+%zu: %s %s what %s stored (%s) without fence_proxy_async in the writer, before "
         "the barrier that orders them",
         offset, agent_name(actor.agent).c_str(), write ? "overwrites" : "reads",
         agent_name(word.writer).c_str(), describe(word.write_site).c_str());
  }
}

void check_after_reads(const Word& word, size_t offset, uint8_t mask, const Actor& actor,
                       Site site) {
  for (int i = 0; i < word.reader_count; ++i) {
    if (word.readers[i] != actor.agent && (word.read_bytes[i] & mask) != 0 &&
        actor.knows->at[word.readers[i]] < word.read_times[i]) {
      fail(site, "race at smem+%zu: write by %s is not ordered after the read by %s (%s)", offset,
           agent_name(actor.agent).c_str(), agent_name(word.readers[i]).c_str(),
           describe(word.read_sites[i]).c_str());
    }
  }
}

inline void remember_reader(Word& word, uint8_t mask, const Actor& actor, Site site) {
  static int last = 0;  // neighbours have their readers in the same order
  int i = last;
  if (i >= word.reader_count || word.readers[i] != actor.agent) {
    for (i = 0; i < word.reader_count && word.readers[i] != actor.agent; ++i) {
    }
    last = i;
  }
  if (i < word.reader_count) {
    mask |= word.read_times[i] == actor.time ? word.read_bytes[i] : 0;
  } else {
    // Replaces a reader that is ordered before this one; if none, takes a free place, else any
    // place.
    for (i = 0; i < word.reader_count; ++i) {
      if (actor.knows->at[word.readers[i]] >= word.read_times[i]) break;
    }
    if (i == kReaders) {
      i = random_bits() % kReaders;
    } else if (i == word.reader_count) {
      ++word.reader_count;
    }
  }
  word.readers[i] = actor.agent;
  word.read_bytes[i] = mask;
  word.read_times[i] = actor.time;
  word.read_sites[i] = site;
}

template <typename Visit>
void for_words(const void* pointer, size_t bytes, Visit visit) {
  const size_t begin = shared_offset(pointer), end = begin + bytes;
  for (size_t word = begin / 4; word * 4 < end; ++word) {
    const size_t first = std::max(begin, word * 4) - word * 4;
    const size_t last = std::min(end, word * 4 + 4) - word * 4;
    const uint8_t mask = static_cast<uint8_t>((1 << last) - (1 << first));
    visit(words[word], word * 4, mask);
  }
}

}  // namespace

void reset_shared_races() { std::fill_n(words, (shared_bytes + 3) / 4, Word{}); }

void read_shared(const void* pointer, size_t bytes, const Actor& actor, Site site) {
  if (!options().races) return;
  ++statistics().accesses;
  for_words(pointer, bytes, [&](Word& word, size_t offset, uint8_t mask) {
    if (word.proxy != 0 && (word.written_bytes & mask) != 0) {
      check_after_write(word, offset, false, actor, site);
    }
    remember_reader(word, mask, actor, site);
  });
}

void write_shared(const void* pointer, size_t bytes, const Actor& actor, Site site) {
  if (!options().races) return;
  ++statistics().accesses;
  for_words(pointer, bytes, [&](Word& word, size_t offset, uint8_t mask) {
    if (word.layout == kBarrier) {
      fail(site, "smem+%zu: %s overwrites an mbarrier", offset, agent_name(actor.agent).c_str());
    }
    if (word.proxy != 0 && (word.written_bytes & mask) != 0) {
      check_after_write(word, offset, true, actor, site);
    }
    check_after_reads(word, offset, mask, actor, site);
    // One writer is recorded per word, with all bytes that it wrote at that time.
    const bool same = word.writer == actor.agent && word.write_time == actor.time;
    word.written_bytes = same ? word.written_bytes | mask : mask;
    word.reader_count = 0;
    word.writer = actor.agent;
    word.proxy = actor.proxy;
    word.layout = 0;
    word.write_time = actor.time;
    word.write_site = site;
  });
}

void tag_layout(const void* pointer, size_t bytes, int swizzle) {
  if (!options().races) return;
  for_words(pointer, bytes, [&](Word& word, size_t, uint8_t) { word.layout = swizzle + 1; });
}

int layout_of(const void* pointer) {
  const uint8_t layout = words[shared_offset(pointer) / 4].layout;
  return layout == kBarrier ? -1 : layout - 1;
}

void tag_barrier(const void* pointer) {
  if (!options().races) return;
  for_words(pointer, 8, [&](Word& word, size_t, uint8_t) { word.layout = kBarrier; });
}

}  // namespace aapt::sim
