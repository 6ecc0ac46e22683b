// Kernel files are compiled with -fsanitize=thread but linked with these functions, not with
// libtsan: the compiler calls one for every plain load and store that may reach memory.
#include "sim/fibers.h"
#include "sim/global.h"
#include "sim/races.h"
#include "sim/wgmma_registers.h"

namespace aapt::sim {
namespace {

// The most accesses of a thread between two calls of the simulator: more are an endless loop.
constexpr uint32_t kMaxAccesses = 1u << 24;

bool on_own_stack(const void* pointer) {
  return static_cast<size_t>(static_cast<const char*>(pointer) - current->stack) < kStackBytes;
}

void access_shared_plainly(const void* pointer, size_t bytes, bool write, Site site) {
  if (!in_shared(pointer, bytes)) {
    fail(site, "plain %s of %zu bytes at smem+%zu: outside shared memory (%zu bytes)",
         write ? "write" : "read", bytes, shared_offset(pointer), shared_bytes);
  }
  if (write) {
    write_shared(pointer, bytes, actor_of(*current), site);
  } else {
    read_shared(pointer, bytes, actor_of(*current), site);
  }
}

// Checks an access outside the thread's own stack. `alignment`: bytes, as the device requires.
void access_memory(const void* pointer, size_t bytes, size_t alignment, bool write, Site site) {
  in_kernel = false;
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    fail(site, "plain %s of %zu bytes at %p: misaligned", write ? "write" : "read", bytes, pointer);
  }
  if (shared_offset(pointer) < kSharedWindow) {
    access_shared_plainly(pointer, bytes, write, site);
  } else {
    access_elsewhere(pointer, bytes, write, site);
  }
  in_kernel = true;
}

inline __attribute__((always_inline)) void access(const void* pointer, size_t bytes,
                                                  size_t alignment, bool write) {
  if (!in_kernel) return;
  const void* instruction = __builtin_return_address(0);
  if (++plain_accesses == kMaxAccesses) {
    fail(site_of_instruction(instruction), "the thread does not end, and waits for nothing");
  }
  if (!on_own_stack(pointer)) {
    access_memory(pointer, bytes, alignment, write, site_of_instruction(instruction));
  } else if (!current->in_flight.empty()) {
    check_accumulator_access(*current, pointer, write, site_of_instruction(instruction));
  }
}

}  // namespace
}  // namespace aapt::sim

using aapt::sim::access;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define AAPT_HOOKS(n)                                                            \
  void __tsan_read##n(void* pointer) { access(pointer, n, n, false); }           \
  void __tsan_write##n(void* pointer) { access(pointer, n, n, true); }           \
  void __tsan_unaligned_read##n(void* pointer) { access(pointer, n, 1, false); } \
  void __tsan_unaligned_write##n(void* pointer) { access(pointer, n, 1, true); }
AAPT_HOOKS(1)
AAPT_HOOKS(2)
AAPT_HOOKS(4)
AAPT_HOOKS(8)
AAPT_HOOKS(16)
#undef AAPT_HOOKS

// Called by -fsanitize=alignment, because the compiler splits a vector access into parts that look
// aligned.
struct UndefinedTypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  uint8_t log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(const UndefinedTypeMismatch* data, const void* pointer) {
  if (!aapt::sim::in_kernel || aapt::sim::on_own_stack(pointer)) return;
  aapt::sim::in_kernel = false;
  aapt::sim::fail(aapt::sim::site_of({data->file, static_cast<int>(data->line)}),
                  "misaligned access at %p: expected a multiple of %d bytes", pointer,
                  1 << data->log_alignment);
}

void __tsan_read_range(void* pointer, size_t bytes) { access(pointer, bytes, 1, false); }
void __tsan_write_range(void* pointer, size_t bytes) { access(pointer, bytes, 1, true); }

// Host code beside a kernel may use atomics, as for a static variable's first use.
#define AAPT_ATOMIC_HOOKS(bits, T)                                                          \
  T __tsan_atomic##bits##_load(const volatile T* a, int) {                                  \
    return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                            \
  }                                                                                         \
  void __tsan_atomic##bits##_store(volatile T* a, T v, int) {                               \
    __atomic_store_n(a, v, __ATOMIC_SEQ_CST);                                               \
  }                                                                                         \
  T __tsan_atomic##bits##_exchange(volatile T* a, T v, int) {                               \
    return __atomic_exchange_n(a, v, __ATOMIC_SEQ_CST);                                     \
  }                                                                                         \
  T __tsan_atomic##bits##_fetch_add(volatile T* a, T v, int) {                              \
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);                                      \
  }                                                                                         \
  T __tsan_atomic##bits##_fetch_sub(volatile T* a, T v, int) {                              \
    return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST);                                      \
  }                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* a, T* c, T v, int, int) {   \
    return __atomic_compare_exchange_n(a, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* a, T* c, T v, int, int) {     \
    return __atomic_compare_exchange_n(a, c, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
  }
AAPT_ATOMIC_HOOKS(8, uint8_t)
AAPT_ATOMIC_HOOKS(16, uint16_t)
AAPT_ATOMIC_HOOKS(32, uint32_t)
AAPT_ATOMIC_HOOKS(64, uint64_t)
#undef AAPT_ATOMIC_HOOKS

}  // extern "C"
