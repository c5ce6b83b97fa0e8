"""Hooks of MkDocs: the navigation of the site is the list of pages in docs/index.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

INDEX = "index.md"
_HEADING = re.compile(r"## (.+)")
_PAGE = re.compile(r"- \[(.+?)\]\((.+?\.md)\)")


def on_config(config: Any) -> Any:
    """Sets the navigation before MkDocs reads the pages."""
    config["nav"] = read_navigation((Path(config["docs_dir"]) / INDEX).read_text(encoding="utf-8"))
    return config


def read_navigation(text: str) -> list[Any]:
    """Returns the navigation of an index: each heading is a section of the pages below it."""
    sections: list[Any] = [INDEX]
    pages: list[dict[str, str]] = []
    for line in text.splitlines():
        if heading := _HEADING.match(line):
            pages = []
            sections.append({heading[1]: pages})
        elif page := _PAGE.match(line):
            pages.append({page[1]: page[2]})
    return sections
