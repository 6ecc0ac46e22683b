// Fibers: a CUDA thread's own stack, and the switch between it and the scheduler.
#pragma once

#include <cstddef>

namespace aapt::sim {

constexpr size_t kStackBytes = 256 * 1024;

// A stack with memory below it that may not be touched.
char* allocate_stack();
// True for an address in that memory: the stack overflowed.
bool in_guard(const char* stack, const void* address);
// The stack pointer to switch to, which begins `main` on the stack.
void* begin_fiber(char* stack, void (*main)());

extern "C" void aapt_sim_switch(void** save_stack_pointer, void* load_stack_pointer);

}  // namespace aapt::sim
