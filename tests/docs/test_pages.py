"""The documents: their Python runs, and the commands that they show exist with these options."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
RUN_BY_OTHERS = {
    "docs/drop-in.md": "tests/kernels/test_drop_in.py",  # beside what the blocks replace
    "docs/data.md": "tests/docs/test_data_page.py",  # on clips and a model made for it
    "docs/poses.md": "tests/aapt/runs/test_puppet.py",  # on a small model of the recipe
    "docs/play.md": "tests/aapt/serve/test_docs.py",  # beside a server, with its packages
    "docs/packages.md": "tests/build/test_hub.py",  # beside a layout that is built
}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, languages: set[str]) -> list[str]:
    """The code blocks of a page in these languages, in order."""
    found = FENCE.findall(page.read_text())
    return [
        re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        for indent, language, code in found
        if language in languages
    ]


WITH_PYTHON = [page for page in PAGES if blocks(page, {"python"})]


@pytest.mark.parametrize("page", [p for p in WITH_PYTHON if name(p) not in RUN_BY_OTHERS], ids=name)
def test_python_runs(page, tmp_path, monkeypatch):
    """One block after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": name(page)}
    for block in blocks(page, {"python"}):
        exec(compile(block, name(page), "exec"), names)


def test_the_others_run_elsewhere():
    assert set(RUN_BY_OTHERS) <= {name(page) for page in WITH_PYTHON}
    for page, test in RUN_BY_OTHERS.items():
        assert page.rpartition("/")[2] in (ROOT / test).read_text()


def test_the_readme_links_to_files():
    text = FENCE.sub("", (ROOT / "README.md").read_text())
    links = re.findall(r"\]\(([^)\s#:]+)[)#]", text)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


COMMAND = re.compile(r"(?:\w+=\S+ )*(?:torchrun .* -m )?((?:aapt|make) [a-z].*)")


def commands(page: Path) -> list[list[str]]:
    """The words of every `aapt` and `make` that a page shows: in blocks, and between backticks."""
    text = "\n".join(blocks(page, {"", "sh"})).replace("\\\n", " ")
    lines = [part for line in text.splitlines() for part in re.split(r" && | \| | # ", line)]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
    found = (COMMAND.match(line.strip()) for line in lines)
    return [match[1].split() for match in found if match]


@cache
def usage(*command: str) -> str:
    """Return what `aapt COMMAND --help` prints."""
    words = [sys.executable, "-m", "aapt", *command, "--help"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@cache
def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def unknown(words: list[str]) -> list[str]:
    """Names and options of a command line that do not exist."""
    tool, command, *arguments = words
    if tool == "make":
        return [] if command in targets() else [command]
    if not re.search(rf"^\W*{re.escape(command)}\s", usage().partition("Commands:")[2], re.M):
        return [command]
    group = (command, arguments[0]) if command == "bench" and arguments else (command,)
    options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    return sorted(o for o in options if not re.search(rf"{o}\b", usage(*group)))


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_exist(page):
    assert [(words, wrong) for words in commands(page) if (wrong := unknown(words))] == []


def test_a_wrong_command_is_seen():
    assert unknown(["aapt", "generate", "--out", "a.mp4", "--nonsense"]) == ["--nonsense"]
    assert unknown(["aapt", "bench", "stream", "--step"]) == ["--step"]
    assert unknown(["aapt", "generat"]) == ["generat"]
    assert unknown(["make", "tests"]) == ["tests"]
    assert unknown(["aapt", "eval", "tiny-world", "--out=x"]) == []
