"""The page about fine-tuning: its blocks run one after the other, and the nano Janus learns."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import yaml

from corl_jax.cli import run_command
from tests.support.tiny_runs import metric_lines

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/how_to/fine_tune.md").read_text()

pytestmark = pytest.mark.usefixtures("one_device")


def find_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the page's data and config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (code,), (config,) = find_blocks("python"), find_blocks("yaml")
    exec(code, {})
    (tmp_path / "fine_tune.yaml").write_text(config)
    return tmp_path


def run(command: str) -> None:
    program, name, *arguments = shlex.split(command)
    assert program == "corl-jax"
    run_command(name, arguments)


def list_commands() -> list[str]:
    return [line for block in find_blocks("bash") for line in block.splitlines()]


def test_the_row_of_the_page_is_the_first_of_its_script(folder):
    (row,) = find_blocks("json")
    assert json.loads(row) == json.loads(
        (folder / "my_data/rows.jsonl").read_text().splitlines()[0]
    )


def test_the_lines_for_the_nano_janus_are_all_that_differs_from_the_config(folder):
    """The reader leaves them out for Janus-Pro."""
    lines = (folder / "fine_tune.yaml").read_text().splitlines()
    kept = yaml.safe_load("\n".join(line for line in lines if "# nano Janus" not in line))
    assert kept.keys() == {"base", "output_dir", "data", "rewards", "eval"}
    assert kept["data"].keys() == {"path", "columns"}


@pytest.mark.parametrize("command", [c for c in list_commands() if c.endswith("--check")])
def test_what_is_checked_is_accepted(folder, command, capsys):
    run(command)
    assert ("64 rows" in (output := capsys.readouterr().out)) != ("72 rows" in output)


@pytest.mark.slow
def test_the_nano_janus_learns(folder, capsys):
    for command in list_commands():
        if not command.endswith("--check"):
            run(command)
    before, after = (
        line["eval/mm2t/qa_accuracy"]
        for line in metric_lines(folder / "runs/fine_tune")
        if "eval/mm2t/qa_accuracy" in line
    )
    assert before < 0.3 and after > 0.9
    assert "It is green." in capsys.readouterr().out
