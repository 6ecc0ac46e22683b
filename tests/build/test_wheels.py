"""Wheels: a pure one that streams without compiled kernels, and checks that catch a wrong one."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cubin
import pytest
import wheels

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "aapt_kernels" / "lib" / "libaapt_sm90.so"

STREAM = """
import aapt_kernels, numpy, torch
from aapt import Control, StreamingGenerator
assert aapt_kernels.__file__.startswith({folder!r}), aapt_kernels.__file__
generator = StreamingGenerator.from_pretrained("tiny-world")
stream = generator.open(numpy.zeros((80, 128, 3), numpy.uint8), generator.sample_prompt)
print(stream.step(Control(forward=1.0)).shape)
from aapt_kernels.backend import no_sm90
torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda *_: (9, 0)
print(no_sm90())
"""


def run(*command, folder):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def source(folder):
    """The files that a release has; nothing is built in the checkout itself."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "lib", "__pycache__", "*.so", "*.egg*")
    return Path(shutil.copytree(ROOT, folder / "source", ignore=ignored))


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys, pathlib; sys.path.insert(0, 'tools'); import wheels; "
    code += f"print(wheels.build('pure', pathlib.Path({str(folder)!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


def test_the_pure_wheel_streams_without_compiled_kernels(pure, tmp_path):
    assert pure.name == "aapt-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(pure) as archive:
        archive.extractall(tmp_path)
    code = STREAM.format(folder=str(tmp_path))
    shape, reason = run(sys.executable, "-c", code, folder=tmp_path).splitlines()
    assert shape == "(4, 80, 128, 3)"
    assert reason.startswith("this install has no compiled kernels: the wheels for Linux have them")


def rewritten(wheel, folder, name, change):
    """A copy of a wheel under another name and with other files."""
    with zipfile.ZipFile(wheel) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    change(files)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for entry, data in files.items():
            archive.writestr(entry, data)
    return folder / name


def library(files):
    data = LIBRARY.read_bytes() if LIBRARY.exists() else Path(shutil.which("true")).read_bytes()
    files["aapt_kernels/lib/libaapt_sm90.so"] = data


def simulator(files):
    library(files)
    files["aapt_kernels/lib/libaapt_sim.so"] = b""


@pytest.mark.parametrize(
    ("kind", "name", "change", "words"),
    [
        ("pure", "aapt-0.1.0-py3-none-any.whl", library, "expected the libraries []"),
        ("pure", "aapt-0.1.0-py3-none-linux_x86_64.whl", dict.copy, "the tag py3-none-any"),
        (
            "pure",
            "aapt-0.1.0-py3-none-any.whl",
            lambda files: files.pop("aapt/serve/page/index.html"),
            "expected aapt/serve/page/index.html in it",
        ),
        ("x86_64", "aapt-0.1.0-py3-none-linux_x86_64.whl", library, "manylinux_2_34_x86_64 in"),
        (
            "x86_64",
            "aapt-0.1.0-py3-none-manylinux_2_34_x86_64.whl",
            simulator,
            "got ['aapt_kernels/lib/libaapt_s",
        ),
        (
            "aarch64",
            "aapt-0.1.0-py3-none-manylinux_2_34_aarch64.whl",
            library,
            "expected code for aarch64",
        ),
    ],
)
def test_a_wheel_that_is_not_of_its_kind_is_refused(pure, tmp_path, kind, name, change, words):
    wheel = rewritten(pure, tmp_path, name, change)
    with pytest.raises(wheels.WheelError) as error:
        wheels.check(wheel, kind)
    assert words in str(error.value)


@pytest.mark.skipif(not LIBRARY.exists(), reason="this build has no sm_90a kernels")
def test_the_library_of_this_build_is_one_that_a_wheel_may_carry():
    if cubin.find_cuobjdump() is None:
        pytest.skip("needs cuobjdump")
    wheels.check_library(LIBRARY, "x86_64")
