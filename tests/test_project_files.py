"""The files around the code: citation, changelog, and what continuous integration runs."""

from __future__ import annotations

import json
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
    assert citation["version"] == PROJECT["version"]
    # The second licence of the package is that of a file of others.
    assert PROJECT["license"].split(" AND ")[0] == citation["license"]
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


def test_ci_runs_targets_that_exist():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = {step["run"] for step in steps if "run" in step}
    assert {"make quickstart", "make test", "make lint", "make site"} == commands
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands:
        assert command.removeprefix("make ") in targets
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_the_image_has_what_an_installation_reads():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    instructions = [line.split() for line in lines if line and not line.startswith("#")]
    assert {name for name, *_ in instructions} == {
        "FROM", "ENV", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD"
    }  # fmt: skip
    copied = {path for name, *words in instructions if name == "COPY" for path in words[:-1]}
    assert {"pyproject.toml", "configs", "corl_jax"} <= copied
    for path in (PROJECT["readme"], *PROJECT["license-files"]):
        assert copied & {path, path.partition("/")[0]}, path
    # The ignore file refuses everything else, so that no run or environment gets into the image.
    first, *kept = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"
    ]
    assert first == "*" and {line[1:] for line in kept if line[0] == "!"} == copied
    for path in copied:
        assert (ROOT / path).exists()
    assert any('"/src[cuda]"' in words for words in instructions)
    assert "cuda" in PROJECT["optional-dependencies"]
    for name in ("ENTRYPOINT", "CMD"):
        ((_, value),) = [words for words in instructions if words[0] == name]
        assert json.loads(value)
    assert json.loads(value)[0] == "--help" and PROJECT["scripts"].keys() == {"corl-jax"}
