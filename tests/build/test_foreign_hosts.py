"""The check of the built documentation site, on small pages."""

import pytest
from foreign_hosts import foreign, main

CLEAN = """<link rel="stylesheet" href="assets/site.css"><link rel="canonical" href="https://a.b/">
<a href="https://arxiv.org/abs/2506.09350">paper</a><script src="assets/bundle.js"></script>
<style>.a{background:url(data:image/svg+xml;base64,AA)}</style><svg xmlns="http://www.w3.org/2000/svg">
<code>url(https://not.loaded/)</code></svg>"""


@pytest.fixture
def site(tmp_path):
    (tmp_path / "proof").mkdir()
    (tmp_path / "index.html").write_text(CLEAN)
    (tmp_path / "proof" / "page.html").write_text(CLEAN)
    (tmp_path / "site.css").write_text(".a { color: red }")
    return tmp_path


def test_links_that_a_reader_follows_are_left_alone(site, capsys):
    assert main(site) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("element", "address"),
    [
        ('<script src="https://cdn.net/a.js"></script>', "https://cdn.net/a.js"),
        ('<script src="//cdn.net/a.js"></script>', "//cdn.net/a.js"),
        ('<link rel="preload stylesheet" href="http://f.com/a.css">', "http://f.com/a.css"),
        ('<link rel=preconnect href="https://fonts.gstatic.com">', "https://fonts.gstatic.com"),
        ('<img src="https://badge.io/a.svg"/>', "https://badge.io/a.svg"),
        ('<video poster="https://a.com/b.jpg"></video>', "https://a.com/b.jpg"),
        ('<object data="https://a.com/b"></object>', "https://a.com/b"),
        ("<style>@import 'https://f.com/a.css';</style>", "https://f.com/a.css"),
        ('<p style="background: url(https://a.com/b.png)">', "https://a.com/b.png"),
        ('<pre class="mermaid"><code>graph</code></pre>', "class mermaid"),
    ],
)
def test_what_a_page_loads_is_named(site, capsys, element, address):
    page = site / "proof" / "page.html"
    page.write_text(CLEAN + element)
    assert main(site) == 1
    said = capsys.readouterr().err
    assert said == f"{page}: expected nothing from another host, got {address}\n"


def test_a_style_sheet_that_loads_a_font_is_named(site):
    (site / "site.css").write_text("@font-face { src: url('https://f.com/a.woff2') }")
    assert foreign(site / "site.css") == ["https://f.com/a.woff2"]
    assert main(site) == 1


def test_a_folder_without_pages_is_an_error(tmp_path, capsys):
    assert main(tmp_path) == 1
    assert "site: expected a folder with HTML, got" in capsys.readouterr().err
