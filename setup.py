"""Packaging only: CMakeLists.txt builds the kernels, this file says where they go.

Where there is no nvcc, the wheel is pure Python and serves every platform. A checkout installed in
place also gets the simulator.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "aapt_kernels/lib/libaapt_sm90.so"
# PyTorch is needed for its headers only; pinned, so that a build environment is reproducible.
TOOLS = ["cmake>=3.26", "ninja", "torch==2.13.0"]
IN_PLACE = bool({"editable_wheel", "build_ext"} & set(sys.argv))


def finds_nvcc() -> bool:
    """Returns whether CMakeLists.txt will build the sm_90a kernels."""
    switch = os.environ.get("AAPT_CUDA", "auto").lower()
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc") or (home and (Path(home) / "bin" / "nvcc").exists())
    return switch == "on" or (switch == "auto" and sys.platform == "linux" and bool(found))


COMPILES = finds_nvcc() or (IN_PLACE and sys.platform == "linux")


class CMakeBuild(build_ext):
    """Runs CMake with Ninja. An editable install gets the library in the source tree, and the
    simulator."""

    def run(self) -> None:
        import cmake
        import ninja

        build = ROOT / "build" / os.environ.get("AAPT_BUILD", "cmake")
        prefix = ROOT if self.inplace else Path(self.build_lib)
        program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        # A fresh configuration follows the Python (and its PyTorch) of this build. Up-to-date
        # objects are kept.
        configure = [program, "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        simulator = os.environ.get("AAPT_SIM", "on") if self.inplace else "off"
        configure += [f"-DAAPT_SIM={simulator}", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        subprocess.run(configure, check=True)
        subprocess.run([program, "--build", build], check=True)
        subprocess.run([program, "--install", build, "--prefix", prefix], check=True)

    def get_outputs(self) -> list[str]:
        return [os.path.join(self.build_lib, LIBRARY)]

    def get_output_mapping(self) -> dict[str, str]:
        return {output: str(ROOT / LIBRARY) for output in self.get_outputs()}

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt"]


class PlatformWheel(bdist_wheel):
    """One wheel per platform: the library uses the LibTorch stable ABI and no Python C API."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2] if COMPILES else "any")


setup(
    ext_modules=[Extension("aapt_kernels.lib.aapt_sm90", sources=[])] if COMPILES else [],
    setup_requires=TOOLS if COMPILES else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
