"""Load the operator library, which defines every schema of `torch.ops.aapt`, and on demand the
simulated kernels, `torch.ops.aapt_sim`."""

from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "lib"


def load() -> Path:
    """Load the one library beside this package and return its path; ImportError if it is not
    built or does not fit this PyTorch."""
    found = sorted(FOLDER.glob("libaapt_ops*"))
    if not found:
        raise ImportError(
            f"aapt_kernels: expected the operator library libaapt_ops in {FOLDER}, got nothing; "
            f"build it with `pip install .`, or `make build` in a checkout"
        )
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        raise ImportError(
            f"aapt_kernels: {found[0].name} does not load with PyTorch {torch.__version__}: {error}"
        ) from error
    return found[0]


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
