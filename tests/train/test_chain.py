"""Several stages of one config: trained in order, resumed, refused before the first one."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import corl_jax.train as package
from corl_jax.config.chains import make_stages
from corl_jax.errors import InputError
from corl_jax.report import __main__ as report
from corl_jax.train import __main__ as command
from corl_jax.train import chain
from corl_jax.train import command as training
from tests.faults.harness import PATIENCE, Job
from tests.support import several_processes, tiny_runs
from tests.support.tiny_runs import metric_lines, write_config

pytestmark = pytest.mark.usefixtures("module_on_one_device")

SFT = {"name": "sft", "stage": "sft", "sft": {"tasks": "mm2t"}, "optimizer": {"b2": 0.98}}
RL = {"name": "rl", "algorithm": {"tasks": "mm2t"}, "seed": 3}
REWARD = """
def short(texts):
    return [-float(len(text)) for text in texts]
"""


def options(model: Path, rows: Path, output: Path, **changes) -> dict:
    (output.parent / "short.py").write_text(REWARD)
    rl = RL | {"rewards": [{"use": f"{output.parent / 'short.py'}:short"}]}
    tree = tiny_runs.options(model, rows, output, rewards=[], checkpoint={"every": 1})
    return tree | {"stages": [SFT, rl]} | changes


def train(tree: dict, *arguments: str) -> Path:
    output = Path(tree["output_dir"])
    command.main(["--config", str(write_config(output.with_suffix(".yaml"), tree)), *arguments])
    return output


def refused(capsys, tree: dict, *arguments: str) -> list[str]:
    with pytest.raises(SystemExit) as error:
        train(tree, *arguments)
    assert error.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def steady_lines(folder: Path) -> list[dict]:
    """The metrics without what a clock decides."""
    return [
        {key: x for key, x in line.items() if "second" not in key and key != "step_time"}
        for line in metric_lines(folder)
    ]


@pytest.fixture(scope="module")
def tree(model, rows, tmp_path_factory) -> dict:
    return options(model, rows, tmp_path_factory.mktemp("chain") / "run")


@pytest.fixture(scope="module")
def held_bytes() -> list[int]:
    """Of all arrays, as each stage of `run` begins."""
    return []


@pytest.fixture(scope="module")
def run(tree, held_bytes) -> Path:
    original = training.run_training

    def count_and_run(*arguments):
        held_bytes.append(sum(array.nbytes for array in jax.live_arrays()))
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "run_training", count_and_run)
        return train(tree)


def test_each_stage_is_a_run_that_starts_from_the_one_before(run, tree, tmp_path):
    for name in ("sft", "rl"):
        assert [line["step"] for line in metric_lines(run / name) if "loss" in line] == [1, 2]
        assert (run / name / "report.html").exists() and (run / name / "summary.json").exists()
    # As users would chain the same runs by hand.
    alone = {key: value for key, value in tree.items() if key != "stages"} | tree["stages"][1]
    del alone["name"]
    alone |= {"output_dir": str(tmp_path / "alone")}
    train(alone, f"model.path={run / 'sft' / 'export'}")
    assert steady_lines(tmp_path / "alone") == steady_lines(run / "rl")
    weights = [
        np.concatenate([x.ravel() for x in load_file(file).values()])
        for name in ("sft", "rl")
        for file in sorted((run / name / "export").glob("*.safetensors"))
    ]
    assert not np.array_equal(*weights)
    assert all(array.dtype == np.float32 for array in weights)


def test_the_arrays_of_a_stage_are_gone_when_the_next_one_begins(run, held_bytes):
    first, second = held_bytes
    parameters = sum(file.stat().st_size for file in (run / "rl/export").glob("*.safetensors"))
    assert second - first < parameters / 10


def test_the_report_of_the_folder_has_a_column_of_each_stage(run, tmp_path, capsys):
    report.main([str(run), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "sft" in page and str(run / "rl") in page


def test_finished_stages_are_left_alone(run, tree, capsys):
    before = {file: file.stat().st_mtime_ns for file in run.rglob("metrics.jsonl")}
    train(tree)
    error = capsys.readouterr().err
    assert error.count("nothing is left to do") == 2
    assert error.count("extend ") == 1 and "stages.rl.train.max_steps=4 " in error
    assert error.index("stage 1 of 2: sft") < error.index("stage 2 of 2: rl")
    assert {file: file.stat().st_mtime_ns for file in run.rglob("metrics.jsonl")} == before


def test_python_runs_stages_too(run, tree):
    result = package(tree, {"stages.rl.train.stop_after": 1})
    assert (result.output_dir, result.steps, result.export) == (run / "rl", 2, run / "rl/export")


@pytest.mark.slow
def test_a_stopped_stage_goes_on_and_ends_as_without_the_stop(run, tree, tmp_path, capsys):
    tree = tree | {"output_dir": str(tmp_path / "halves")}
    train(tree, "stages.sft.train.stop_after=1")
    halves = tmp_path / "halves"
    assert not (halves / "rl").exists()
    train(tree, "stages.rl.train.stop_after=1")
    assert (halves / "sft" / "export").exists() and not (halves / "rl" / "export").exists()
    train(tree)
    for name in ("sft", "rl"):
        assert steady_lines(halves / name) == steady_lines(run / name)
    # A stage that was trained again is not that of the stage after it.
    record = json.loads((halves / "rl" / chain.START).read_text())
    (halves / "rl" / chain.START).write_text(json.dumps(record | {"trained": "others"}))
    (line,) = refused(capsys, tree)
    assert f"{halves / 'rl'}: began from other weights than {halves / 'sft/export'} has" in line
    train(tree, "--allow-changed-config", "stages.rl.train.max_steps=2")


def test_other_stages_are_refused(run, tree, capsys):
    (line,) = refused(capsys, tree | {"stages": [SFT | {"name": "other"}, *tree["stages"][1:]]})
    assert f"stages: found other, rl, but {run} has sft, rl" in line
    assert not (run / "other").exists()
    (line,) = refused(capsys, tree | {"stages": [SFT], "output_dir": str(run / "rl")})
    assert "found a run without stages" in line


def test_a_bad_last_stage_is_refused_before_the_first_one(tree, tmp_path, capsys):
    new = tree | {"output_dir": str(tmp_path / "new")}
    third = {"name": "late", "stage": "sft", "optimizer": {"x": 1}}
    (line,) = refused(capsys, new | {"stages": [*tree["stages"], third]})
    assert "new.yaml: stages[2].optimizer.x: unknown key" in line
    third = third | {"optimizer": {}, "data": {"path": str(tmp_path / "absent.parquet")}}
    for flags in ([], ["--check"]):
        (line,) = refused(capsys, new | {"stages": [*tree["stages"], third]}, *flags)
        assert line.startswith("error: stage late: ") and "absent.parquet" in line
    assert not (tmp_path / "new").exists()


def test_check_describes_all_stages_and_writes_nothing(tree, tmp_path, capsys):
    train(tree | {"output_dir": str(tmp_path / "new")}, "--check", "stages.rl.train.max_steps=3")
    out = capsys.readouterr().out
    assert out.index("stage 1 of 2: sft") < out.index("steps: 2 of 4 prompts")
    assert out.index("stage 2 of 2: rl") < out.index("steps: 3 of 4 prompts")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused(tree, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    # The config lies beside the run, so the folder is given to the command alone.
    (line,) = refused(
        capsys, tree | {"output_dir": str(tmp_path / "x")}, f"output_dir={tmp_path / 'file' / 'x'}"
    )
    assert "output_dir: " in line and "name a directory that can be" in line


def test_an_export_that_is_gone_counts_as_other_weights(run, tree, tmp_path):
    """Without this a later stage would be the end of a chain that is no more."""
    config = make_stages(tree, {})["rl"]
    model = config.model.model_copy(update={"path": str(tmp_path / "gone")})
    config = config.model_copy(update={"model": model})
    with pytest.raises(InputError, match="began from other weights"):
        chain.check_start(config, allow_changes=False)


@pytest.mark.slow
def test_a_kill_in_the_second_stage_loses_no_stage(model, rows, tmp_path):
    tree = options(model, rows, tmp_path / "run")
    (tmp_path / "run").mkdir()
    config = write_config(tmp_path / "run.yaml", tree)
    job = Job(tmp_path / "run" / "rl", config)
    job.start("stages.rl.train.max_steps=12")
    assert job.until(job.steps)
    job.kill()
    assert max(job.steps()) < 12
    finished = (tmp_path / "run/sft/summary.json").stat().st_mtime_ns
    job.finish("stages.rl.train.max_steps=12")
    assert (tmp_path / "run/sft/summary.json").stat().st_mtime_ns == finished
    assert "resuming from step" in job.log and job.log.count("nothing is left to do") == 1
    assert json.loads((job.output / "summary.json").read_text())["steps"] == 12


@pytest.mark.slow
def test_two_processes_stop_in_the_second_stage_and_go_on(model, rows, tmp_path):
    """The steps of the second stage begin again, on which the processes must agree."""
    later = SFT | {"name": "later", "train": {"max_steps": 40}}
    tree = options(model, rows, tmp_path / "run", stages=[SFT, later], mesh={"fsdp": -1, "data": 1})
    config = write_config(tmp_path / "run.yaml", tree)
    pair = several_processes.train(config, "checkpoint.every=1000")
    deadline = time.monotonic() + PATIENCE
    while pair[0].text.count("step 1/") < 2 and pair[0].popen.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pair[1].popen.send_signal(signal.SIGTERM)
    assert [process.wait(PATIENCE) for process in pair] == [75, 75], pair[0].text[-3000:]
    (step,) = (int(path.name) for path in (tmp_path / "run/later/checkpoints").glob("[0-9]*"))
    assert step < 40
    first, second = several_processes.finished(
        several_processes.train(config, "checkpoint.every=1000")
    )
    assert first.count("nothing is left to do") == 1
    assert f"resuming from step {step}/40" in first and "stage " not in second
    assert json.loads((tmp_path / "run/later/summary.json").read_text())["steps"] == 40
