"""Trainings on rows that the library `datasets` reads: the bits of the same rows in parquet."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from corl_jax.config.schema import Config
from corl_jax.train import __main__ as command
from corl_jax.train.loaders import open_sources
from corl_jax.train.stages import STAGES
from tests.support import tiny_runs
from tests.support.tiny_runs import metric_lines, write_config

pytestmark = pytest.mark.usefixtures("module_on_one_device")


@pytest.fixture(scope="module")
def lines(rows, tmp_path_factory):
    """A folder with the rows as JSON lines, and the images beside them."""
    folder = tmp_path_factory.mktemp("lines")
    with (folder / "rows.jsonl").open("w") as file:
        for number, row in enumerate(pq.read_table(rows).to_pylist()):
            (folder / f"{number}.png").write_bytes(row["real_image"]["bytes"])
            file.write(json.dumps(row | {"real_image": f"{number}.png"}) + "\n")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def train(tree: dict, *arguments: str) -> Path:
    output = Path(tree["output_dir"])
    path = write_config(output.parent / f"{output.name}.yaml", tree)
    command.main(["--config", str(path), *arguments])
    return output


def losses_of(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metric_lines(run)]


def export_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "export").glob("*.safetensors")}


def test_two_steps_have_the_bits_of_parquet_and_changed_rows_do_not_resume(
    model, rows, lines, tmp_path, capsys
):
    """The second run stops after a step and resumes from the same JSON lines."""

    def options(path, name):
        tree = tiny_runs.options(
            model, path, tmp_path / name, stage="sft", rewards=[],
            data={"columns": {"sft_answer": "qa_solution"}},
            sft={"caption_column": None, "t2i_weight": 0.0},
        )  # fmt: skip
        return tree | {"checkpoint": {"every": 1}}

    straight = train(options(rows, "parquet"))
    stopped = options(lines, "lines")
    train(stopped, "train.stop_after=1")
    text = (lines / "rows.jsonl").read_text()
    (lines / "rows.jsonl").write_text(text.replace("squares", "circles"))
    with pytest.raises(SystemExit) as error:
        train(stopped)
    assert error.value.code == 2 and "fingerprint was" in capsys.readouterr().err
    (lines / "rows.jsonl").write_text(text)
    resumed = train(stopped)
    assert export_of(straight) and export_of(straight) == export_of(resumed)
    assert losses_of(straight) == losses_of(resumed)


def test_held_out_rows_are_those_of_the_split(tmp_path):
    """Of the data itself, or of another path."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for split in ("train", "test"):
            row = dict.fromkeys(("prompt", "qa_problem", "real_image"), f"{folder} {split}")
            (tmp_path / f"{folder}/{split}.jsonl").write_text(json.dumps(row))

    def read_prompts(**held_out) -> list[str]:
        tree = tiny_runs.options(
            tmp_path, tmp_path / "a", tmp_path / "run",
            data={"split": "train"}, eval={"suite": "rewards", **held_out},
        )  # fmt: skip
        trained, measured = open_sources(Config.model_validate(tree), STAGES["rl"], {})
        return [*trained.column("prompt"), *measured.column("prompt")]

    assert read_prompts(split="test") == ["a train", "a test"]
    other = str(tmp_path / "b")
    assert read_prompts(path=other, split="test") == ["a train", "b test"]
    assert read_prompts(path=f"{other}/train.jsonl") == ["a train", "b train"]
