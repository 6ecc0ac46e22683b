// Faults of the processor while a kernel runs (a wild pointer, a division by zero, a stack too
// deep) become reports.
#pragma once

#include <csetjmp>

namespace aapt::sim {

extern sigjmp_buf launch_exit;  // a failure in the scheduler jumps here

[[noreturn]] void leave_launch();

class FaultHandlers {
 public:
  FaultHandlers();
  ~FaultHandlers();
  FaultHandlers(const FaultHandlers&) = delete;
  FaultHandlers& operator=(const FaultHandlers&) = delete;
};

}  // namespace aapt::sim
