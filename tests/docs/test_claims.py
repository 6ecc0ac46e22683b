"""Every claim of README has a row on the page of claims, and every row its claim."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADS = ("How it works", "Results", "Speed")  # README's sections of claims


def rows(text: str) -> list[str]:
    """The first cells of the tables' lines, without heads and rules."""
    tables = re.findall(r"^\|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [line.split("|")[1].strip() for table in tables for line in table.splitlines()]


def sections() -> tuple[str, str, str]:
    """README, and the paper's and README's parts of the page."""
    page = (ROOT / "docs" / "proof" / "claims.md").read_text()
    paper, readme = page.split("## The paper")[1].split("## README")
    return (ROOT / "README.md").read_text(), paper, readme.split("\n## ")[0]


def test_every_claim_of_readme_has_a_row():
    readme, _, claimed = sections()
    known = rows(claimed)
    parts = {title: readme.split(f"\n## {title}\n")[1].split("\n## ")[0] for title in HEADS}
    wanted = re.findall(r"^- \*\*(.+?)\*\*", parts["How it works"], re.MULTILINE)
    wanted += rows(parts["Results"]) + rows(parts["Speed"])
    assert len(wanted) > 12
    assert [claim for claim in wanted if claim not in known] == []


def test_every_row_quotes_readme():
    readme, _, claimed = sections()
    words = " ".join(readme.replace("*", "").split())
    assert [row for row in rows(claimed) if row not in words] == []


def test_every_page_of_evidence_is_linked_from_a_row():
    """A row that names an experiment instead of its page has no evidence."""
    page = (ROOT / "docs" / "proof" / "claims.md").read_text()
    linked = set(re.findall(r"\]\(([a-z-]+)\.md\)", page))
    pages = {path.stem for path in (ROOT / "docs" / "proof").glob("*.md")}
    assert pages - linked == {"claims", "index"}
