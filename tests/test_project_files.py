"""The files around the code: citation, changelog, and what continuous integration runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from corl_jax.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_names_the_software_and_its_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]
    (paper,) = citation["references"]
    cited = re.search(r"@article\{.*?\n\}", (ROOT / "README.md").read_text(), re.DOTALL).group()
    assert paper["title"] in cited and paper["journal"] in cited and str(paper["year"]) in cited
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(names) in cited


def test_the_changelog_names_version_and_commands():
    text = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (.+?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL).group()
    assert PROJECT["version"] in newest
    assert not [name for name in COMMANDS if f"`{name}`" not in text]
