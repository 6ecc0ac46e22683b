#include "sim/sites.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>
#include <vector>

namespace aapt::sim {
namespace {

constexpr Site kInstruction = 1u << 31;
constexpr int kLineBits = 18;

std::vector<const char*> files;

struct Library {
  uintptr_t base;
  std::string path;
  std::vector<std::pair<uintptr_t, uintptr_t>> segments;
};
Library library;

struct Search {
  uintptr_t address;
  Library* found;
};

int visit_library(dl_phdr_info* info, size_t, void* data) {
  auto& search = *static_cast<Search*>(data);
  Library here{info->dlpi_addr, info->dlpi_name, {}};
  bool inside = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr, end = begin + header.p_memsz;
    inside |= begin <= search.address && search.address < end;
    here.segments.push_back({begin, end});
  }
  if (!inside) return 0;
  *search.found = here;
  return 1;
}

// The line of an instruction, if the kernel was compiled with -g and addr2line is there.
std::string source_line(uintptr_t offset) {
  const std::string path = library.path.empty() ? "/proc/self/exe" : library.path;
  char command[1024], line[512] = "";
  snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", path.c_str(),
           static_cast<size_t>(offset));
  if (FILE* pipe = popen(command, "r")) {
    if (fgets(line, sizeof line, pipe) == nullptr) line[0] = 0;
    pclose(pipe);
  }
  line[strcspn(line, " \n")] = 0;
  return line[0] == 0 || line[0] == '?' ? "" : line;
}

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

}  // namespace

Site site_of(Where where) {
  static size_t last = 0;
  if (last >= files.size() || files[last] != where.file) {
    for (last = 0; last < files.size() && files[last] != where.file; ++last) {
    }
    if (last == files.size()) files.push_back(where.file);
  }
  return static_cast<Site>(last << kLineBits) | static_cast<Site>(where.line);
}

Site site_of_instruction(const void* instruction) {
  return kInstruction |
         static_cast<Site>(reinterpret_cast<uintptr_t>(instruction) - library.base - 1);
}

std::string describe(Site site) {
  if (site == 0) return "?";
  if (site & kInstruction) {
    const uintptr_t offset = site & ~kInstruction;
    const std::string line = source_line(offset);
    char place[64];
    snprintf(place, sizeof place, "instruction 0x%zx", static_cast<size_t>(offset));
    return line.empty() ? place : base_name(line);
  }
  const size_t file = site >> kLineBits;
  const std::string name = file < files.size() ? base_name(files[file]) : "?";
  return name + ":" + std::to_string(site & ((1u << kLineBits) - 1));
}

void enter_library(const void* function) {
  // Looked up once as long as the kernels come from one library.
  static uintptr_t known = 0;
  const auto address = reinterpret_cast<uintptr_t>(function);
  if (address == known) return;
  known = address;
  Search search{address, &library};
  dl_iterate_phdr(visit_library, &search);
}

bool in_library(const void* pointer, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  for (const auto& segment : library.segments) {
    if (segment.first <= begin && begin + bytes <= segment.second) return true;
  }
  return false;
}

}  // namespace aapt::sim
