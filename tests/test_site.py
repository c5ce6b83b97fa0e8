"""The documentation as a site: every page is in the navigation, and built as code hosts show it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from markdown_it import MarkdownIt

from tools.site_hooks import read_navigation

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TAGS = ("h1", "h2", "h3", "ul", "ol", "li", "pre", "tr", "img")
LINE_NUMBERS = re.compile(r'<td class="linenos">.*?</td>', re.DOTALL)


def count_tags(html: str) -> dict[str, int]:
    return {tag: len(re.findall(rf"<{tag}[ >]", html)) for tag in TAGS}


def test_the_navigation_has_the_sections_and_pages_of_the_index():
    index, *sections = read_navigation((DOCS / "index.md").read_text())
    assert index == "index.md"
    titles = [next(iter(section)) for section in sections]
    assert titles == ["Start", "How to", "Reference", "Explained", "Measured"]
    pages = [page for section in sections for pages in section.values() for page in pages]
    paths = {path for page in pages for path in page.values()}
    found = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert paths | {"index.md"} == found


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    # A reader of CommonMark, as code hosts are, ends lists and code at other places.
    parser = MarkdownIt("commonmark").enable("table")
    for page in DOCS.rglob("*.md"):
        html = (tmp_path / page.relative_to(DOCS)).with_suffix(".html").read_text()
        assert not re.findall(r'(?:src|href)="https?://[^"]*\.(?:css|js|woff2?)"', html), page
        article = LINE_NUMBERS.sub("", html[html.index("<article") : html.index("</article>")])
        assert count_tags(article) == count_tags(parser.render(page.read_text())), page
    assert (tmp_path / "images" / "quickstart_before_after.png").is_file()
