"""Runs with options of the rollout and the reference: short runs of a tiny model, to the end."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from corl_jax.config import files as config_files
from corl_jax.tasks import choose_tasks_of_step
from corl_jax.train import __main__ as command
from corl_jax.train import alarms, resolve
from tests.support import tiny_runs
from tests.support.tiny_runs import metric_lines, write_config

pytestmark = pytest.mark.usefixtures("module_on_one_device")


@pytest.fixture
def options(model, rows, tmp_path):
    return functools.partial(tiny_runs.options, model, rows, tmp_path / "run")


def train(tree: dict, *arguments: str) -> Path:
    """Runs the command on a config; the run directory."""
    output = Path(tree["output_dir"])
    output.parent.mkdir(parents=True, exist_ok=True)
    path = write_config(output.parent / f"{output.name}.yaml", tree)
    command.main(["--config", str(path), *arguments])
    return output


def name_tasks(line: dict) -> set[str]:
    """The tasks whose training has metrics in a line."""
    return {name.partition("/")[0] for name in line} & {"t2i", "mm2t"}


# ---- tasks that take turns


def test_the_task_changes_every_n_steps():
    tasks = ("t2i", "mm2t")
    steps = [choose_tasks_of_step(tasks, 2, step) for step in range(6)]
    assert steps == [("t2i",), ("t2i",), ("mm2t",), ("mm2t",), ("t2i",), ("t2i",)]
    assert choose_tasks_of_step(tasks, 0, 5) == tasks


def test_tasks_take_turns_in_a_run_that_resumes(options, tmp_path):
    """Steps 1 to 4 train images, texts, images, texts, also if the run stops after step 3."""
    tree = options(
        algorithm={"alternate_every": 1, "num_iterations": 2, "kl_coef": 0.1},
        train={"max_steps": 4}, log={"samples_every": 1, "images_every": 2},
        export={"layout": "none"}, checkpoint={"every": 4},
    )  # fmt: skip
    once = train(tree)
    twice = tree | {"output_dir": str(tmp_path / "twice")}
    train(twice, "train.stop_after=3")
    train(twice)
    lines = metric_lines(once)
    assert [name_tasks(line) for line in lines] == [{"t2i"}, {"mm2t"}] * 2
    assert [line["reward"] for line in lines] == [
        line[f"{task}/reward"] for line, task in zip(lines, ["t2i", "mm2t"] * 2, strict=True)
    ]
    assert all(("perf/images_per_second" in line) == ("t2i/kl" in line) for line in lines)
    assert all(line["alarm/kl"] == 0 for line in lines)
    clocks = ("second", "step_time")
    assert [
        {name: x for name, x in line.items() if not any(clock in name for clock in clocks)}
        for line in lines
    ] == [
        {name: x for name, x in line.items() if not any(clock in name for clock in clocks)}
        for line in metric_lines(tmp_path / "twice")
    ]
    assert len(list((once / "samples").iterdir())) == 4
    assert json.loads((once / "summary.json").read_text())["optimizer_steps"] == 8
    assert "mm2t" in (once / "report.html").read_text()


def test_a_log_that_shows_one_task_alone_is_a_warning(options):
    def warn(every: int, period: int) -> list[str]:
        tree = options(algorithm={"alternate_every": period}, log={"every": every})
        return resolve.find_unlogged_tasks(config_files.validate(tree, "test"))

    (line,) = warn(every=2, period=1)
    assert line.startswith("log.every: with 2 and algorithm.alternate_every 1 no step of t2i ")
    assert not warn(every=3, period=3) and not warn(every=2, period=2) and not warn(1, 1)
    assert not warn(every=2, period=0)


def test_alarms_compare_each_task_that_takes_turns_with_itself():
    options = alarms.schema.Guards(zero_spread=0.5)
    guards = alarms.make_guards(options, ("t2i", "mm2t"))
    printed = []
    for step in range(1, 21):
        task, share = ("t2i", 1.0) if step % 2 else ("mm2t", 0.0)
        values = {"frac_reward_zero_std": share, f"{task}/frac_reward_zero_std": share}
        printed += guards.check_logged(step, values | {f"{task}/reward": share})[1]
    (line,) = printed
    assert "t2i/frac_reward_zero_std 1, above 0.5" in line and "step 19" in line
    # The images' reward is higher than the texts': the mean of both has not risen.
    assert guards.check_evaluation(20, {"eval/x": (0.5, 0.01)})[1] == []
    guards.check_logged(21, {"t2i/reward": 1.0})
    assert guards.check_evaluation(21, {"eval/x": (0.1, 0.01)})[1] == []
    for step, task, reward in ((22, "mm2t", 0.5), (23, "t2i", 1.0)):
        guards.check_logged(step, {f"{task}/reward": reward})
    assert "0.75 after 0.5" in guards.check_evaluation(23, {"eval/x": (0.1, 0.01)})[1][0]
