"""Gives the documentation site the pages that are written elsewhere in the repository: a hook of
MkDocs, named in mkdocs.yml.

Links between documents are written as the repository needs them (`docs/data.md` in CONTRIBUTING.md,
`../CONTRIBUTING.md` in docs/data.md); here they become links between pages.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {  # page -> document
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "log.md": "benchmarks/LOG.md",
    "gpu-backlog.md": "benchmarks/GPU_BACKLOG.md",
}
EXAMPLES = "examples.md"
LINK = re.compile(r"(\]\()([^)\s#:]+)(?=[)#\s])")  # without a scheme


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents, and a page with every script of `examples/`."""
    for page, document in PAGES.items():
        text = (ROOT / document).read_text()
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, EXAMPLES, content=examples()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    uri = page.file.src_uri
    document = PAGES.get(uri, f"docs/{uri}")
    pages = {document: page for page, document in PAGES.items()}
    pages |= {f"examples/{path.name}": f"{EXAMPLES}#examples{path.stem}py" for path in scripts()}

    def target(match: re.Match) -> str:
        start, link = match.groups()
        file = posixpath.normpath(posixpath.join(posixpath.dirname(document), link))
        found = pages.get(file, file.removeprefix("docs/"))
        return start + posixpath.relpath(found, posixpath.dirname(uri) or ".")

    return LINK.sub(target, markdown)


def scripts() -> list[Path]:
    return sorted((ROOT / "examples").glob("*.py"))


def examples() -> str:
    """A page of the scripts: a heading, what the docstring says, the code after it."""
    parts = ["# Examples\n\nThe tests run each of these scripts.\n"]
    for path in scripts():
        source = path.read_text()
        module = ast.parse(source)
        text = ast.get_docstring(module)
        code = "\n".join(source.splitlines()[module.body[0].end_lineno :]).strip()
        parts.append(f"## examples/{path.name}\n\n{text}\n\n```python\n{code}\n```\n")
    return "\n".join(parts)
