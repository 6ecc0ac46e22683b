"""Load the compiled kernels, `torch.ops.aapt_sm90`, and on demand the simulated ones,
`torch.ops.aapt_sim`."""

from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "lib"


@cache
def load() -> str | None:
    """Load the library beside this package; return why there are no compiled kernels, None if they
    are loaded. Every op runs without them, on PyTorch's own kernels or Triton's."""
    found = sorted(FOLDER.glob("libaapt_sm90*"))
    if not found:
        return (
            "this install has no compiled kernels: the wheels for Linux have them, and "
            "`pip install .` builds them where nvcc is"
        )
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{found[0].name} does not load with PyTorch {torch.__version__}: {error}"
    return None


@cache
def no_simulator() -> str | None:
    """Load the simulated kernels; return why there are none, None if they are loaded."""
    path = FOLDER / "libaapt_sim.so"
    if not path.exists():
        return "this build has no simulator: `make build` in a checkout makes it, wheels go without"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load with PyTorch {torch.__version__}: {error}"
    return None
