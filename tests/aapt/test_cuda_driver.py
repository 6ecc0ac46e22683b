"""Facts of the CUDA driver, with a stand-in for the driver and the names of the real package."""

import inspect
import re
import sys
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from aapt.cuda_driver import DriverError, device_facts, driver_version, graph_nodes, write_dot

ATTRIBUTES = {
    "L2_CACHE_SIZE": 50 << 20,
    "MAX_PERSISTING_L2_CACHE_SIZE": 32 << 20,
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448,
    "ECC_ENABLED": 1,
    "CLOCK_RATE": 1_980_000,  # kHz
    "MEMORY_CLOCK_RATE": 2_619_000,
    "GLOBAL_MEMORY_BUS_WIDTH": 5120,  # bits
}
NODES = ["KERNEL", "KERNEL", "MEMCPY", "KERNEL", "MEMSET"]


def stand_in():
    """Make a driver with one H100 and a graph of five nodes, as cuda-python would show it."""
    driver = ModuleType("cuda.bindings.driver")
    driver.CUresult = IntEnum("CUresult", {"CUDA_SUCCESS": 0, "CUDA_ERROR_INVALID_DEVICE": 101})
    names = [f"CU_DEVICE_ATTRIBUTE_{name}" for name in ATTRIBUTES]
    driver.CUdevice_attribute = IntEnum("CUdevice_attribute", names)
    kinds = ["KERNEL", "MEMCPY", "MEMSET"]
    driver.CUgraphNodeType = IntEnum("CUgraphNodeType", [f"CU_GRAPH_NODE_TYPE_{k}" for k in kinds])
    flags = {"CU_GRAPH_DEBUG_DOT_FLAGS_KERNEL_NODE_PARAMS": 4}
    driver.CUgraphDebugDot_flags = IntEnum("CUgraphDebugDot_flags", flags)
    driver.CUgraph = lambda number: SimpleNamespace(number=number)
    good, bad = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_INVALID_DEVICE

    def cuGraphGetNodes(hGraph, numNodes=0):
        assert hGraph.number == 1234
        return good, (list(range(len(NODES))) if numNodes else None), len(NODES)

    def cuGraphNodeGetType(hNode):
        return good, driver.CUgraphNodeType[f"CU_GRAPH_NODE_TYPE_{NODES[hNode]}"]

    def cuDeviceGetAttribute(attrib, dev):
        return good, ATTRIBUTES[attrib.name.removeprefix("CU_DEVICE_ATTRIBUTE_")]

    def cuGraphDebugDotPrint(hGraph, path, flags):
        Path(path.decode()).write_text(f"digraph {hGraph.number} {flags}")
        return (good,)

    driver.cuInit = lambda Flags: (good,)
    driver.cuDriverGetVersion = lambda: (good, 13010)
    driver.cuDeviceGet = lambda ordinal: (good, ordinal) if ordinal == 0 else (bad, None)
    driver.cuDeviceGetPCIBusId = lambda length, dev: (good, b"0000:1b:00.0".ljust(length, b"\0"))
    driver.cuDeviceGetAttribute = cuDeviceGetAttribute
    driver.cuGraphGetNodes, driver.cuGraphNodeGetType = cuGraphGetNodes, cuGraphNodeGetType
    driver.cuGraphDebugDotPrint = cuGraphDebugDotPrint
    return driver


@pytest.fixture
def driver(monkeypatch):
    made = stand_in()
    package, parts = ModuleType("cuda"), ModuleType("cuda.bindings")
    package.bindings, parts.driver = parts, made
    for module in (package, parts, made):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def test_a_device_has_the_facts_of_its_data_sheet(driver):
    assert driver_version() == "13.1"
    assert device_facts(0) == {
        "bus": "0000:1b:00.0",
        "l2_bytes": 50 << 20,
        "persisting_l2_bytes": 32 << 20,
        "shared_bytes": 232448,
        "ecc": True,
        "clock_mhz": 1980,
        "bytes_per_second": 3_352_320_000_000,  # an H100 SXM: 3.35 TB/s
    }


def test_nodes_of_a_graph_are_counted_by_kind(driver, tmp_path, monkeypatch):
    assert graph_nodes(1234) == {"kernel": 3, "memcpy": 1, "memset": 1}
    write_dot(1234, tmp_path / "step.dot")
    assert (tmp_path / "step.dot").read_text() == "digraph 1234 4"
    monkeypatch.setattr(sys.modules[__name__], "NODES", [])
    assert graph_nodes(1234) == {}


def test_a_call_that_fails_is_named(driver):
    with pytest.raises(DriverError, match="^cuDeviceGet: CUDA_ERROR_INVALID_DEVICE$"):
        device_facts(1)
    driver.cuInit = lambda Flags: (driver.CUresult.CUDA_ERROR_INVALID_DEVICE,)
    with pytest.raises(DriverError, match="^driver: cuInit: CUDA_ERROR_INVALID_DEVICE$"):
        driver_version()


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DriverError, match=r"^cuda-python: expected the package, .*'aapt\[cuda\]'$"):
        driver_version()


def test_the_package_has_what_is_called():
    """The stand-in proves nothing unless its names and arguments are those of cuda-python."""
    real = pytest.importorskip("cuda.bindings.driver", reason="needs the extra cuda")
    fake = stand_in()
    for name in (name for name in vars(fake) if name.startswith("cu")):
        signature = getattr(real, name).__doc__.splitlines()[0]  # name(type argument=default, ...)
        given = signature.partition("(")[2].rpartition(")")[0].split(",")
        theirs = [re.split("[:=]", part)[0].split()[-1].lstrip("*") for part in given if part]
        assert theirs == list(inspect.signature(getattr(fake, name)).parameters), name
    for enum in ("CUresult", "CUdevice_attribute", "CUgraphNodeType", "CUgraphDebugDot_flags"):
        for member in getattr(fake, enum):
            assert hasattr(getattr(real, enum), member.name)
    assert real.CUgraphDebugDot_flags.CU_GRAPH_DEBUG_DOT_FLAGS_KERNEL_NODE_PARAMS == 4
    assert int(real.CUgraph(1234)) == 1234
