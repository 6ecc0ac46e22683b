"""The package in the layout of the `kernels` library: loaded beside the installed one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hub
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "packages.md"
# After the page's block, which loads the variant as `aapt_kernels`
COMPARE = """
hub = aapt_kernels
import torch, aapt_kernels

assert hub is not aapt_kernels and hub.FrameLayout is not aapt_kernels.FrameLayout
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 3 + 5 * 4, 2, 16).unbind()
layout = dict(text_tokens=3, tokens_per_frame=4, frames=5, window_frames=2)
outs = [
    package.block_causal_attention(q, k, v, package.FrameLayout(**layout))
    for package in (hub, aapt_kernels)
]
assert torch.equal(*outs)
with hub.use_backend("reference"):
    reference = hub.block_causal_attention(q, k, v, hub.FrameLayout(**layout))
assert (reference - outs[0]).abs().max() < 1e-5
print(torch.ops.aapt_hub_0_1_0.block_causal_attention)
"""


def test_the_variant_for_cpus_is_loaded_by_kernels_and_runs(tmp_path):
    pytest.importorskip("kernels", reason="needs the package kernels")
    (load,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    hub.write_hub(tmp_path / "build" / "hub", [])
    done = subprocess.run(
        [sys.executable, "-c", load + COMPARE], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "aapt_hub_0_1_0.block_causal_attention" in done.stdout


def test_every_triton_kernel_of_a_variant_is_imported(tmp_path):
    """A module that is not shipped would be missed at the first launch alone."""
    pytest.importorskip("triton")
    _, folder = hub.write_hub(tmp_path / "hub", [])
    (folder.parent / "variant").symlink_to(folder, target_is_directory=True)
    modules = sorted(path.parent.name for path in folder.glob("*/triton_kernels.py"))
    assert len(modules) >= 7
    program = "".join(f"import variant.{module}.triton_kernels\n" for module in modules)
    environment = os.environ | {"PYTHONPATH": str(folder.parent), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_variants_have_their_own_namespace_and_nothing_of_a_checkout(tmp_path):
    folders = hub.write_hub(tmp_path / "hub", [])
    assert [folder.name for folder in folders] == ["torch-cpu", "torch-cuda"]
    facts = [json.loads((folder / "metadata.json").read_text()) for folder in folders]
    assert len({fact["id"] for fact in facts}) == 2
    assert [fact["backend"]["type"] for fact in facts] == ["cpu", "cuda"]
    files = [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".so", ".pyc")]
    text = (folders[0] / "schemas.py").read_text()
    assert f'NAMESPACE = "{hub.NAMESPACE}"' in text and 'NAMESPACE = "aapt"' not in text
    for path in Path(folders[0]).rglob("*.py"):
        assert "from aapt_kernels" not in path.read_text().split('"""', 2)[-1], path
