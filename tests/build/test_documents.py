"""The documents: citations that can be opened, files that exist, drawings that are up to date."""

import re
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("aapt", "aapt_kernels", "csrc", "tests", "benchmarks", "tools", "docs", "examples")
WRITTEN = {".py", ".md", ".cpp", ".h", ".cu", ".cuh", ".txt", ".toml"}
# A citation, with the further sections that may follow it: "docs/method.md#6, #7 and #8"
CITATION = re.compile(r"method\.md((?:(?:,| and|, and| or| to)?\s*#[\w-]+)+)")
FOREIGN = re.compile(r"\bSPE[C]\b")  # the name of a reference outside the repository


def written_files() -> list[Path]:
    """Every source file and document of the repository."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return sorted(p for p in [*ROOT.iterdir(), *inside] if p.is_file() and p.suffix in WRITTEN)


def cited_sections(text: str) -> list[str]:
    """Sections of docs/method.md that a text cites, in order."""
    return [
        section
        for sections in CITATION.findall(text)
        for section in re.findall(r"#([\w-]+)", sections)
    ]


def places(pattern: re.Pattern) -> list[str]:
    """Lines of the repository that a pattern is found in, as `file:line`."""
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in written_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def method_sections() -> dict[str, str]:
    """Headings of docs/method.md by their anchor."""
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    return dict(re.findall(r'^<a id="(\d+)"></a>\n\n## (.+)$', text, re.MULTILINE))


@pytest.fixture
def draw():
    spec = util.spec_from_file_location("draw", ROOT / "docs/draw.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_citations_are_found():
    text = "as docs/method.md#3, and `docs/method.md#6, #7 and #8`; [8](method.md#8) #9"
    assert cited_sections(text) == ["3", "6", "7", "8", "8"]


def test_every_heading_of_the_method_has_its_number_as_anchor():
    sections = method_sections()
    assert list(sections) == [str(number) for number in range(1, 19)]
    assert [
        anchor for anchor, title in sections.items() if not title.startswith(anchor + ". ")
    ] == []
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^## ", text, re.MULTILINE)) == len(sections)


def test_every_cited_section_exists():
    sections = method_sections()
    missing = {
        f"{path.relative_to(ROOT)}: #{section}"
        for path in written_files()
        if path != Path(__file__)
        for section in cited_sections(path.read_text(encoding="utf-8"))
        if section not in sections
    }
    assert missing == set()


def test_nothing_cites_a_reference_outside_the_repository():
    assert places(FOREIGN) == []


def test_files_named_in_the_method_exist():
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:aapt|aapt_kernels|benchmarks|csrc|docs|tests)/[\w./-]+)`", text)
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.stem)
def test_links_between_documents_lead_to_files(document):
    prose = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)", prose)
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (document.parent / link).exists()] == []


def test_drawings_are_what_the_script_writes(draw):
    folder = ROOT / "docs"
    assert {path.name for path in folder.glob("*.svg")} == set(draw.DRAWINGS)
    for name, make in draw.DRAWINGS.items():
        assert (folder / name).read_text(encoding="utf-8") == make(), f"{name}: run docs/draw.py"
