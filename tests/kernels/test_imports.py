"""Operators stand beside each other: a folder imports its own files and the top of the package."""

import ast
from pathlib import Path

import aapt_kernels

ROOT = Path(aapt_kernels.__file__).parent
OPERATORS = {path.parent.name for path in ROOT.glob("*/ref.py")}
ACROSS = {("kv_append", "qk_norm_rope")}  # kv_append fuses it


def imported(path: Path) -> set[str]:
    """First name, below aapt_kernels, of every module that a file of the package imports."""
    folder = path.parent.relative_to(ROOT).parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            before = folder[: len(folder) - node.level + 1] if node.level else ()
            whole = [*before, *(node.module or "").split("."), *(a.name for a in node.names[:1])]
            names.add(next(part for part in whole if part not in ("", "aapt_kernels")))
            if not any(whole[:-1]):  # from . import a, b
                names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                (alias.name + ".").removeprefix("aapt_kernels.").split(".")[0]
                for alias in node.names
            }
    return names


def test_operators_import_no_other_operator():
    assert len(OPERATORS) == 5
    found = {
        (path.parent.name, name)
        for operator in OPERATORS
        for path in (ROOT / operator).glob("*.py")
        for name in imported(path) & OPERATORS - {operator}
    }
    assert found == ACROSS


def test_the_top_imports_no_operator():
    top = {path.name for path in ROOT.glob("*.py") if imported(path) & OPERATORS}
    assert top == {"__init__.py"}
