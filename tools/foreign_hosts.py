"""Fails where a page of a built site would load anything from another host.

    python tools/foreign_hosts.py build/site

Links that a reader may follow are left alone. Exit status: 0 none, 1 with a line for each.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

# Elements that load what they name as the page is shown; a link does by what it is for.
LOADS = {"script", "img", "iframe", "source", "video", "audio", "embed", "track", "input"}
RELATIONS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest"}
RELATIONS |= {"modulepreload"}
ADDRESSES = {"src", "srcset", "href", "data", "poster"}
FOREIGN = re.compile(r"\s*(https?:)?//")
IN_STYLE = re.compile(r"(?:url\(|@import)\s*['\"]?\s*((?:https?:)?//[^'\")\s;]+)")
ON_DEMAND = {"mermaid": "class mermaid"}  # the theme fetches a library for such an element


class Loads(HTMLParser):
    """Collects the foreign addresses that a page loads."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self._style = False

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        relations = set(given.get("rel", "").split())
        self._style = tag == "style"
        if tag in LOADS or tag == "object" or (tag == "link" and relations & RELATIONS):
            self.found += [given[a] for a in ADDRESSES & set(given) if FOREIGN.match(given[a])]
        self.found += IN_STYLE.findall(given.get("style", ""))
        for name in set(given.get("class", "").split()) & set(ON_DEMAND):
            self.found.append(ON_DEMAND[name])

    def handle_data(self, data):
        if self._style:
            self.found += IN_STYLE.findall(data)


def foreign(path: Path) -> list[str]:
    """The foreign addresses that a file of HTML or CSS loads, in order."""
    text = path.read_text()
    if path.suffix == ".css":
        return IN_STYLE.findall(text)
    loads = Loads()
    loads.feed(text)
    return loads.found


def main(site: Path) -> int:
    files = [path for path in sorted(site.rglob("*")) if path.suffix in {".html", ".css"}]
    if not any(path.suffix == ".html" for path in files):
        print(f"site: expected a folder with HTML, got {site}", file=sys.stderr)
        return 1
    found = [(path, address) for path in files for address in foreign(path)]
    for path, address in found:
        print(f"{path}: expected nothing from another host, got {address}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
