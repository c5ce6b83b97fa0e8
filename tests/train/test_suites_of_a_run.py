"""Evaluations on files of their own during a training, `eval.suites`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from corl_jax.config import files as config_files
from corl_jax.data.drawn_world.held_out import HeldOutShapes
from corl_jax.errors import InputError
from corl_jax.train import __main__ as command
from corl_jax.train import resolve
from tests.support import several_processes, tiny_runs
from tests.support.tiny_detector import clip_dir, detector_dir
from tests.support.tiny_runs import metric_lines, write_config
from tests.support.tsv_files import encode_image, write_drawn_world, write_tsv

pytestmark = pytest.mark.usefixtures("module_on_one_device")

ROWS, COUNTED = 5, 3  # of the drawn world; the first ones count


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Rows of the drawn world in a file."""
    source = HeldOutShapes(ROWS, 7, "small")
    rows = [source[row] for row in range(ROWS)]
    for row in rows:
        buffer = io.BytesIO()
        image = row["real_image"]
        image = image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image["bytes"]))
        image.save(buffer, "PNG")
        row["real_image"] = {"bytes": buffer.getvalue(), "path": None}
    path = tmp_path_factory.mktemp("drawn") / "drawn.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Choice questions in VLMEvalKit's format."""
    return write_drawn_world(tmp_path_factory.mktemp("tsv") / "MMStar.tsv", ROWS, "choice")


@pytest.fixture(scope="module")
def make_options(model, rows, drawn, questions):
    def options(output: Path, **changes) -> dict:
        return tiny_runs.options(
            model, rows, output,
            **{
                "data": {"max_prompt_length": 256},
                "rewards": [{"name": "t2i_pixel_mse"}, {"name": "format"}],
                "train": {"prompts_per_step": 4, "max_steps": 1, "micro_batch": 2},
                "eval": {
                    "batch_prompts": 2,
                    "suites": [
                        {"suite": "shapes", "path": str(drawn), "rows": COUNTED},
                        {"suite": "rewards", "path": str(rows), "name": "own", "rows": 4},
                        {"suite": "tsv", "path": str(questions), "rows": COUNTED},
                    ],
                },
            } | changes,
        )  # fmt: skip

    return options


def test_each_suite_measures_its_own_file_under_its_name(make_options, tmp_path):
    tree = make_options(tmp_path / "run")
    command.main(["--config", str(write_config(tmp_path / "run.yaml", tree))])
    lines = [line for line in metric_lines(tmp_path / "run") if "eval/seconds" in line]
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        # COUNTED tries: rates are thirds.
        assert 3 * line["eval/drawn/answer/accuracy"] % 1 == pytest.approx(0, abs=1e-6)
        assert np.isfinite(line["eval/own/t2i/t2i_pixel_mse"])
        assert 3 * line["eval/MMStar/answer/accuracy"] % 1 == pytest.approx(0, abs=1e-6)
        assert 0 < line["eval/MMStar/answer/accuracy_high"] <= 1
        assert 0 <= line["eval/MMStar/answer/unread"] <= 1
        assert "eval/draw/accuracy" not in line
    assert sorted(file.name for file in (tmp_path / "run" / "images").glob("drawn_*.png")) == [
        "drawn_000000.png", "drawn_000001.png"
    ]  # fmt: skip


def test_the_samples_are_those_of_the_same_rows_alone(make_options, drawn, tmp_path):
    """The suite of the config's own rows, on the same file, measures the same."""
    tree = make_options(
        tmp_path / "run",
        eval={"suite": "shapes", "path": str(drawn), "rows": COUNTED, "batch_prompts": 2,
              "suites": [{"suite": "shapes", "path": str(drawn), "rows": COUNTED, "name": "twin"}]},
        train={"prompts_per_step": 4, "max_steps": 0, "micro_batch": 2},
        export={"layout": "none"},
    )  # fmt: skip
    command.main(["--config", str(write_config(tmp_path / "run.yaml", tree))])
    (line,) = [line for line in metric_lines(tmp_path / "run") if "eval/seconds" in line]
    twin = {name: value for name, value in line.items() if name.startswith("eval/twin/")}
    assert len(twin) > 10
    assert twin == {name: line[name.replace("/twin/", "/")] for name in twin}


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"suite": "shape"}, "eval.suites.0.suite: found 'shape'; did you mean shapes?"),
        ({"path": "missing.parquet"}, "eval.suites.0: "),
        ({"suite": "rewards"}, "eval.suites.0.suite: found rewards, which scores rewards, but"),
        ({"suite": "tsv"}, "eval.suites.0: "),  # of a parquet file
        ({"suite": "tsv", "path": "missing.tsv"}, "eval.suites.0: missing.tsv: cannot be read"),
    ],
)
def test_wrong_entries_are_refused_before_devices_are_used(
    make_options, drawn, tmp_path, entry, problem
):
    entry = {"suite": "shapes", "path": str(drawn)} | entry
    changes: dict = {"eval": {"suites": [entry], "batch_prompts": 2}}
    if entry["suite"] == "rewards":
        changes |= {"rewards": [], "stage": "sft"}
    tree = make_options(tmp_path / "run", **changes)
    with pytest.raises(InputError) as error:
        resolve.resolve_run(config_files.validate(tree, "test"))
    assert any(line.startswith(problem) for line in error.value.problems), error.value.problems


def test_two_suites_of_one_name_are_refused(make_options, drawn, tmp_path):
    entry = {"suite": "shapes", "path": str(drawn)}
    tree = make_options(tmp_path / "run", eval={"suites": [entry, entry], "batch_prompts": 2})
    with pytest.raises(InputError, match=r"eval\.suites\.1: its metrics would be eval/drawn/"):
        resolve.resolve_run(config_files.validate(tree, "test"))


def test_a_suite_with_files_of_its_own_format_is_no_suite_of_the_data(make_options, tmp_path):
    tree = make_options(tmp_path / "run", eval={"suite": "tsv"})
    with pytest.raises(InputError) as error:
        resolve.resolve_run(config_files.validate(tree, "test"))
    (problem,) = error.value.problems
    assert problem.startswith("eval.suite: found tsv, which reads files of its own format; list it")


def test_the_suite_geneval_asks_its_networks_in_any_stage(make_options, tmp_path):
    """Also without a reward that asks them; each that is missing is named."""
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text('{"tag": "colors", "prompt": "a red dog", "include": [{"class": "dog", ')
    path.write_text(path.read_text() + '"count": 1, "color": "red"}]}\n')
    suites = [{"suite": "geneval", "path": str(path)}]
    tree = make_options(
        tmp_path / "run", stage="sft", rewards=[], eval={"suites": suites, "batch_prompts": 2}
    )
    with pytest.raises(InputError) as error:
        resolve.resolve_run(config_files.validate(tree, "test"))
    missing = [p for p in error.value.problems if "(asked by geneval; " in p]
    assert [p.partition(" ")[0] for p in missing] == ["networks.mask2former", "networks.clip_l14"]


@pytest.mark.slow  # the detector is compiled
def test_the_suite_geneval_judges_in_a_run(make_options, tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    demands = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "color": "red"}]
    rows = [
        {"tag": tag, "prompt": f"a {demand['class']}", "include": [demand]}
        for tag, demand in zip(("single_object", "colors"), demands, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    networks = {
        "mask2former": {"path": str(detector_dir(tmp_path / "detector"))},
        "clip_l14": {"path": str(clip_dir(tmp_path / "clip"))},
    }
    tree = make_options(
        tmp_path / "run", networks=networks, export={"layout": "none"},
        train={"prompts_per_step": 4, "max_steps": 0, "micro_batch": 2},
        eval={"suites": [{"suite": "geneval", "path": str(path), "name": "GenEval"}],
              "batch_prompts": 2},
    )  # fmt: skip
    command.main(["--config", str(write_config(tmp_path / "run.yaml", tree))])
    (line,) = [line for line in metric_lines(tmp_path / "run") if "eval/seconds" in line]
    rates = [line[f"eval/GenEval/draw/{name}"] for name in ("single_object", "colors")]
    assert set(rates) <= {0.0, 1.0}
    assert line["eval/GenEval/draw/overall"] == line["eval/GenEval/draw/accuracy"] == sum(rates) / 2
    assert (tmp_path / "run" / "images" / "GenEval_000000.png").is_file()


def test_every_row_of_a_tsv_that_cannot_be_asked_is_named(make_options, tmp_path):
    image = encode_image()
    options = {"A": "a cat", "B": "a dog", "answer": "A"}
    rows = [
        {"index": 1, **options}, {"index": 2, "image": image[:200], **options},
        {"index": 3, "image": str([image, image]), **options},
        {"index": 4, "question": "word " * 600, **options}, {"index": 5, "image": "?", **options},
    ]  # fmt: skip
    path = write_tsv(tmp_path / "broken.tsv", rows[:4])

    def find_problems():
        suites = [{"suite": "tsv", "path": str(path)}]
        tree = make_options(tmp_path / "run", eval={"suites": suites, "batch_prompts": 2})
        with pytest.raises(InputError) as error:
            resolve.resolve_run(config_files.validate(tree, "test"))
        return error.value.problems

    broken, long, several = find_problems()
    assert "index 2: image" in broken and "index 4: its mm2t prompt has" in long
    assert "1 of 4 rows have several images, such as " in several and "index 3;" in several
    write_tsv(path, [*rows[:1], *rows[4:]])
    (problem,) = find_problems()
    assert "index 5: image is '?', a reference to a row that does not exist" in problem


def test_every_row_that_cannot_be_scored_is_named(make_options, drawn, tmp_path):
    table = pq.read_table(drawn).to_pylist()
    table[1]["qa_solution"] = " "
    table[2]["real_image"] = {"bytes": b"no image", "path": None}
    broken = tmp_path / "broken.parquet"
    pq.write_table(pa.Table.from_pylist(table), broken)
    suites = [{"suite": "shapes", "path": str(broken)}]
    tree = make_options(tmp_path / "run", eval={"suites": suites, "batch_prompts": 2})
    with pytest.raises(InputError) as error:
        resolve.resolve_run(config_files.validate(tree, "test"))
    text = str(error.value)
    assert "row 1" in text and "row 2" in text and "qa_solution" in text


@pytest.mark.slow  # starts three processes
def test_two_processes_measure_what_one_does(make_options, questions, tmp_path):
    """Rows of a file are shared out, and each rating needs all of them."""
    path = tmp_path / "evaluation_metadata.jsonl"
    demand = {"include": [{"class": "dog", "count": 1}]}
    rows = [
        {"tag": tag, "prompt": f"a {tag}", **demand} for tag in ("counting", "colors", "colors")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    networks = {
        "mask2former": {"path": str(detector_dir(tmp_path / "detector"))},
        "clip_l14": {"path": str(clip_dir(tmp_path / "clip"))},
    }
    tree = make_options(
        tmp_path / "run", networks=networks, export={"layout": "none"},
        train={"prompts_per_step": 4, "max_steps": 0},
        eval={"suites": [{"suite": "geneval", "path": str(path), "name": "GenEval"},
                         {"suite": "tsv", "path": str(questions)}],
              "batch_prompts": 4},
    )  # fmt: skip
    config = write_config(tmp_path / "run.yaml", tree)
    alone = several_processes.start(
        ["-m", "corl_jax.train", "--config", str(config), f"output_dir={tmp_path / 'alone'}"], 4
    )
    several_processes.finished([*several_processes.train(config), alone])
    lines = []
    for folder in ("run", "alone"):
        (line,) = [line for line in metric_lines(tmp_path / folder) if "eval/seconds" in line]
        lines.append({k: v for k, v in line.items() if "/GenEval/" in k or "/MMStar/" in k})
    assert lines[0] == lines[1] and len(lines[0]) == 4 + 10
