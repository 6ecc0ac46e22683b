"""Facts that the CUDA driver knows and PyTorch does not tell, through cuda-python (`aapt[cuda]`).

A graph is the number that `torch.cuda.CUDAGraph.raw_cuda_graph` returns.
"""

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

MISSING = "cuda-python: expected the package, got none; pip install 'aapt[cuda]'"


class DriverError(ValueError):
    """Says what is missing, or which call of the driver failed and why."""


def bindings() -> ModuleType:
    """Return cuda-python's driver calls; DriverError if the package or the driver is missing."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise DriverError(MISSING) from None
    try:
        _values(driver, driver.cuInit(0), "cuInit")
    except (RuntimeError, DriverError) as error:  # no driver to load, or one that refuses
        raise DriverError(f"driver: {error}") from None
    return driver


def _values(driver: ModuleType, returned: tuple, name: str) -> Any:
    """Return what a call gives beside its status; DriverError if the status is an error."""
    status, *values = returned
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(f"{name}: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def driver_version() -> str:
    """Return the newest version of CUDA that the driver supports, such as 13.0."""
    driver = bindings()
    version = _values(driver, driver.cuDriverGetVersion(), "cuDriverGetVersion")
    return f"{version // 1000}.{version % 1000 // 10}"


def device_facts(index: int) -> dict[str, Any]:
    """Return facts of a CUDA device: bus, bytes of L2 cache and of its part that may persist, bytes
    of shared memory per block, whether memory has ECC, clock in MHz, and memory bandwidth in bytes
    per second."""
    driver = bindings()
    device = _values(driver, driver.cuDeviceGet(index), "cuDeviceGet")

    def attribute(name: str) -> int:
        kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return _values(driver, driver.cuDeviceGetAttribute(kind, device), "cuDeviceGetAttribute")

    bus = _values(driver, driver.cuDeviceGetPCIBusId(32, device), "cuDeviceGetPCIBusId")
    transfers = 2 * 1000 * attribute("MEMORY_CLOCK_RATE")  # per second and line: two per cycle
    return {
        "bus": bus.rstrip(b"\0").decode(),
        "l2_bytes": attribute("L2_CACHE_SIZE"),
        "persisting_l2_bytes": attribute("MAX_PERSISTING_L2_CACHE_SIZE"),
        "shared_bytes": attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        "ecc": bool(attribute("ECC_ENABLED")),
        "clock_mhz": attribute("CLOCK_RATE") // 1000,
        "bytes_per_second": transfers * attribute("GLOBAL_MEMORY_BUS_WIDTH") // 8,
    }


def graph_nodes(graph: int) -> dict[str, int]:
    """Return the number of nodes of a captured graph by their kind: kernel, memcpy, memset, ..."""
    driver = bindings()
    handle = driver.CUgraph(graph)
    # The first call counts, the second lists
    _, count = _values(driver, driver.cuGraphGetNodes(handle), "cuGraphGetNodes")
    if not count:
        return {}
    nodes, _ = _values(driver, driver.cuGraphGetNodes(handle, count), "cuGraphGetNodes")
    kinds = Counter()
    for node in nodes[:count]:
        kind = _values(driver, driver.cuGraphNodeGetType(node), "cuGraphNodeGetType")
        kinds[kind.name.removeprefix("CU_GRAPH_NODE_TYPE_").lower()] += 1
    return dict(kinds.most_common())


def write_dot(graph: int, path: Path) -> None:
    """Write a captured graph as a DOT file, with the names and grids of its kernels."""
    driver = bindings()
    flags = driver.CUgraphDebugDot_flags.CU_GRAPH_DEBUG_DOT_FLAGS_KERNEL_NODE_PARAMS
    returned = driver.cuGraphDebugDotPrint(driver.CUgraph(graph), str(path).encode(), int(flags))
    _values(driver, returned, "cuGraphDebugDotPrint")
