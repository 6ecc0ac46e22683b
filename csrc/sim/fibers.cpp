#include "sim/fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#error "the simulator's context switch is written for x86-64"
#endif

// Saves only the registers that a call must preserve: a switch costs about 15 ns.
asm(R"(
  .text
  .globl aapt_sim_switch
  .hidden aapt_sim_switch
  .type aapt_sim_switch, @function
aapt_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size aapt_sim_switch, .-aapt_sim_switch
)");

namespace aapt::sim {
namespace {
constexpr size_t kGuard = 64 * 1024;  // a frame may step over a page
}

char* allocate_stack() {
  void* memory = mmap(nullptr, kStackBytes + kGuard, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuard, PROT_NONE);
  return static_cast<char*>(memory) + kGuard;
}

bool in_guard(const char* stack, const void* address) {
  const char* at = static_cast<const char*>(address);
  return stack - kGuard <= at && at < stack;
}

void* begin_fiber(char* stack, void (*main)()) {
  // The switch pops six registers and returns into `main`, whose own return address is null and
  // whose stack is aligned as after a call.
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

}  // namespace aapt::sim
