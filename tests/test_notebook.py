"""examples/first_run.ipynb: committed without outputs, and executed from first cell to last."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "examples" / "first_run.ipynb"


def read_notebook() -> nbformat.NotebookNode:
    return nbformat.read(FILE, as_version=4)


def list_code() -> list[nbformat.NotebookNode]:
    return [cell for cell in read_notebook().cells if cell.cell_type == "code"]


def test_it_has_no_outputs_and_its_links_exist():
    assert not [cell.id for cell in list_code() if cell.outputs or cell.execution_count]
    for target in re.findall(r"\]\((\.\./[^)#]+)", FILE.read_text()):
        assert (FILE.parent / target).is_file(), target


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = read_notebook()
    (setup,) = [cell for cell in notebook.cells if cell.id == "imports"]
    setup.source, changes = re.subn(r"STEPS = \d+", "STEPS = 2", setup.source)
    assert changes == 1
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    images = [
        output for cell in cells.values() for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]  # fmt: skip
    assert len(images) == 4  # before, the curve, and both again
    (state,) = [
        output for output in cells["train"].outputs if output.output_type == "execute_result"
    ]
    assert state.data["text/plain"].startswith("(2, ")
    assert (tmp_path / "runs" / "first_run" / "export" / "model.safetensors").is_file()
    said = "".join(output.get("text", "") for output in cells["answer"].outputs)
    assert said.count("?") >= 4 and said.count(" | ") == 8  # question, solution and answer
