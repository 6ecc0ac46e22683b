"""Shows the `>>>` lines of docstrings as code on the documentation site: an extension of griffe,
named in mkdocs.yml."""

import re

from griffe import Extension, Object

LINES = re.compile(r"(?:^(?:>>>|\.\.\.) .*(?:\n|\Z))+", re.MULTILINE)


def as_block(match: re.Match) -> str:
    code = re.sub(r"^.{4}", "", match[0].rstrip("\n"), flags=re.MULTILINE)
    return f"```python\n{code}\n```\n"


class CodeBlocks(Extension):
    """Turns runs of `>>>` lines into fenced code, without the prompts."""

    def on_object(self, *, obj: Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = LINES.sub(as_block, obj.docstring.value)
