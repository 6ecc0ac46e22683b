"""The architecture, as rules that a wrong import or a grown file breaks."""

import ast
import re
from pathlib import Path

import pytest
import typer

from aapt.cli import app

ROOT = Path(__file__).parents[2]
MAX_LINES = 600

# Ops run in the layers, the decoder and the stream. The model only hands their layout and cache
# down to its layers, and the command line only asks which backends there are.
MAY_IMPORT_KERNELS = {
    "aapt/layers.py",
    "aapt/vae/layers.py",
    "aapt/generator.py",
    "aapt/model.py",
    "aapt/cli.py",
}
MAY_IMPORT_FSDP = {"aapt/parallel.py"}


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Every absolute module that a file imports, at any depth of it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def importers(folder: str, prefix: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in python_files(folder)
        if any((name + ".").startswith(prefix + ".") for name in imported_modules(path))
    }


def test_the_rules_see_imports(tmp_path):
    source = tmp_path / "module.py"
    source.write_text("import torch.nn\ndef f():\n    from aapt_kernels import KVCache\n")
    assert imported_modules(source) == {"torch.nn", "aapt_kernels.KVCache"}


def test_kernels_are_imported_in_few_places():
    found = importers("aapt", "aapt_kernels")
    assert "aapt/layers.py" in found
    assert found <= MAY_IMPORT_KERNELS


def test_kernels_do_not_know_the_model():
    assert importers("aapt_kernels", "aapt") == set()


@pytest.mark.parametrize("module", ["torch.distributed.fsdp", "torch.distributed._composable"])
def test_sharding_lives_in_one_place(module):
    assert importers("aapt", module) <= MAY_IMPORT_FSDP


def test_files_stay_readable():
    files = [
        path
        for folder in ("aapt", "aapt_kernels", "csrc", "tools", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
    ]
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documented_commands_exist(document):
    text = (ROOT / document).read_text()
    commands = re.findall(r"(?:^|`)(make|aapt) ([a-z-]+)", text, re.MULTILINE)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    group = typer.main.get_command(app)
    known = {"make": targets, "aapt": list(group.commands)}
    assert commands
    assert [f"{tool} {name}" for tool, name in commands if name not in known[tool]] == []
