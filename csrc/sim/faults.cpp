#include "sim/faults.h"

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>

#include "sim/fibers.h"
#include "sim/state.h"

namespace aapt::sim {

sigjmp_buf launch_exit;

namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr int kSignalCount = 4;

struct sigaction previous[kSignalCount];
stack_t previous_stack;
// A fault on a fiber whose stack is full needs another one.
alignas(64) char signal_stack[64 * 1024];
__thread bool launching;

void on_fault(int signal, siginfo_t* info, void* context) {
  if (!launching) {
    // The fault is another thread's: passes it on to the previous handler.
    for (int i = 0; i < kSignalCount; ++i) {
      if (kSignals[i] != signal) continue;
      if (previous[i].sa_flags & SA_SIGINFO) {
        previous[i].sa_sigaction(signal, info, context);
      } else if (previous[i].sa_handler == SIG_DFL || previous[i].sa_handler == SIG_IGN) {
        sigaction(signal, &previous[i], nullptr);  // the fault recurs, and ends the process
      } else {
        previous[i].sa_handler(signal);
      }
    }
    return;
  }
  // The fault is in the kernel itself, or in a function that it has called.
  const auto* machine = &static_cast<ucontext_t*>(context)->uc_mcontext;
  const auto* instruction = reinterpret_cast<const char*>(machine->gregs[REG_RIP]);
  const Site called = current == nullptr ? 0 : current->site;
  const Site site = in_kernel ? site_of_instruction(instruction + 1) : called;
  if (current != nullptr && in_guard(current->stack, info->si_addr)) {
    fail(site, "stack overflow: more than %zu KiB of local variables", kStackBytes >> 10);
  }
  if (signal == SIGFPE) fail(site, "division by zero");
  fail(site, "invalid memory access at address %p (signal %d)", info->si_addr, signal);
}

}  // namespace

FaultHandlers::FaultHandlers() {
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &previous_stack);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  // A report leaves the handler without returning from it, so the signal must stay unblocked.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &action, &previous[i]);
  launching = true;
}

FaultHandlers::~FaultHandlers() {
  launching = false;
  for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace aapt::sim
