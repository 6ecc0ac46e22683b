"""Packaging only: CMakeLists.txt builds the operator library, this file says where it goes."""

import os
import subprocess
import sys
from pathlib import Path

import cmake
import ninja
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "aapt_kernels/lib/libaapt_ops.so"


class CMakeBuild(build_ext):
    """Runs CMake with Ninja. An editable install gets the library in the source tree, and the
    simulator."""

    def run(self) -> None:
        build = ROOT / "build" / "cmake"
        prefix = ROOT if self.inplace else Path(self.build_lib)
        program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        # A fresh configuration follows the Python (and its PyTorch) of this build. Up-to-date
        # objects are kept.
        configure = [program, "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        simulator = os.environ.get("AAPT_SIM", "on") if self.inplace else "off"
        configure += [f"-DAAPT_SIM={simulator}"]
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
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("aapt_kernels.lib.aapt_ops", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
