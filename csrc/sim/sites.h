// Places in kernels, small enough to keep one with every access.
#pragma once

#include <cstdint>
#include <string>

#include "hopper/hopper.cuh"

namespace aapt::sim {

// A file and line, or, with the highest bit, the offset of an instruction in its library.
using Site = uint32_t;

Site site_of(Where where);
Site site_of_instruction(const void* instruction);

// "kernel.cuh:12"
std::string describe(Site site);

// Notes the library of a kernel, to find its instructions and the constants it may read.
void enter_library(const void* function);
bool in_library(const void* pointer, size_t bytes);

}  // namespace aapt::sim
