"""Write the package `aapt_kernels` in the layout of Hugging Face's `kernels` library.

    python tools/hub.py                      # build/hub, variants cpu and cuda (Triton)
    python tools/hub.py x86_64 aarch64       # and those of the sm_90a kernels, compiled for it

Every variant is the same package under a namespace of its own, so that it can be loaded beside an
installed one. Load it with `kernels.get_local_kernel(Path("build/hub"))`.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import wheels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "aapt_kernels"
HUB = ROOT / "build" / "hub"
LIBRARY = "lib/libaapt_sm90.so"
STABLE_ABI, CUDA = "211", "130"  # of the compiled library: PyTorch 2.11, CUDA 13.0
NOT_SHIPPED = ("lib", "__pycache__", "_sim*")
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
NAMESPACE = f"aapt_hub_{VERSION.replace('.', '_')}"


def write_hub(hub: Path, machines: list[str]) -> list[Path]:
    """Writes all variants and returns their folders; the kernels are compiled for `machines`."""
    shutil.rmtree(hub, ignore_errors=True)
    made = [write_variant(hub, f"torch-{name}", {"type": name}) for name in ("cpu", "cuda")]
    for machine in machines:
        name = f"torch-stable-abi{STABLE_ABI}-cu{CUDA}-{machine}-linux"
        folder = write_variant(hub, name, {"type": "cuda", "archs": ["9.0a"]})
        with tempfile.TemporaryDirectory(prefix="aapt-hub-") as dist:
            with zipfile.ZipFile(wheels.build(machine, Path(dist), NAMESPACE)) as wheel:
                wheel.extract(f"aapt_kernels/{LIBRARY}", dist)
            (folder / LIBRARY).parent.mkdir()
            shutil.move(Path(dist) / "aapt_kernels" / LIBRARY, folder / LIBRARY)
        made.append(folder)
    return made


def write_variant(hub: Path, name: str, backend: dict) -> Path:
    """Writes one variant and returns its folder."""
    folder = hub / "build" / name
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    schemas = folder / "schemas.py"
    before = schemas.read_text()
    after = before.replace('NAMESPACE = "aapt"', f'NAMESPACE = "{NAMESPACE}"')
    if after.count(NAMESPACE) != 1:
        raise ValueError(f"{schemas}: expected one line NAMESPACE")
    schemas.write_text(after)
    facts = {
        "id": f"{NAMESPACE}_{name.replace('-', '_')}",
        "name": "aapt-kernels",
        "version": max(1, int(VERSION.split(".")[0])),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
    }
    (folder / "metadata.json").write_text(json.dumps(facts, indent=2) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("machines", nargs="*", choices=(*wheels.MACHINES, []))
    try:
        for folder in write_hub(HUB, parser.parse_args().machines):
            print(folder.relative_to(ROOT))
    except wheels.WheelError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
