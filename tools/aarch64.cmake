# Cross-compiles for aarch64 on x86-64 (Debian's g++-aarch64-linux-gnu). AAPT_AARCH64 is a folder with
# libcudart_static.a for aarch64, CUDA's headers, of which nvcc looks for a copy for each machine, and
# stubs of PyTorch's libraries (tools/wheels.py makes it).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
# The linker skips archives of another machine and takes the first one that fits.
set(CMAKE_CUDA_FLAGS_INIT "-L$ENV{AAPT_AARCH64} -I$ENV{AAPT_AARCH64}/include")
set(CMAKE_CXX_FLAGS_INIT "-isystem $ENV{AAPT_AARCH64}/include")
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-L$ENV{AAPT_AARCH64}")
set(CMAKE_MODULE_LINKER_FLAGS_INIT "-L$ENV{AAPT_AARCH64}")
