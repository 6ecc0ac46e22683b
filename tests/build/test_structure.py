"""The house, as rules that a wrong import, a stale permission or a grown file breaks."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 600
GROUND = ["checkpoint", "clock", "cuda_driver", "device", "environment", "placement", "torchscript"]

# Who imports whom inside `aapt`, exactly: a permission that nobody uses is not in the table. Rooms
# are the folders, and the modules on the ground by their names.
MAY_IMPORT = {
    "__init__": {"model", "streaming"},
    "__main__": {"commands"},
    "model": {"checkpoint"},
    "vae": {"checkpoint"},
    "convert": {"checkpoint", "model", "vae"},
    "data": {"checkpoint", "clock", "lock", "model", "vae"},
    "streaming": {"checkpoint", "clock", "device", "model", "vae"},
    "training": {"data", "device", "model", "streaming", "torchscript", "vae"},
    "evaluate": {
        *({*GROUND, "lock"} - {"placement"}),
        *("data", "media", "model", "streaming", "vae"),
    },
    "runs": {
        *("checkpoint", "clock", "device", "lock"),
        *("data", "media", "model", "streaming", "training", "vae"),
    },
    "serve": {"checkpoint", "media", "model", "placement", "streaming"},
    "commands": {
        *("checkpoint", "clock", "cuda_driver", "device", "environment", "placement"),
        *(
            "convert",
            "data",
            "evaluate",
            "media",
            "model",
            "runs",
            "serve",
            "streaming",
            "training",
            "vae",
        ),
    },
}
IMPORT_KERNELS = {
    "aapt/commands/info.py",  # only asks which backends there are
    "aapt/model/caches.py",  # which caches there are
    "aapt/model/float8.py",
    "aapt/model/layers.py",
    "aapt/model/mmdit.py",  # only makes the cache
    "aapt/model/transformer.py",  # only hands layout and cache to its layers
    "aapt/model/wan.py",
    "aapt/vae/float8.py",
    "aapt/vae/layers.py",
    "aapt/vae/pixels.py",
}
IMPORT_FSDP = {"aapt/runs/parallel.py"}
FUSES = {  # op folders that import another one
    ("kv_append", "qk_norm_rope"),
    ("modulated_norm", "quantise_rows"),
    ("bias_gelu", "quantise_rows"),
}


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, module: str = "") -> set[str]:
    """Every module or name that a file imports, at any depth, as an absolute dotted path."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            modules |= {f"{base}.{alias.name}" for alias in node.names}
    return modules


def importers(folder: str, prefix: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in python_files(folder)
        if any((name + ".").startswith(prefix + ".") for name in imported_modules(path))
    }


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[1]


def test_the_rules_see_imports(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "import torch.nn\ndef f():\n    from aapt_kernels import KVCache\n    from ..b import c\n"
    )
    assert imported_modules(source, "a.x.module") == {
        "torch.nn",
        "aapt_kernels.KVCache",
        "a.b.c",
    }


def test_rooms_import_what_the_table_says():
    rooms = {room_of(path) for path in python_files("aapt")}
    found: dict[str, set[str]] = {}
    for path in python_files("aapt"):
        for name in imported_modules(path, module_name(path)):
            parts = name.split(".")
            if parts[0] == "aapt" and len(parts) > 1 and parts[1] in rooms - {room_of(path)}:
                found.setdefault(room_of(path), set()).add(parts[1])
    assert found == MAY_IMPORT


def test_no_circle_between_rooms():
    left = {room: set(needed) for room, needed in MAY_IMPORT.items()}
    while left:
        free = {room for room, needed in left.items() if not needed & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {room: needed for room, needed in left.items() if room not in free}


def test_kernels_are_imported_in_few_places():
    assert importers("aapt", "aapt_kernels") == IMPORT_KERNELS


def test_operators_import_no_other_operator():
    folder = ROOT / "aapt_kernels"
    operators = {path.parent.name for path in folder.glob("*/ref.py")}
    found = set()
    for path in python_files("aapt_kernels"):
        owner = path.parent.name if path.parent != folder else path.name
        for name in imported_modules(path, module_name(path)):
            used = set(name.split(".")[1:2]) & operators - {owner}
            found |= {(owner, other) for other in used}
    across = {("diffusers_wan.py", op) for op in ("block_causal_attention", "qk_norm_rope")} | FUSES
    assert len(operators) == 8
    assert found == across | {("__init__.py", operator) for operator in operators}


def test_kernels_do_not_know_the_model():
    assert importers("aapt_kernels", "aapt") == set()


def test_ops_stand_beside_each_other():
    folders = {path.parent.name for path in (ROOT / "aapt_kernels").glob("*/__init__.py")}
    found = set()
    for op in folders:
        for path in python_files(f"aapt_kernels/{op}"):
            for name in imported_modules(path, module_name(path)):
                parts = name.split(".")
                if parts[0] == "aapt_kernels" and parts[1] in folders - {op}:
                    found.add((op, parts[1]))
    assert found == FUSES


@pytest.mark.parametrize("module", ["torch.distributed.fsdp", "torch.distributed._composable"])
def test_sharding_lives_in_one_place(module):
    assert importers("aapt", module) <= IMPORT_FSDP


def test_only_commands_speak_typer():
    assert {Path(path).parts[1] for path in importers("aapt", "typer")} == {"commands"}


def test_tests_mirror_the_packages():
    rooms = {path.relative_to(ROOT / "tests/aapt") for path in (ROOT / "tests/aapt").rglob("*/")}
    rooms = {room for room in rooms if (ROOT / "tests/aapt" / room / "__init__.py").exists()}
    assert [room for room in sorted(rooms) if not (ROOT / "aapt" / room).is_dir()] == []


def test_files_stay_readable():
    files = [
        path
        for folder in ("aapt", "aapt_kernels", "csrc", "tools", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
    ]
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_no_triton_function_may_return_none():
    """Triton 3.6, which PyTorch 2.11 brings, refuses such a function inside a kernel."""
    found, functions = [], 0
    for path in python_files("aapt_kernels"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or not any(
                "triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list
            ):
                continue
            functions += 1
            parts = list(ast.walk(function))
            missing = {
                ast.unparse(part.left)
                for part in parts
                if isinstance(part, ast.Compare) and ast.unparse(part.comparators[0]) == "None"
            }
            values = [part.value for part in parts if isinstance(part, ast.Return)]
            values += [x for value in values if isinstance(value, ast.Tuple) for x in value.elts]
            returned = {value.id for value in values if isinstance(value, ast.Name)}
            found += [f"{path.name}: {function.name} returns {x}" for x in missing & returned]
    assert functions > 40
    assert found == []
